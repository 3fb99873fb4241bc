"""The command line: every flag, what is believed of it, and the sentence where it is not.

*Process*: the parent. *Invariant*: whatever passes `parse` can be run; a wrong value names itself,
its limit and the remedy, before anything is started.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from kamacache.limits import KEY_BYTES_MAX, TTL_MS_MAX
from scripts.loadtest import limits
from scripts.loadtest.arrivals import KINDS as ARRIVALS
from scripts.loadtest.operations import Delay, parse_mix
from scripts.loadtest.popularity import TraceSpec, parse_popularity, read_trace
from scripts.loadtest.sizes import parse_sizes
from scripts.loadtest.targets.specs import DEFAULTS, FORMS, check_spec, split_spec, split_targets
from scripts.loadtest.workload import DIGITS, KeyNames

T = TypeVar("T")

WARM: Final = "warm"
COLD: Final = "cold"
AS_IS: Final = "as-is"
SET: Final = "set"
COUNT: Final = "count"

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_DIED: Final = 70  # EX_SOFTWARE: the target, in the middle of the test

DURATION_S: Final = 10.0
ROUND_S: Final = 3.0  # of a comparison, whose rounds are many
WARMUP_S: Final = 1.0
ROUNDS_COMPARED: Final = 5
CONCURRENCY_OPEN: Final = 64
GROUP: Final = "load"
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


def _checked(check: Callable[[str], object]) -> Callable[..., str | None]:
    """Return a click callback that lets text pass which ``check`` takes."""

    def callback(
        context: click.Context, parameter: click.Parameter, value: str | None
    ) -> str | None:
        if value is not None:
            try:
                check(value)
            except ValueError as error:
                raise click.BadParameter(str(error)) from error
        return value

    return callback


class _Number(click.ParamType[float]):
    """A number in a range, whose refusal names value, range and remedy."""

    def __init__(self, least: float, most: float, unit: str = "", *, whole: bool = False) -> None:
        self._least, self._most, self._unit, self._whole = least, most, unit, whole
        self.name = "integer" if whole else "number"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """Return the number."""
        try:
            number = int(value) if self._whole else float(value)
        except ValueError:
            number = None
        if number is None or not self._least <= number <= self._most:
            kind = "whole number" if self._whole else "number"
            unit = f" {self._unit}" if self._unit else ""
            self.fail(
                f"{value!r}; give a {kind} from {self._least:,g} to {self._most:,.15g}{unit}",
                parameter,
                context,
            )
        return number


EPILOG: Final = f"""Targets: {FORMS}.

\b
Without a place: {", ".join(f"{name} {place}" for name, place in DEFAULTS.items())};
local: $KAMACACHE_RUN_DIR, or the user's own run directory.

\b
Examples:
  load_test.py --target local:/run/scores --processes 4
  load_test.py --target grpc:10.0.0.1:8001,10.0.0.2:8001 --rate 20000 --popularity zipf:0.99
  load_test.py --compare local:/run/scores,redis:/tmp/redis.sock --mix 90:9:1 --json out.json

