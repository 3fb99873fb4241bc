"""The demo app of `make run`: a group whose getter reads rows of a real SQLite file.

Process: each worker of the node, and whoever attaches with this group as fallback. Run by
`kamacache-node --app scripts.demo_app:people` (the node puts the current folder on sys.path).
The file is named by KAMACACHE_DEMO_DB, by default .demo/people.sqlite3; scripts/run_demo.py
makes it. Key: the row's number, as text. Value: the row as JSON.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading

import kamacache

DATABASE = os.environ.get("KAMACACHE_DEMO_DB", ".demo/people.sqlite3")

# sqlite3 objects belong to the thread that made them, and must not cross a fork: one connection
# for each getter thread, opened at its first load, which in a node is after the worker's fork.
_local = threading.local()


def _connection() -> sqlite3.Connection:
    """Return this thread's read-only connection in this process."""
    if getattr(_local, "pid", None) != os.getpid():
        uri = f"file:{os.path.abspath(DATABASE)}?mode=ro"
        _local.connection = sqlite3.connect(uri, uri=True)
        _local.pid = os.getpid()
    connection: sqlite3.Connection = _local.connection
    return connection


def check_database() -> None:
    """Fail at the worker's start, not at the first request, when the file is missing."""
    (rows,) = _connection().execute("SELECT count(*) FROM people").fetchone()
    if not rows:
        raise RuntimeError(f"{DATABASE} has no rows; scripts/run_demo.py makes it")


@kamacache.group("people", cache_bytes="64MiB", negative_ttl=5, on_worker_start=check_database)
def people(key: str) -> bytes:
    """Return the row with this number as JSON; KeyError where there is none."""
    if not key.isascii() or not key.isdigit():
        raise KeyError(key)
    row = (
        _connection()
        .execute("SELECT id, name, city, score FROM people WHERE id = ?", (int(key),))
        .fetchone()
    )
    if row is None:
        raise KeyError(key)
    return json.dumps(dict(zip(("id", "name", "city", "score"), row, strict=True))).encode()
