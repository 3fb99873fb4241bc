"""The files that ``--json`` and ``--plot`` write: found out before the test whether they can be.

A test of ten minutes whose file cannot be written is a test to be run again, so `check_writable`
makes and removes a file where the result will be. *Invariant*: a file is whole or as it was: it
is written beside its place and renamed, so neither Ctrl-C nor a full disk leaves half of one. Only
a regular file is replaced: a rename over /dev/stdout would take the device's place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from scripts.loadtest.ratios import Ratios, compare
from scripts.loadtest.results import FORMAT, RoundResult, Summary, TestResult

INDENT: Final = 1


class OutputError(ValueError):
    """A file cannot be written; the text is a sentence for the person who named it."""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """What the JSON file holds; docs/load-test.md describes it."""

    format: int
    began: str
    arguments: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]
    targets: list[Summary]
    ratios: list[Ratios]
    rounds: list[RoundResult]


def check_writable(path: Path) -> None:
    """Find out whether a file can be written there. Raises `OutputError`; leaves nothing behind."""
    place = _place(path)
    with _sentences(path):
        probe = _beside(place)
        probe.touch(exist_ok=False)
        probe.unlink()


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` make a file beside ``path``, then rename it. Raises `OutputError`."""
    place = _place(path)
    made = _beside(place)
    with _sentences(path):
        try:
            write(made)
            made.replace(place)
        except BaseException:
            made.unlink(missing_ok=True)
            raise


def document(result: TestResult) -> Document:
    """Return the test with what follows from it: sums for each target, and ratios."""
    return Document(
        format=FORMAT,
        began=result.began,
        arguments=result.arguments,
        machine=result.machine,
        versions=result.versions,
        notes=result.notes,
        targets=[result.summary(target) for target in result.targets],
        ratios=compare(result),
        rounds=result.rounds,
    )


def write_json(result: TestResult, path: Path) -> None:
    """Write the test as JSON. Raises `OutputError`."""
    text = msgspec.json.format(msgspec.json.encode(document(result)), indent=INDENT) + b"\n"
    replace_file(path, lambda made: _write(made, text))


def _write(made: Path, text: bytes) -> None:
    made.write_bytes(text)


def _place(path: Path) -> Path:
    """Return where the file really goes, links followed; raises `OutputError`."""
    with _sentences(path):
        place = path.resolve()
        if place.is_symlink():  # from Python 3.13 on resolve leaves a circle as it is
            raise OutputError(f"{path} cannot be written: its links lead in a circle")
        if place.is_dir():
            raise OutputError(f"{path} is a directory: name a file in it")
        if place.exists() and not place.is_file():
            raise OutputError(f"{path} is not a regular file: name one that may be replaced")
        if place.exists() and not os.access(place, os.W_OK):
            raise OutputError(f"{path} is write-protected")
        if not place.parent.is_dir():
            raise OutputError(f"{path}: there is no directory {place.parent}; make it first")
    return place


def _beside(place: Path) -> Path:
    """Return a name of this process's own in the same directory, so that a rename is atomic."""
    return place.with_name(f".{place.name[:100]}.{os.getpid()}.tmp")


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:  # Path.resolve, before Python 3.13
        raise OutputError(f"{path} cannot be written: its links lead in a circle") from error
