#!/usr/bin/env python3
"""One of three nodes that are one cache. Start it three times, each in a terminal of its own:

python scripts/quickstart.py --port 8001
python scripts/quickstart.py --port 8002
python scripts/quickstart.py --port 8003 --api
curl "http://localhost:9999/api?key=Tom"
"""

from __future__ import annotations

import argparse

import kamacache

DATABASE = {"Tom": "630", "Jack": "589", "Sam": "567", "Peter": "999"}
PEERS = "127.0.0.1:8001,127.0.0.1:8002,127.0.0.1:8003"


def search(key: str) -> bytes:
    """Load a score. Runs once per key in the whole cluster; KeyError means: no such key."""
    print(f"[SlowDB] Searching for key: {key}", flush=True)
    return DATABASE[key].encode()


scores = kamacache.Group("scores", cache_bytes="16MiB", getter=search)


def main() -> int:
    parser = argparse.ArgumentParser(description="one node of the quick start")
    parser.add_argument("--port", type=int, default=8001, help="one of those in --peers")
    parser.add_argument("--peers", default=PEERS, help="all nodes, this one included")
    parser.add_argument("--api", nargs="?", const="127.0.0.1:9999", help="HTTP on HOST:PORT")
    args = parser.parse_args()
    address = f"127.0.0.1:{args.port}"
    node = kamacache.Node(address, peers=args.peers.split(","), workers=2, api=args.api)
    node.register_group(scores)
    node.start()
    print(f"{address} is up{f', http://{node.api}/api?key=Tom' if node.api else ''}", flush=True)
    return node.run()  # until Ctrl-C or SIGTERM


if __name__ == "__main__":
    raise SystemExit(main())
