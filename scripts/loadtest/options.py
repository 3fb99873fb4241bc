"""The command line as a whole: what the flags mean together, and what does not go together.

*Process*: the parent. *Invariant*: whatever passes `parse` can be run; a wrong value names itself,
its limit and the remedy, before anything is started.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from kamacache.limits import KEY_BYTES_MAX
from scripts.loadtest import limits
from scripts.loadtest.flags import (
    COLD,
    CONCURRENCY_OPEN,
    DURATION_S,
    EPILOG,
    FLAGS,
    ROUND_S,
    ROUNDS_COMPARED,
    WARM,
    WARMUP_S,
)
from scripts.loadtest.popularity import TraceSpec, parse_popularity, read_trace
from scripts.loadtest.sizes import parse_sizes
from scripts.loadtest.targets.specs import split_spec, split_targets
from scripts.loadtest.workload import DIGITS

T = TypeVar("T")

COLD_PREFIX_BYTES: Final = 24  # at most, that name one cold round


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """A load test as it was asked for, checked and complete."""

    targets: list[str]
    group: str | None  # None: the node's only one, or GROUP
    processes: int
    concurrency: int
    rate: float | None
    arrivals: str
    duration_s: float | None  # None: until a trace has ended
    warmup_s: float
    rounds: int
    mix: str
    popularity: str
    keys: int
    value_size: str
    ttl_s: float | None
    batch: int
    cache: str  # WARM, COLD or AS_IS
    on_miss: str  # SET or COUNT
    getter: str | None
    key_prefix: str
    timeout_s: float
    seed: int
    json: Path | None
    plot: Path | None
    quiet: bool

    @property
    def window_s(self) -> float:
        """The longest that one round may take."""
        return limits.DURATION_S_MAX if self.duration_s is None else self.duration_s

    def as_shown(self) -> dict[str, Any]:
        """Return the options as they are printed and written."""
        return {name: _plain(getattr(self, name)) for name in self.__struct_fields__}


def parse(arguments: Sequence[str], program: str = "load_test.py") -> Options | None:
    """Return what the command line asks for; None where it asked for help, which is printed.

    Raises `click.ClickException`, whose ``show`` says what is wrong.
    """
    # What was asked, or the code that click ends with after --help.
    found = _command.main(list(arguments), prog_name=program, standalone_mode=False)
    return found if isinstance(found, Options) else None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _with_options(function: Callable[..., T]) -> Callable[..., T]:
    for option in reversed(FLAGS):
        function = option(function)
    return function


@click.command(
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@_with_options
def _command(
    target: str | None,
    compare: tuple[str, ...],
    duration: float | None,
    warmup: float | None,
    rounds: int | None,
    mix: str | None,
    cache: str | None,
    key_prefix: str | None,
    concurrency: int | None,
    seed: int | None,
    **given: Any,
) -> Options:
    """Load a cache with requests, and say how it took them.

    One of --target and --compare is needed.
    """
    traced = isinstance(parse_popularity(given["popularity"]), TraceSpec)
    cache = cache or (COLD if traced else WARM)
    if duration is None and not traced:
        duration = ROUND_S if compare else DURATION_S
    if warmup is None:
        warmup = 0.0 if cache == COLD or traced else WARMUP_S
    options = Options(
        targets=_targets(target, compare),
        group=given["group"],
        processes=given["processes"],
        concurrency=concurrency or (CONCURRENCY_OPEN if given["rate"] else 1),
        rate=given["rate"],
        arrivals=given["arrivals"],
        duration_s=duration,
        warmup_s=warmup,
        rounds=rounds or (ROUNDS_COMPARED if compare else 1),
        mix=mix or ("1:0:0" if traced else "90:10:0"),
        popularity=given["popularity"],
        keys=given["keys"],
        value_size=given["value_size"],
        ttl_s=given["ttl"],
        batch=given["batch"],
        cache=cache,
        on_miss=given["on_miss"],
        getter=given["getter_ms"],
        key_prefix=key_prefix if key_prefix is not None else ("" if traced else "load:"),
        timeout_s=given["timeout"],
        seed=secrets.randbelow(1 << 32) if seed is None else seed,
        json=given["json"],
        plot=given["plot"],
        quiet=given["quiet"],
    )
    _check_together(options, traced=traced)
    return options


def _targets(target: str | None, compare: tuple[str, ...]) -> list[str]:
    if (target is None) == (not compare):
        raise click.UsageError("give --target SPEC, or --compare SPEC,SPEC")
    if target is not None:
        return [target]
    try:
        return split_targets(compare)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--compare'") from error


def _check_together(options: Options, *, traced: bool) -> None:
    """Raise where options that are right by themselves do not go together."""
    schemes = {split_spec(target)[0] for target in options.targets}
    if options.batch > 1 and "http" in schemes:
        raise click.UsageError("--batch: HTTP has no batches; leave it out, or leave http out")
    if "memcached" in schemes and options.concurrency > limits.THREADS_MAX:
        raise click.UsageError(
            f"--concurrency {options.concurrency}: memcached's client has a thread for each, and "
            f"the limit is {limits.THREADS_MAX}; use more --processes"
        )
    if len(options.targets) * options.processes > limits.PROCESSES_ALL_MAX:
        raise click.UsageError(
            f"--processes {options.processes}: {len(options.targets)} targets make "
            f"{len(options.targets) * options.processes} processes, and the limit is "
            f"{limits.PROCESSES_ALL_MAX}"
        )
    if options.cache == COLD and options.warmup_s:
        raise click.UsageError("--warmup: a cold test has none; leave out --warmup or --cold")
    if traced:
        _check_trace(options)
    elif options.cache == WARM:
        _check_loaded(options)


def _check_trace(options: Options) -> None:
    spec = parse_popularity(options.popularity)
    assert isinstance(spec, TraceSpec)
    try:
        keys = read_trace(spec.path)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--popularity'") from error
    if len(keys) < options.processes:
        raise click.UsageError(
            f"--processes {options.processes}: the trace has only {len(keys)} keys, and each "
            "process takes every so many-th; use fewer"
        )
    held = len(keys) * options.processes * len(options.targets)
    if held > limits.TRACE_KEYS_HELD_MAX:
        raise click.UsageError(
            f"--processes {options.processes}: each reads the trace's {len(keys):,} keys, "
            f"{held:,} together, and the limit is {limits.TRACE_KEYS_HELD_MAX:,}; use fewer"
        )
    longest = max(map(len, keys)) + len(options.key_prefix.encode())
    if options.cache == COLD:
        longest += COLD_PREFIX_BYTES
    if longest > KEY_BYTES_MAX:
        raise click.UsageError(
            f"--popularity: with its prefix the longest key has {longest} bytes, and the limit is "
            f"{KEY_BYTES_MAX}"
        )


def _check_loaded(options: Options) -> None:
    """Raise where a warm test would have to store too much first."""
    if options.keys > limits.KEYS_LOADED_MAX:
        raise click.UsageError(
            f"--keys {options.keys}: a warm test stores them all first, and the limit is "
            f"{limits.KEYS_LOADED_MAX:,}; use --as-is or --cold"
        )
    size = len(options.key_prefix.encode()) + DIGITS + parse_sizes(options.value_size).mean_bytes
    if options.keys * size > limits.LOADED_BYTES_MAX:
        raise click.UsageError(
            f"--keys {options.keys} of about {size:,.0f} bytes: a warm test stores them all first, "
            f"and the limit is {limits.LOADED_BYTES_MAX >> 30} GiB; use --as-is or --cold"
        )
