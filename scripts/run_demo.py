#!/usr/bin/env python3
"""`make run`: make the demo's SQLite file once, say what to try, become `kamacache-node`.

Process: this one makes the file and then execs the node, so that Ctrl-C and TERM reach the node's
supervisor itself. The file is written beside its place and renamed: an interrupted run leaves
no half of it, and two runs at once do no harm.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = 100_000
FIRST = "Ada Alan Barbara Claude Edsger Frances Grace John Ken Margaret Niklaus Radia Tim Tom"
LAST = "Allen Dijkstra Hamilton Hopper Jack Knuth Liskov Perlman Ritchie Shannon Thompson Turing"
CITIES = "Berlin Bogota Cairo Chengdu Dakar Delhi Lagos Lima Lyon Osaka Oslo Perth Quito Wuhan"


def make_database(path: Path, rows: int = ROWS) -> bool:
    """Make the file with ``rows`` people unless it stands already; return whether it was made."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(2026)  # the same rows on every machine
    first, last, cities = FIRST.split(), LAST.split(), CITIES.split()
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        with closing(sqlite3.connect(name)) as connection:
            connection.execute(
                "CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT, city TEXT, score INTEGER)"
            )
            connection.executemany(
                "INSERT INTO people VALUES (?, ?, ?, ?)",
                (
                    (
                        number,
                        f"{draw.choice(first)} {draw.choice(last)}",
                        draw.choice(cities),
                        draw.randrange(1000),
                    )
                    for number in range(1, rows + 1)
                ),
            )
            connection.commit()
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True


def is_free(address: str) -> bool:
    """Tell whether a port can be listened on; another demo may have it."""
    host, _, port = address.rpartition(":")
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def hints(bin_dir: Path, run_dir: Path, address: str, api: str) -> str:
    """Return the commands to try while the node runs."""
    at = f"--run-dir {run_dir}"
    page = f"  http://{api}/     # the status page, live; and /metrics\n" if api else ""
    return f"""
Try, in another terminal, in {ROOT}:

  {bin_dir}/kamacache get 42 {at}       # loaded from SQLite once, then memory
  {bin_dir}/kamacache set 42 hello {at}
  {bin_dir}/kamacache get 42 --address {address}     # over gRPC
  {bin_dir}/kamacache delete 42 {at}
  {bin_dir}/kamacache stats --watch {at}
  {bin_dir}/kamacache doctor {at}
{page}
  seq 1 100000 | shuf -r -n 200000 > /tmp/trace.txt             # a trace, a key a line
  {bin_dir}/python scripts/replay.py --trace /tmp/trace.txt --attach {run_dir} --processes 2

  KAMACACHE_RUN_DIR={run_dir} {bin_dir}/python -c '
import kamacache
people = kamacache.Group("people", cache_bytes="64MiB")
print(people.get("42")); print(people.stats())'
"""


def main() -> None:
    """Make the file, print the hints, exec the node."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--listen", default="127.0.0.1:8001")
    parser.add_argument("--api", default="127.0.0.1:9999", help="left out where it is taken")
    parser.add_argument("--dir", type=Path, default=ROOT / ".demo", help="data and run directory")
    args = parser.parse_args()
    folder: Path = args.dir.resolve()
    database, run_dir = folder / "people.sqlite3", folder / "run"
    if make_database(database):
        print(f"made {database} with {ROWS:,} rows")
    bin_dir = Path(sys.executable).parent
    node = bin_dir / "kamacache-node"
    if not node.exists():
        sys.exit(f"{node} is missing: run this through `make run`, which installs it")
    api = args.api if is_free(args.api) else ""
    print(hints(bin_dir, run_dir, args.listen, api), flush=True)
    os.chdir(ROOT)
    os.environ["KAMACACHE_DEMO_DB"] = str(database)
    os.execv(
        node,
        [
            str(node),
            f"--workers={args.workers}",
            f"--listen={args.listen}",
            f"--api={api or 'none'}",
            "--app=scripts.demo_app:people",
            f"--run-dir={run_dir}",
            "--warm-restart-max-downtime=0",  # a demo leaves nothing in memory
        ],
    )


if __name__ == "__main__":
    main()
