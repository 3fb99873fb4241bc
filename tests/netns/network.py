"""Network namespaces, one for each node, on one bridge; links between them are cut and healed.

::

    hub namespace:   bridge kc0 ──┬── veth ── eth0 10.99.7.1 in node namespace 0
                                  ├── veth ── eth0 10.99.7.2                   1
                                  └── veth ── eth0 10.99.7.3                   2

The bridge has a namespace of its own, so nothing here touches the host's network. A link between
two nodes is cut as a bad switch cuts it, silently: each gets a neighbour entry for the other with
a hardware address that nobody has, so packets leave and never arrive, open connections stand, and
no error comes back. (Needs neither iptables nor netem.) A node that is unplugged has the bridge's
end of its link down. Whoever runs in a namespace reaches Unix sockets and files as before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from typing import Self

NOBODY = "02:00:00:00:00:ff"
SUBNET = "10.99.7"
COMMAND_S = 10.0


class NetworkRefusedError(Exception):
    """Namespaces cannot be made here; says why."""


class Network:
    """So many namespaces; a context manager that removes them and whatever runs in them."""

    def __init__(self, count: int) -> None:
        name = f"kct{os.getpid()}-{time.monotonic_ns() % 1_000_000}"
        self.hub = f"{name}-hub"
        self.names = [f"{name}-{number}" for number in range(count)]
        self.hosts = [f"{SUBNET}.{number + 1}" for number in range(count)]
        self._made: list[str] = []

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise NetworkRefusedError("needs root to make network namespaces")
        if shutil.which("ip") is None:
            raise NetworkRefusedError("there is no ip command (Debian: iproute2)")
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        self._add(self.hub)
        _ip("-n", self.hub, "link", "add", "kc0", "type", "bridge")
        _ip("-n", self.hub, "link", "set", "kc0", "up")
        for number, (name, host) in enumerate(zip(self.names, self.hosts, strict=True)):
            self._add(name)
            hub_end = f"to{number}"
            _ip(
                *("-n", self.hub, "link", "add", hub_end, "type", "veth"),
                *("peer", "name", "eth0", "netns", name),
            )
            _ip("-n", self.hub, "link", "set", hub_end, "master", "kc0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "address", "add", f"{host}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)

    def __exit__(self, *error: object) -> None:
        for name in reversed(self._made):
            with contextlib.suppress(NetworkRefusedError):
                for pid in _ip("netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(NetworkRefusedError):
                _ip("netns", "delete", name)
        self._made = []

    def prefix(self, number: int) -> tuple[str, ...]:
        """Return the command that runs another in a node's namespace."""
        return ("ip", "netns", "exec", self.names[number])

    # -- links ------------------------------------------------------------------------------------

    def cut(self, one: int, other: int) -> None:
        """Let nothing pass between two nodes, in both directions."""
        self.cut_way(one, other)
        self.cut_way(other, one)

    def cut_way(self, sender: int, receiver: int) -> None:
        """Let nothing pass from one node to another; the other way stays open."""
        _ip(
            *("-n", self.names[sender], "neighbour", "replace", self.hosts[receiver]),
            *("lladdr", NOBODY, "dev", "eth0", "nud", "permanent"),
        )

    def heal(self, one: int, other: int) -> None:
        """Let two nodes reach each other again."""
        for sender, receiver in ((one, other), (other, one)):
            with contextlib.suppress(NetworkRefusedError):  # that way was not cut
                _ip(
                    *("-n", self.names[sender], "neighbour", "delete", self.hosts[receiver]),
                    *("dev", "eth0"),
                )

    def isolate(self, number: int) -> None:
        """Cut a node from all others."""
        for other in range(len(self.names)):
            if other != number:
                self.cut(number, other)

    def rejoin(self, number: int) -> None:
        """Heal all links of a node."""
        for other in range(len(self.names)):
            if other != number:
                self.heal(number, other)

    def unplug(self, number: int) -> None:
        """Take the node's link down at the bridge."""
        _ip("-n", self.hub, "link", "set", f"to{number}", "down")

    def plug(self, number: int) -> None:
        """Bring the node's link up again."""
        _ip("-n", self.hub, "link", "set", f"to{number}", "up")

    def reaches(self, sender: int, receiver: int, port: int, timeout_s: float = 0.5) -> bool:
        """Tell whether a TCP connection from one node to a port of another comes about."""
        script = (
            "import socket, sys\n"
            "socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))"
        )
        done = subprocess.run(
            [
                *(*self.prefix(sender), "/usr/bin/env", "python3", "-c", script),
                *(self.hosts[receiver], str(port), str(timeout_s)),
            ],
            check=False,
            capture_output=True,
            timeout=COMMAND_S,
        )
        return done.returncode == 0


def _ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], check=False, capture_output=True, text=True, timeout=COMMAND_S
    )
    if done.returncode:
        raise NetworkRefusedError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
