"""The load processes of one target, as the parent sees them: started, told, heard, and ended.

*Process*: the parent. *Invariants*: a load process is a subprocess, in a process group of its own,
so that Ctrl-C comes to the parent alone; whatever happens `Gang.close` leaves none behind; what
one writes to stderr is kept, up to a bound, for the sentence that says why it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from scripts.loadtest import limits
from scripts.loadtest.messages import (
    Answer,
    Command,
    Done,
    End,
    Failed,
    Load,
    Loaded,
    Plan,
    Progress,
    Ready,
    Run,
)
from scripts.loadtest.recording import Report

T = TypeVar("T")
ROOT: Final = Path(__file__).resolve().parent.parent.parent
_DECODER: Final[msgspec.json.Decoder[Answer]] = msgspec.json.Decoder(Answer)
_F_SETPIPE_SZ: Final = 1031  # fcntl.F_SETPIPE_SZ; Linux


class ProcessError(Exception):
    """A load process ended, or is not to be used any more. A sentence."""

    def __init__(self, sentence: str, *, target: bool) -> None:
        super().__init__(sentence)
        self.target = target  # the target's fault


class LoadProcess:
    """One load process."""

    def __init__(self, plan: Plan) -> None:
        self.number = plan.process
        self._plan = plan
        self._process: asyncio.subprocess.Process | None = None
        self._stderr: deque[bytes] = deque(maxlen=200)
        self._reading: asyncio.Task[None] | None = None
        self.killed = False

    async def start(self) -> None:
        """Start it and tell it its plan; raises OSError."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the current folder may hold a redis.py
            "-m",
            "scripts.loadtest.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=limits.REPORT_BYTES_MAX,
            process_group=0,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",  # numpy's libraries need no threads here
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        self._reading = asyncio.ensure_future(self._read_stderr())
        transport = self._process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # more than the user may have
            pipe = transport.get_extra_info("pipe")
            fcntl.fcntl(pipe.fileno(), _F_SETPIPE_SZ, limits.PIPE_BYTES)
        await self._write(msgspec.json.encode(self._plan))

    async def tell(self, command: Command) -> None:
        """Send a command."""
        await self._write(msgspec.json.encode(command))

    async def hear(self) -> Answer:
        """Return the next answer; raises `ProcessError` where there is none, or it has failed."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            if not line:
                raise ProcessError(await self._last_words(), target=False)
            answer: Answer = _DECODER.decode(line)
        except (ValueError, msgspec.MsgspecError) as error:
            raise ProcessError(f"{self}: cannot be understood ({error})", target=False) from error
        if isinstance(answer, Failed):
            who = "" if answer.target else f"{self}: "
            raise ProcessError(f"{who}{answer.sentence}", target=answer.target)
        return answer

    def terminate(self) -> None:
        """Ask it to end what it does."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Make it end."""
        self.killed = True
        self._signal(signal.SIGKILL)

    async def close(self) -> None:
        """Let it end, make it if it does not, and reap it."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessError):
                await self.tell(End())
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(_drain(process), limits.PROCESS_STOP_S)
            except TimeoutError:
                self.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), limits.KILL_WAIT_S)
        if self._reading is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reading, 1.0)
        process._transport.close()  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return f"load process {self.number}"

    async def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return  # it has ended; `hear` says why

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read_stderr(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        kept = 0
        while piece := await self._process.stderr.read(4096):
            self._stderr.append(piece)
            kept += len(piece)
            while kept > limits.STDERR_BYTES_MAX:
                kept -= len(self._stderr.popleft())

    async def _last_words(self) -> str:
        assert self._process is not None
        assert self._reading is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), limits.KILL_WAIT_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reading), 1.0)
        code = self._process.returncode
        how = f"with code {code}"
        if code is not None and code < 0:
            how = f"by signal {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (was there memory enough?)"
        lines = b"".join(self._stderr).decode(errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        return f"{self} ended {how}{said}"


class Gang:
    """All load processes of one target."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._members = [LoadProcess(plan) for plan in plans]
        self.ready: list[Ready] = []

    async def start(self) -> None:
        """Start all, and wait until each has connected; raises `ProcessError`."""
        for member in self._members:
            try:
                await member.start()
            except OSError as error:
                raise ProcessError(
                    f"{member} cannot be started ({error.strerror}); use fewer --processes",
                    target=False,
                ) from error
        patience_s = limits.PROCESS_START_S + len(self._members)
        try:
            self.ready = await asyncio.wait_for(
                _all(self._first_word(member) for member in self._members), patience_s
            )
        except TimeoutError:
            raise ProcessError(
                f"the load processes were not ready within {patience_s:g} s", target=False
            ) from None

    async def load(self, command: Load, progress: Callable[[int], None]) -> list[Loaded]:
        """Let all store their keys; ``progress`` is told how many more are stored."""

        async def one(member: LoadProcess) -> Loaded:
            await member.tell(command)
            while True:
                answer = await member.hear()
                if isinstance(answer, Loaded):
                    return answer
                if isinstance(answer, Progress):
                    progress(answer.keys)

        return await _all(one(member) for member in self._members)

    async def run(
        self, command: Run, heard: Callable[[int, Report], None]
    ) -> list[Done | ProcessError]:
        """Let all run a round; return how each ended. ``heard`` gets every report."""

        async def one(member: LoadProcess) -> Done | ProcessError:
            try:
                await member.tell(command)
                while True:
                    answer = await member.hear()
                    if isinstance(answer, Done):
                        return answer
                    if isinstance(answer, Report):
                        heard(member.number, answer)
            except ProcessError as error:
                self.terminate()  # a round without one of its processes is none
                if member.killed:
                    return ProcessError(
                        f"{member} did not end in time and was killed: what it had under way is "
                        "not counted",
                        target=True,
                    )
                return error

        return list(await asyncio.gather(*(one(member) for member in self._members)))

    def terminate(self) -> None:
        """Ask all to end their round."""
        for member in self._members:
            member.terminate()

    def kill(self) -> None:
        """Make all end."""
        for member in self._members:
            member.kill()

    async def close(self) -> None:
        """End all."""
        await asyncio.gather(*(member.close() for member in self._members))

    async def _first_word(self, member: LoadProcess) -> Ready:
        answer = await member.hear()
        if not isinstance(answer, Ready):
            raise ProcessError(f"{member} said {type(answer).__name__} first", target=False)
        return answer


def start_ahead_ns(processes: int) -> int:
    """Return a moment at which so many load processes can have begun together."""
    ahead_s = limits.START_AHEAD_S + limits.START_AHEAD_EACH_S * processes
    return time.monotonic_ns() + int(ahead_s * 1e9)


async def _drain(process: asyncio.subprocess.Process) -> None:
    """Read what is left, since a full pipe keeps a process from ending, and wait for the end."""
    assert process.stdout is not None
    while await process.stdout.read(1 << 16):
        pass
    await process.wait()


async def _all(bodies: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results; the first error ends the others."""
    tasks = [asyncio.ensure_future(body) for body in bodies]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
