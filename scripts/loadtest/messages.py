"""What the parent tells a load process and hears from it: a JSON line each, over its pipes.

*Process*: both. The first line that a load process reads is a `Plan`; then commands. It answers
`Ready` or `Failed` to the plan, `Loaded` (after some `Progress`) to a `Load`, and `Done` (after its
`Report`s) to a `Run`. A command is over when its answer has come.
"""

from __future__ import annotations

import msgspec

from scripts.loadtest.recording import Report, Window


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that one load process must know; text as it was given, checked by the parent."""

    target: str
    process: int
    processes: int
    group: str
    concurrency: int
    rate: float | None  # of all processes together; None: a closed loop
    arrivals: str
    mix: str
    popularity: str
    keys: int
    value_size: str
    ttl_s: float | None
    batch: int
    repeat_trace: bool
    fill: bool
    getter: str | None
    timeout_s: float
    seed: int


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Store the keys of the plan, this process's share of them."""

    prefix: bytes
    read: bool  # read them instead, so that the target loads them


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """Make requests for the length of a window."""

    window: Window
    prefix: bytes
    stream: int  # decides, with seed and process, what is drawn


class End(msgspec.Struct, frozen=True, tag="end"):
    """Disconnect and end."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The process has connected, and has measured itself."""

    generator_us: float  # of its own for each operation
    clock_us: float  # of its own in each latency


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """So many keys are stored since the last word."""

    keys: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """All keys were stored, or tried."""

    failed: int  # keys
    sentence: str | None  # why


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The round is over for this process; all reports were sent."""

    seconds: float  # from its start to its end, at most the window
    behind: int
    behind_s: float


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The process cannot go on, and ends."""

    sentence: str
    target: bool  # the target's fault; else a defect of the load test


Command = Load | Run | End
Answer = Ready | Progress | Loaded | Report | Done | Failed
