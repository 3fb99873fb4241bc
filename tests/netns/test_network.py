"""The network of the partition tests itself: cuts are silent, one way or both, and heal."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.netns.network import Network

pytestmark = pytest.mark.integration

PORT = 4_242
SERVER = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    connection.close()
"""


@contextlib.contextmanager
def serving(network: Network, number: int) -> Iterator[None]:
    command = [*network.prefix(number), "python3", "-c", SERVER, str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()


def test_links_are_cut_and_healed_one_by_one(network: Network) -> None:
    with serving(network, 1):
        assert network.reaches(0, 1, PORT)
        assert network.reaches(2, 1, PORT)
        network.cut(0, 1)
        began_s = time.monotonic()
        assert not network.reaches(0, 1, PORT)
        assert time.monotonic() - began_s >= 0.5  # silence, no refusal
        assert network.reaches(2, 1, PORT)
        network.heal(0, 1)
        assert network.reaches(0, 1, PORT)
        network.cut_way(1, 0)
        assert not network.reaches(0, 1, PORT)
        assert network.reaches(2, 1, PORT)
        network.heal(0, 1)
        network.isolate(1)
        assert not network.reaches(0, 1, PORT)
        assert not network.reaches(2, 1, PORT)
        network.rejoin(1)
        assert network.reaches(0, 1, PORT)
        assert network.reaches(2, 1, PORT)


def test_a_node_is_unplugged_and_plugged(network: Network) -> None:
    with serving(network, 1):
        network.unplug(1)
        assert not network.reaches(0, 1, PORT)
        network.plug(1)
        assert network.reaches(0, 1, PORT, timeout_s=5)


def test_nothing_is_left_behind() -> None:
    network = Network(2)
    try:
        network.__enter__()
    except Exception as error:
        pytest.skip(str(error))
    command = [*network.prefix(0), "sh", "-c", "echo ready; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        network.__exit__()
        assert running.wait(5) == -9
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert network.hub.rpartition("-")[0] not in listed.stdout
