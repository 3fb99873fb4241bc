"""The demo's database: made once, whole or not at all."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from scripts import run_demo


def rows_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM people").fetchone()
    assert isinstance(count, int)
    return count


def test_makes_the_file_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "people.sqlite3"
    assert run_demo.make_database(path, rows=500)
    assert rows_of(path) == 500
    before = path.stat()
    assert not run_demo.make_database(path, rows=900)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_makes_the_same_rows_every_time(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        path = tmp_path / name
        run_demo.make_database(path, rows=50)
        with closing(sqlite3.connect(path)) as connection:
            contents.append(connection.execute("SELECT * FROM people ORDER BY id").fetchall())
    assert contents[0] == contents[1]


def test_an_interrupted_run_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo.make_database(tmp_path / "people.sqlite3", rows=50)
    assert list(tmp_path.iterdir()) == []


def test_the_getter_reads_rows_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "people.sqlite3"
    run_demo.make_database(path, rows=50)
    program = (
        "import json\n"
        "from scripts.demo_app import people\n"
        "print(json.dumps([json.loads(people.get('42')), people.get('51', default=None) is None,\n"
        "    people.get('x', default=None) is None]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=run_demo.ROOT,
        env={**os.environ, "PYTHONPATH": str(run_demo.ROOT), "KAMACACHE_DEMO_DB": str(path)},
    )
    assert done.returncode == 0, done.stderr
    row, absent, no_number = json.loads(done.stdout)
    assert row["id"] == 42
    assert set(row) == {"id", "name", "city", "score"}
    assert absent
    assert no_number


def test_a_port_that_is_taken_is_no_reason_not_to_run() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert not run_demo.is_free(address)
    assert run_demo.is_free(address)
    told = run_demo.hints(Path("/b"), Path("/r"), "127.0.0.1:8001", "")
    assert "http://" not in told
    assert "http://h:1/ " in run_demo.hints(Path("/b"), Path("/r"), "127.0.0.1:8001", "h:1")
