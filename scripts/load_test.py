#!/usr/bin/env python3
"""Load a cache with requests, and say how it took them: KamaCache, or what one would use instead.

*Process*: the load test's parent. It checks what was asked for, starts load processes
(`scripts.loadtest.process`), shows what they report, and prints, writes and draws the results.
docs/load-test.md says what is measured and how.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.loadtest.results import TestResult

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # so that it runs from a checkout that is not installed
    sys.path.insert(0, str(ROOT))

PROGRAM = "load_test.py"


def main() -> int:
    """Run the command; return its exit code."""
    try:
        import click

        from scripts.loadtest import flags, live, options, output, plot, run, table
    except ModuleNotFoundError as error:
        print(
            f"{PROGRAM}: {error.name} is missing; pip install -e '.[loadtest,http]' in {ROOT}",
            file=sys.stderr,
        )
        return 1
    try:
        asked = options.parse(sys.argv[1:], PROGRAM)
    except click.ClickException as error:
        error.show()
        return flags.EXIT_USAGE
    except click.Abort:
        return flags.EXIT_FAILED
    if asked is None:
        return flags.EXIT_DONE
    try:
        if asked.json is not None:
            output.check_writable(asked.json)
        if asked.plot is not None:
            plot.check_plot(asked.plot)
    except output.OutputError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return flags.EXIT_USAGE
    with live.choose_view(quiet=asked.quiet) as view:
        outcome = asyncio.run(run.run_test(asked, view))
    code = outcome.code
    if outcome.result.rounds:
        table.print_tables(outcome.result)
        code = max(code, _write(outcome.result, asked.json, asked.plot))
    if outcome.sentence is not None:
        print(f"{PROGRAM}: {outcome.sentence}", file=sys.stderr)
    return code


def _write(result: TestResult, json: Path | None, drawn: Path | None) -> int:
    """Write the files that were asked for; return the exit code that this calls for."""
    from scripts.loadtest import flags, output, plot

    code = flags.EXIT_DONE
    for path, write in ((json, output.write_json), (drawn, plot.write_plot)):
        if path is None:
            continue
        try:
            write(result, path)
        except output.OutputError as error:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
            code = flags.EXIT_FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
