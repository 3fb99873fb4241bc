"""Tests of the form of log lines; each in an interpreter of its own, whose stderr is read."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from kamacache.limits import LOG_LINE_BYTES_MAX
from kamacache.node.logs import render_json

BEGIN = """
import logging, structlog
from kamacache.node.logs import configure_logs, node_label, relabel_logs
configure_logs("info", {form!r}, node="n:1", role="worker", shard=3)
log, struct = logging.getLogger("std"), structlog.get_logger("structured")
"""


def logged(program: str, form: str = "json") -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN.format(form=form) + program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout == ""
    return done.stderr


def lines(program: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged(program).splitlines()]


def test_both_libraries_write_the_same_fields_and_names_of_levels() -> None:
    program = "".join(
        f"{logger}.{level}('x')\n"
        for logger in ("log", "struct")
        for level in ("debug", "info", "warning", "error", "critical")
    )
    found = lines(
        program + "try:\n  1/0\nexcept Exception:\n  log.exception('x'); struct.exception('x')"
    )
    levels = ["info", "warning", "error", "critical"]
    assert [line["level"] for line in found] == [*levels, *levels, "error", "error"]
    for line in found:
        own = line["node"], line["role"], line["shard"], line["event"]
        assert own == ("n:1", "worker", 3, "x")
    assert len({frozenset(line) for line in found[:8]}) == 1
    assert {line["exception"].splitlines()[-1] for line in found[8:]} == {
        "ZeroDivisionError: division by zero"
    }


def test_one_level_rules_both() -> None:
    program = "logging.getLogger().setLevel('ERROR')\nlog.warning('a'); struct.warning('b')\n"
    program += "logging.getLogger().setLevel('DEBUG')\nlog.debug('c'); struct.debug('d')"
    assert [line["event"] for line in lines(program)] == ["c", "d"]


def test_a_fork_keeps_the_pid_right() -> None:
    program = "import os\nlog.info('p')\nif not os.fork():\n  log.info('c'); os._exit(0)\nos.wait()"
    parent, child = lines(program)
    assert parent["pid"] != child["pid"]


def test_fields_of_a_line_do_not_hide_whose_it_is() -> None:
    [line] = lines("struct.info('x', node='other', pid=1)")
    assert (line["node"], line["node_"], line["pid_"]) == ("n:1", "other", 1)


def test_fields_of_a_line_do_not_stand_in_for_what_it_says() -> None:
    theirs = {"level": "mine", "logger": "me", "timestamp": "now", "_record": 7}
    standard, structured = lines(
        f"theirs = {theirs!r}\n"
        "log.info('x', extra={'event': 'y', **theirs})\nstruct.info('x', **theirs)"
    )
    assert standard.pop("event_") == "y"
    for line, name in ((standard, "std"), (structured, "structured")):
        assert (line["event"], line["level"], line["logger"]) == ("x", "info", name)
        assert {key: line[f"{key}_"] for key in theirs} == theirs


def test_an_apps_own_configuration_is_undone_and_its_other_handlers_stay() -> None:
    program = """
import logging.config, io
logging.getLogger("kamacache.worker").setLevel("INFO")
kept = logging.StreamHandler(io.StringIO())
logging.config.dictConfig({"version": 1, "disable_existing_loggers": True,
    "handlers": {"h": {"class": "logging.StreamHandler"}},
    "loggers": {"kamacache": {"level": "CRITICAL", "handlers": ["h"], "propagate": False}},
    "root": {"handlers": ["h"], "level": "ERROR"}})
logging.getLogger().addHandler(kept)
configure_logs("info", "json", node="n:1", role="worker", shard=3)
logging.getLogger("kamacache.worker").info("still")
logging.getLogger('made.later').info("%s", kept.stream.getvalue().strip())
"""
    assert [line["event"] for line in lines(program)] == ["still", "still"]


@pytest.mark.parametrize(
    "program",
    [
        "raise ValueError('a\\nb')",
        "import threading; t = threading.Thread(target=lambda: 1/0); t.start(); t.join()",
        "class A:\n  def __del__(self): raise ValueError('x')\nA()",
        "import warnings; warnings.warn('x\\ny')",
    ],
)
def test_what_python_would_print_is_a_line(program: str) -> None:
    [line] = lines(program)
    assert line["level"] in ("error", "warning")
    assert line["role"] == "worker"


def test_a_line_on_the_console_is_one_line_without_control_characters() -> None:
    program = """
class Table:
    def __repr__(self): return "f\\ng"
log.info("a\\nb\\x1b[31m", extra={"k": "c\\u2028d\\re", "l\\nm": 1, "table": Table()})
"""
    text = logged(program, "console")
    assert text.count("\n") == 1
    assert all(character.isprintable() for character in text.rstrip("\n"))
    assert "role=worker" in text


@pytest.mark.parametrize(
    "event",
    [
        {"event": "x" * 100_000},
        {"event": "x", "exception": "y\n" * 100_000 + "the end"},
        {"event": "x", "data": [1] * 50_000},
        {"event": "x", **{f"field{number}": "z" * 40 for number in range(1_000)}},
        {"event": "x", "text": "\u20ac\n" * 10_000, "bytes": b"\xff" * 10_000},
    ],
)
def test_a_line_of_json_has_a_bound_and_says_that_it_was_cut(event: dict[str, Any]) -> None:
    own = {"node": "n", "role": "worker", "shard": 0, "pid": 1, "level": "info", "timestamp": "t"}
    line = render_json(None, "info", {**event, **own})
    assert len(line) < LOG_LINE_BYTES_MAX
    found = json.loads(line)
    assert found["cut"] is True
    assert all(found[name] == value for name, value in own.items())
    assert found["event"].startswith("x")
    if "exception" in event:
        assert found["exception"].endswith("the end")
