"""Every role killed in every order, under processes that read, write and load all the while."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.node_process import ROOT, NodeProcess, end_all, files_below, is_alive
from tests.stress.kills_client import TIMEOUT_S

pytestmark = [pytest.mark.stress, pytest.mark.integration, pytest.mark.timeout(1200)]

WaitUntil = Callable[..., None]
ROLES = ("worker 0", "worker 1", "front 0", "supervisor")
CLIENTS = ("error", "error", "getter", "getter")
SHORT_S = 10.0
SHORT_NODES = 6  # at least, on a machine that is busy
FULL_ROUNDS = 4
BUSY_S = 2.0  # what a machine with other work may add to a deadline

APP = """
import kamacache

def load(key):
    if key.startswith("nest-"):
        return b"nested " + deep.get("deep-" + key)
    return b"loaded " + key.encode()

scores = kamacache.Group("scores", cache_bytes="64MiB", getter=load)
deep = kamacache.Group("deep", cache_bytes="8MiB", getter=load)
groups = [scores, deep]
"""


def turn_of_lives(lives: Path) -> None:
    """Mark a border between two lives of the node; what was written between two is of neither."""
    with lives.open("ab", buffering=0) as file:
        file.write(b".")


def kill_in_order(
    node: NodeProcess, order: tuple[str, ...], draw: random.Random, lives: Path
) -> None:
    for title in order:
        time.sleep(draw.choice((0.0, 0.0, 0.02, 0.3)))  # no synchronisation: what varies
        if title == "supervisor":
            turn_of_lives(lives)
            node.process.kill()
            node.process.wait()
        elif (role := node.role(title)) is not None:
            role.kill()


def test_kill_of_every_role_in_every_order(
    short_dir: Path, shm_root: Path, wait_until: WaitUntil, stress_full: bool
) -> None:
    (short_dir / "kills_app.py").write_text(APP)
    (short_dir / "lives").touch()
    shm = shm_root / short_dir.name
    shm.mkdir()
    run_dir = short_dir / "run"
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201
    draw = random.Random(seed)
    orders = list(itertools.permutations(ROLES)) * (FULL_ROUNDS if stress_full else 1)
    draw.shuffle(orders)
    arguments = ("--workers", "2", "--listen", "127.0.0.1:0", "--app", "kills_app:groups")
    clients = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.stress.kills_client", str(at), str(short_dir), fallback],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "KAMACACHE_RUN_DIR": str(run_dir)},
        )
        for at, fallback in enumerate(CLIENTS)
    ]
    roles: set[psutil.Process] = set()
    try:
        end_s = time.monotonic() + SHORT_S
        killed = 0
        for order in orders:
            with NodeProcess(run_dir, *arguments, "--shm-dir", str(shm), cwd=short_dir) as node:
                node.await_ready()
                begun = node.children()
                roles.update(begun)
                kill_in_order(node, order, draw, short_dir / "lives")
                roles.update(node.children())
                wait_until(
                    lambda begun=begun: not any(map(is_alive, begun)), 3.0, "roles outlive the node"
                )
                # Not sooner: a worker may acknowledge a write after its supervisor's death.
                turn_of_lives(short_dir / "lives")
            killed += 1
            assert all(client.poll() is None for client in clients)
            if not stress_full and killed >= SHORT_NODES and time.monotonic() > end_s:
                break
        with NodeProcess(run_dir, *arguments, "--shm-dir", str(shm), cwd=short_dir) as node:
            node.await_ready()
            (short_dir / "stop").touch()
            found = [json.loads(client.communicate(timeout=30)[0]) for client in clients]
            assert node.stop() == 0
        print(killed, "nodes killed;", found)  # noqa: T201
        for one in found:
            assert one["wrong"] == []
            assert one["slowest_s"] < TIMEOUT_S + BUSY_S
            assert one["calls"] > 100
        assert files_below(run_dir, shm) == []
        assert not any(is_alive(role) for role in roles)
    finally:
        for client in clients:
            client.kill()
            client.wait()
            if client.stdout is not None:
                client.stdout.close()
        end_all(roles)
        shutil.rmtree(shm, ignore_errors=True)
