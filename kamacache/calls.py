"""What a call carries through nested getters: its depth, its chain of keys, its deadline.

*Process*: all. A getter that asks another group runs with `current` set to the call it serves,
so the nested call knows how deep it is, which keys wait above it, and how long it may take.
Guards against: a key that waits for itself (found in the chain: `LoadError` at once), threads of
one budget waiting for threads of the same budget (each depth has its own), and a nested call that
outlives its asker (it inherits the deadline).
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import NamedTuple

from kamacache.errors import ConfigError, LoadError
from kamacache.limits import CALL_TIMEOUT_MAX_S, LOAD_DEPTH_MAX

ChainLink = tuple[str, bytes]  # (group, key)


class Call(NamedTuple):
    """The load that the running getter serves."""

    depth: int  # 0: asked by an application; n: by a getter of depth n - 1
    chain: tuple[ChainLink, ...]  # keys under load, outermost first, the running getter's last
    deadline_s: float  # time.monotonic() at which the asker gives up


current: ContextVar[Call | None] = ContextVar("kamacache_call", default=None)

waiting_threads: set[int] = set()
"""Idents of the threads that wait for a nested call (`kamacache.local.link`); a worker's pools
look here. Single adds and discards, which the GIL makes atomic."""


def deadline_after(timeout: float | None, default_s: float) -> float:
    """Return the time.monotonic() at which a call of this timeout (seconds) ends.

    A nested call ends no later than the call it serves. Raises `ConfigError` where the timeout
    is not a number above 0; longer than `CALL_TIMEOUT_MAX_S` is cut to that.
    """
    if timeout is None:
        timeout = default_s
    elif not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
        raise ConfigError(
            f"timeout is {timeout!r}; give a number of seconds above 0, or None",
            setting="timeout",
            value=repr(timeout),
        )
    deadline_s = time.monotonic() + min(timeout, CALL_TIMEOUT_MAX_S)
    outer = current.get()
    return deadline_s if outer is None else min(deadline_s, outer.deadline_s)


def nested(group: str, key: bytes) -> tuple[int, tuple[ChainLink, ...]]:
    """Return depth and chain for asking for ``key`` from where we run.

    Raises `LoadError` where the key waits for itself or the nesting is deeper than allowed.
    """
    outer = current.get()
    if outer is None:
        return 0, ()
    check_chain(group, key, outer.depth + 1, outer.chain)
    return outer.depth + 1, outer.chain


def check_chain(group: str, key: bytes, depth: int, chain: tuple[ChainLink, ...]) -> None:
    """Raise `LoadError` for a key in its own chain, or for a depth above the limit."""
    if (group, key) in chain:
        raise LoadError(
            f"group {group!r}: the getter asks, through {len(chain)} nested loads, for the key "
            "it is loading; break the cycle in the getters",
            group=group,
            key=key,
            cause_type="cycle",
        )
    if depth > LOAD_DEPTH_MAX:
        raise LoadError(
            f"group {group!r}: getters are nested {depth} deep, the limit is {LOAD_DEPTH_MAX}",
            group=group,
            key=key,
            cause_type="depth",
        )