\b
Exit codes: {EXIT_DONE} done, also when Ctrl-C ended it after something was measured,
{EXIT_USAGE} wrong usage, {EXIT_UNREACHABLE} a target does not answer at the start,
{EXIT_DIED} a target died midway, {EXIT_FAILED} anything else. docs/load-test.md explains the rest.
"""

_SECONDS = functools.partial(_Number, unit="seconds")
_OPTIONS: Final = [
    click.option("--target", metavar="SPEC", callback=_checked(check_spec), help="What to test."),
    click.option(
        "--compare",
        metavar="SPEC,SPEC",
        multiple=True,
        help="Test these in turn, round by round, and print ratios to the first. Repeatable; "
        "separate by comma or semicolon.",
    ),
    click.option("--group", help=f"The node's group. Default: its only one, else {GROUP!r}."),
    click.option(
        "--processes",
        type=_Number(1, limits.PROCESSES_MAX, whole=True),
        default=1,
        help="Load processes. Default: 1.",
    ),
    click.option(
        "--concurrency",
        type=_Number(1, limits.CONCURRENCY_MAX, whole=True),
        help="Requests at a time of one process; with --rate its connections. "
        f"Default: 1, with --rate {CONCURRENCY_OPEN}.",
    ),
    click.option(
        "--rate",
        type=_Number(0.001, limits.RATE_MAX, "requests a second"),
        help="Open loop: so many requests a second, all processes together, whatever the target "
        "does; latency counts from when a request was due. Default: closed loop.",
    ),
    click.option(
        "--arrivals", type=click.Choice(ARRIVALS), default=ARRIVALS[0], help="Default: poisson."
    ),
    click.option(
        "--duration",
        type=_SECONDS(limits.DURATION_S_MIN, limits.DURATION_S_MAX),
        help=f"Seconds of a round. Default: {DURATION_S:g}, with --compare {ROUND_S:g}, with a "
        "trace until it ends.",
    ),
    click.option(
        "--warmup",
        type=_SECONDS(0, limits.DURATION_S_MAX),
        help="Seconds of requests before each round that do not count. "
        f"Default: {WARMUP_S:g}, with --cold or a trace 0.",
    ),
    click.option(
        "--rounds",
        type=_Number(1, limits.ROUNDS_MAX, whole=True),
        help=f"Default: 1, with --compare {ROUNDS_COMPARED}.",
    ),
    click.option(
        "--mix",
        metavar="R:W:D",
        callback=_checked(parse_mix),
        help="Weights of reads, writes and deletes. Default: 90:10:0, with a trace 1:0:0.",
    ),
    click.option(
        "--popularity",
        metavar="KIND",
        default="zipf:0.99",
        callback=_checked(parse_popularity),
        help="uniform, zipf:THETA (any from 0), hotset:SHARE:KEYS:SHIFT_S (so many keys get SHARE "
        "of the requests; others every SHIFT_S seconds) or trace:FILE. Default: zipf:0.99.",
    ),
    click.option(
        "--keys",
        type=_Number(1, limits.KEYS_MAX, whole=True),
        default=100_000,
        help="Default: 100000.",
    ),
    click.option(
        "--value-size",
        metavar="SIZE",
        default="100",
        callback=_checked(parse_sizes),
        help="BYTES, lognormal:MEAN:SIGMA or list:FILE (a size a line). Default: 100.",
    ),
    click.option(
        "--ttl",
        type=_SECONDS(0.001, TTL_MS_MAX / 1000),
        help="Seconds that written values live. Default: the target's own.",
    ),
    click.option(
        "--batch",
        type=_Number(1, limits.BATCH_MAX, whole=True),
        default=1,
        help="Keys of one request; above 1 it is get_many, MGET and the like. Default: 1.",
    ),
    click.option("--warm", "cache", flag_value=WARM, help="Store all keys first: the default."),
    click.option(
        "--cold",
        "cache",
        flag_value=COLD,
        help="Use keys that nobody used before, anew in each round; the default with a trace.",
    ),
    click.option("--as-is", "cache", flag_value=AS_IS, help="Take what is there."),
    click.option(
        "--on-miss",
        type=click.Choice((SET, COUNT)),
        default=SET,
        help="Where the target loads nothing: set the value, as applications do, within the read's "
        "latency, or only count. Default: set.",
    ),
    click.option(
        "--getter-ms",
        metavar="TIME",
        callback=_checked(Delay),
        help="What the application's own load takes before such a set: MS, exponential:MS or "
        "lognormal:MS:SIGMA. A node's getter has its own (scripts.loadtest.app). Default: none.",
    ),
    click.option(
        "--key-prefix",
        callback=_checked(lambda text: KeyNames(text.encode())),
        help="Before each key. Default: 'load:', with a trace none.",
    ),
    click.option(
        "--timeout",
        type=_SECONDS(0.01, limits.TIMEOUT_S_MAX),
        default=5.0,
        help="Seconds that a request may take. Default: 5.",
    ),
    click.option(
        "--seed",
        type=_Number(0, limits.SEED_MAX, whole=True),
        help="The same seed draws the same requests. Default: another each time, printed.",
    ),
    click.option(
        "--json",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write everything measured to this file.",
    ),
    click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Draw latency by percentile and throughput over time: .png, .svg or .pdf.",
    ),
    click.option("--quiet", is_flag=True, help="No progress, only the tables at the end."),
]


def _with_options(function: Callable[..., T]) -> Callable[..., T]:
    for option in reversed(_OPTIONS):
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
