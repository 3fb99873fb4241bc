"""The flags of the command line: names, defaults, limits, help, and what is said of a wrong value.

*Process*: the parent. What flags mean together is `scripts.loadtest.options`' to know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from kamacache.limits import TTL_MS_MAX
from scripts.loadtest import limits
from scripts.loadtest.arrivals import KINDS as ARRIVALS
from scripts.loadtest.operations import Delay, parse_mix
from scripts.loadtest.popularity import parse_popularity
from scripts.loadtest.sizes import parse_sizes
from scripts.loadtest.targets.specs import DEFAULTS, FORMS, check_spec
from scripts.loadtest.workload import KeyNames

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
FLAGS: Final = [
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
