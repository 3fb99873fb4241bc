"""The load test itself: targets looked at, load processes started, rounds run in turn, merged.

*Process*: the parent; one event loop. *Invariants*: the targets of a comparison take turns round by
round, and another begins each round, so that a machine that slows down slows all; whatever ends
the test (Ctrl-C, a target that dies, a defect) ends all load processes, and what was measured
until then is returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from datetime import UTC, datetime
from typing import Any, Final

from scripts.loadtest import limits
from scripts.loadtest.children import Gang, ProcessError, start_ahead_ns
from scripts.loadtest.flags import (
    COLD,
    EXIT_DIED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_UNREACHABLE,
    GROUP,
    SET,
    WARM,
)
from scripts.loadtest.live import View
from scripts.loadtest.machine import machine, versions
from scripts.loadtest.messages import Done, Load, Plan, Run
from scripts.loadtest.notes import not_found_notes, target_notes
from scripts.loadtest.options import Options
from scripts.loadtest.popularity import TraceSpec, distinct, parse_popularity, read_trace
from scripts.loadtest.recording import Window
from scripts.loadtest.results import RoundResult, TestResult
from scripts.loadtest.side import EndOfTestError, Outcome, Side, base36, hits_and_misses, is_dead
from scripts.loadtest.tally import Tally
from scripts.loadtest.targets.base import SessionOptions, Target, TargetError
from scripts.loadtest.targets.specs import make_target
from scripts.loadtest.usage import Usage

WARM_UP_STREAMS: Final = 1 << 20  # of draws: above those of rounds


class LoadTest:
    """A load test under way."""

    def __init__(self, options: Options, view: View) -> None:
        self._options = options
        self._view = view
        self._stop = asyncio.Event()
        self._code = EXIT_DIED  # of a round that fails
        self._sides: list[Side] = []
        self._rounds: list[RoundResult] = []
        self._notes: list[str] = []
        self._began = datetime.now(UTC)
        self._machine = machine()

    async def run(self) -> Outcome:
        """Run it; returns what was measured, however it ended."""
        sentence, code = None, EXIT_DONE
        with self._signals():
            try:
                async with self._prepared():
                    await self._all_rounds()
            except EndOfTestError as error:
                sentence, code = str(error), error.code
        if self._stop.is_set() and code == EXIT_DONE:
            seconds = sum(found.seconds for found in self._rounds)
            sentence = f"interrupted after {seconds:.1f} s of measurement"
            if not any(found.operations or found.error_count for found in self._rounds):
                sentence, code = "interrupted before anything was measured", EXIT_FAILED
        if code == EXIT_DONE and not self._rounds:
            sentence, code = "no request was made: give a longer --duration", EXIT_FAILED
        return Outcome(self._result(), code, sentence)

    # -- beginning and end ----------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            for side in self._sides:
                side.gang.kill()
        else:
            self._view.note("ending: waiting for what is under way (once more: now)")
        self._stop.set()

    @contextlib.asynccontextmanager
    async def _prepared(self) -> AsyncIterator[None]:
        """Check the targets, start the load processes; end them all in the end."""
        try:
            for index, name in enumerate(self._options.targets):
                self._sides.append(self._checked(index, name))
            for side in self._sides:
                await self._unless_stopped(self._started(side))
            yield
        finally:
            await asyncio.gather(*(side.gang.close() for side in self._sides))
            for side in self._sides:
                side.target.close()

    def _checked(self, index: int, name: str) -> Side:
        options = self._options
        target = make_target(name)
        group = options.group
        if group is None:
            known = target.groups()
            group = known[0] if len(known) == 1 else GROUP
        session = SessionOptions(
            group=group, concurrency=options.concurrency, timeout_s=options.timeout_s
        )
        try:
            target.check(session)
        except TargetError as error:
            target.close()
            raise EndOfTestError(str(error), EXIT_UNREACHABLE) from error
        plans = [self._plan(target, group, process) for process in range(options.processes)]
        return Side(index, target, Gang(plans), session)

    def _plan(self, target: Target, group: str, process: int) -> Plan:
        options = self._options
        return Plan(
            target=target.name,
            process=process,
            processes=options.processes,
            group=group,
            concurrency=options.concurrency,
            rate=options.rate,
            arrivals=options.arrivals,
            mix=options.mix,
            popularity=options.popularity,
            keys=options.keys,
            value_size=options.value_size,
            ttl_s=options.ttl_s,
            batch=options.batch,
            repeat_trace=options.duration_s is not None,
            fill=options.on_miss == SET and not target.loads_misses(),
            getter=options.getter,
            timeout_s=options.timeout_s,
            seed=options.seed,
        )

    async def _started(self, side: Side) -> None:
        try:
            await side.gang.start()
        except ProcessError as error:
            code = EXIT_UNREACHABLE if error.target else EXIT_FAILED
            raise EndOfTestError(str(error), code) from error

    async def _unless_stopped(self, body: Coroutine[Any, Any, None]) -> None:
        """Await something that measures nothing; give it up when the test is to end."""
        doing = asyncio.ensure_future(body)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((doing, stopped), return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
            else:
                raise EndOfTestError("interrupted before anything was measured", EXIT_FAILED)
        finally:
            for task in (doing, stopped):
                task.cancel()
            await asyncio.gather(doing, stopped, return_exceptions=True)

    # -- rounds ---------------------------------------------------------------------------------

    async def _all_rounds(self) -> None:
        for round_ in range(self._options.rounds):
            shift = round_ % len(self._sides)
            for side in self._sides[shift:] + self._sides[:shift]:
                if self._stop.is_set():
                    return
                await self._one_round(side, round_)

    async def _one_round(self, side: Side, round_: int) -> None:
        options = self._options
        prefix = options.key_prefix.encode()
        if options.cache == COLD:
            prefix += f"{base36(time.time_ns())}.{side.index}:".encode()
        elif options.cache == WARM and not side.loaded:
            await self._load(side, prefix, round_)
        if options.warmup_s and not self._stop.is_set():
            await self._phase(side, prefix, round_, options.warmup_s, phase="warm")
        if not self._stop.is_set():
            result = await self._phase(side, prefix, round_, options.window_s, phase="measure")
            if result.operations or result.error_count or result.behind:
                self._rounds.append(result)
            self._view.end(result)
            if result.failed:
                raise EndOfTestError(f"{result.target}: {result.failed}", self._code)

    async def _load(self, side: Side, prefix: bytes, round_: int) -> None:
        """Store the keys, or let the target load them."""
        view, total, stored = self._view, self._keys_in_all(), 0
        view.begin(side.target.name, round_ + 1, self._options.rounds, 0, phase="load")
        heard_s = time.monotonic()

        def progress(keys: int) -> None:
            nonlocal stored, heard_s
            stored += keys
            heard_s = time.monotonic()
            view.progress(stored, total)

        command = Load(prefix=prefix, read=side.target.loads_misses())
        loading = asyncio.ensure_future(side.gang.load(command, progress))
        try:
            while not loading.done():
                await asyncio.wait((loading,), timeout=limits.LOOK_S)
                if self._stop.is_set():
                    return
                if time.monotonic() - heard_s > limits.LOAD_STALL_S:
                    raise EndOfTestError(
                        f"{side.target.name}: no key was stored for {limits.LOAD_STALL_S:g} s",
                        EXIT_DIED,
                    )
            ends = loading.result()
        except ProcessError as error:
            code = EXIT_DIED if error.target and stored else EXIT_FAILED
            raise EndOfTestError(f"{side.target.name}: {error}", code) from error
        finally:
            view.end(None)
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        side.loaded = True
        if failed := sum(end.failed for end in ends):
            why = next(end.sentence for end in ends if end.sentence)
            self._notes.append(
                f"{side.target.name}: {failed:,} of {total:,} keys could not be stored before "
                f"the test ({why})"
            )

    async def _phase(
        self, side: Side, prefix: bytes, round_: int, seconds: float, *, phase: str
    ) -> RoundResult:
        """Run one window of requests; returns what was measured, also where it was cut short."""
        options, measured = self._options, phase == "measure"
        many = options.processes > limits.INTERVAL_MANY_PROCESSES
        slot_s = limits.INTERVAL_MANY_S if many else limits.INTERVAL_S
        shown_s = seconds if options.duration_s or not measured else 0
        self._view.begin(side.target.name, round_ + 1, options.rounds, shown_s, phase=phase)
        start_ns = start_ahead_ns(options.processes)
        window = Window(
            start_ns=start_ns, end_ns=start_ns + int(seconds * 1e9), slot_ns=int(slot_s * 1e9)
        )
        tally = Tally(
            target=side.target.name,
            round_=round_,
            processes=options.processes,
            window=window,
            found_is_hit=side.found_is_hit,
            show=self._view.interval,
        )
        stream = round_ if measured else WARM_UP_STREAMS + round_
        before = side.target.counters() if measured else None
        usage = Usage(side.target.processes if measured else list)
        running = asyncio.ensure_future(
            side.gang.run(Run(window=window, prefix=prefix, stream=stream), tally.add)
        )
        failed = await self._watch(side, running, tally, usage, window)
        ends = running.result()
        use = usage.end()
        hits, misses = hits_and_misses(tally, before, side.target.counters() if measured else None)
        if not measured:
            self._view.end(None)
        done = [end for end in ends if isinstance(end, Done)]
        errors = [end for end in ends if isinstance(end, ProcessError)]
        interrupted = self._stop.is_set()
        elapsed_s = min(max(time.monotonic_ns() - start_ns, 0) / 1e9, seconds)
        if errors and failed is None and not interrupted:
            failed = str(errors[0])
            self._code = EXIT_DIED if errors[0].target else EXIT_FAILED
        if tally.errors and not tally.operations and failed is None and not interrupted:
            # A round of a comparison may be over before the time for which `_watch` waits.
            failed = f"died midway: every request of a round ended with an error ({_why(tally)})"
        result = RoundResult(
            target=side.target.name,
            round=round_,
            seconds=max((end.seconds for end in done), default=elapsed_s),
            operations=tally.operations,
            keys=tally.keys,
            found=tally.found,
            hits=hits,
            misses=misses,
            errors=tally.errors,
            first_errors=tally.sentences,
            ops=tally.ops(),
            intervals=tally.intervals(),
            use=use,
            start_delay=tally.start_delay,
            behind=sum(end.behind for end in done),
            behind_s=max((end.behind_s for end in done), default=0.0),
            client_cpu_s=tally.cpu_s,
            generator_us=min((ready.generator_us for ready in side.gang.ready), default=0.0),
            interrupted=interrupted,
            failed=failed,
            notes=[str(error) for error in errors]
            + not_found_notes(
                tally, renamed=options.cache == COLD, loads=side.target.loads_misses()
            ),
        )
        if failed and not measured:
            raise EndOfTestError(f"{side.target.name}: {failed}", self._code)
        return result

    async def _watch(
        self,
        side: Side,
        running: asyncio.Future[list[Done | ProcessError]],
        tally: Tally,
        usage: Usage,
        window: Window,
    ) -> str | None:
        """Wait for a round to end, or end it; return why the target has failed, if it has."""
        failed: str | None = None
        # A read may load and store, each within its timeout.
        patience_s = 2 * self._options.timeout_s + limits.PROCESS_STOP_S
        last_s = window.end_ns / 1e9 + patience_s
        sampled_s = time.monotonic()
        told = False
        while not running.done():
            await asyncio.wait((running,), timeout=limits.LOOK_S)
            now_s = time.monotonic()
            tally.look(time.monotonic_ns())
            if now_s - sampled_s >= limits.SAMPLE_S:
                sampled_s = now_s
                usage.sample()
            if failed is None and is_dead(tally, now_s):
                failed = (
                    f"died midway: for {now_s - tally.success_s:.0f} s every request ended with "
                    f"an error ({_why(tally)})"
                )
            if not told and (failed or self._stop.is_set()):
                told = True
                last_s = min(last_s, now_s + patience_s)
                side.gang.terminate()
            if now_s > last_s:
                side.gang.kill()
        return failed

    def _keys_in_all(self) -> int:
        spec = parse_popularity(self._options.popularity)
        if isinstance(spec, TraceSpec):
            return len(distinct(read_trace(spec.path)))
        return self._options.keys

    # -- results --------------------------------------------------------------------------------

    def _result(self) -> TestResult:
        options = self._options
        notes = list(self._notes)
        for side in self._sides:
            rounds = [found for found in self._rounds if found.target == side.target.name]
            clock_us = min((ready.clock_us for ready in side.gang.ready), default=0.0)
            notes += target_notes(
                side.target.name,
                rounds,
                processes=options.processes,
                clock_us=clock_us,
                opened=options.rate is not None,
            )
        order = {name: place for place, name in enumerate(options.targets)}
        return TestResult(
            arguments=options.as_shown(),
            machine=self._machine,
            versions=versions(side.target for side in self._sides),
            began=self._began.isoformat(timespec="seconds"),
            rounds=sorted(self._rounds, key=lambda found: (found.round, order[found.target])),
            notes=notes[: limits.NOTES_MAX],
        )


def _why(tally: Tally) -> str:
    return tally.sentences[0] if tally.sentences else "no reason was told"


async def run_test(options: Options, view: View) -> Outcome:
    """Run a load test; ``view`` shows it meanwhile. Raises only what is a defect of ours."""
    return await LoadTest(options, view).run()
