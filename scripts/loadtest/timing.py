"""Waiting until a moment, precisely: what an open loop's requests start by.

*Process*: load processes. An event loop's own timers wake it on a millisecond, `time.sleep` within
the kernel's timer slack of 50 us; both would be latency of a target that answers in 20 us. So an
event loop waits for a timerfd here (man 2 timerfd_create), and the slack is set to the least.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from typing import Final

_CLOCK_MONOTONIC: Final = 1
_TIMER_ABSTIME: Final = 1
_PR_SET_TIMERSLACK: Final = 29
_PR_SET_PDEATHSIG: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("it_interval", _Timespec), ("it_value", _Timespec)]


def least_timer_slack() -> None:
    """Let this thread, and those it starts, be woken when they asked to be."""
    _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def die_with_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent has died."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def sleep_until(moment_ns: int) -> None:
    """Block until a moment of CLOCK_MONOTONIC."""
    left_ns = moment_ns - time.monotonic_ns()
    if left_ns > 0:
        time.sleep(left_ns / 1e9)


class Alarm:
    """Wakes one task of an event loop at moments of CLOCK_MONOTONIC. For one task at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take a file descriptor; raises OSError."""
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        loop.add_reader(self._fd, self._wake)

    async def until(self, moment_ns: int) -> None:
        """Wait until then; return at once where it has passed."""
        if moment_ns <= time.monotonic_ns():
            return
        seconds, rest_ns = divmod(moment_ns, 1_000_000_000)
        when = _Itimerspec(_Timespec(0, 0), _Timespec(seconds, rest_ns))
        if _libc.timerfd_settime(self._fd, _TIMER_ABSTIME, ctypes.byref(when), None):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        """Give the file descriptor back."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
