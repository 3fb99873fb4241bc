"""The real servers that discovery is tested against: etcd and dnsmasq, each in a process.

They listen on loopback ports that were free a moment before; one that another process took in the
meantime is given up and another is tried.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_S = 20.0
TRIES = 5


def program(name: str) -> str | None:
    """Return the path of a server's program; system folders are not on every PATH."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(name, path=f"{path}:/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A process, started where it listens and ended for certain."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self, command: Sequence[str], ready: Callable[[], bool]) -> bool:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        return self.wait_ready(ready)

    def wait_ready(self, ready: Callable[[], bool] | None = None) -> bool:
        """Wait until the server answers; one that does not is stopped."""
        ready = ready or self._is_ready
        end = time.monotonic() + START_S
        while self._process is not None and time.monotonic() < end:
            if self._process.poll() is not None:
                break
            if ready():
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def _is_ready(self) -> bool:
        raise NotImplementedError

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None


class EtcdServer(Server):
    """One member of an etcd cluster; at first its only one."""

    def __init__(self, folder: Path, name: str = "one") -> None:
        super().__init__(folder)
        self.name = name
        self.port, self._peer_port = free_port(), free_port()
        self.cluster = self.named

    @classmethod
    def begin(cls, folder: Path) -> EtcdServer:
        """Start a cluster of one."""
        for _ in range(TRIES):
            server = cls(folder)
            if server.start():
                return server
        raise AssertionError(f"etcd did not start:\n{(folder / 'log').read_text()[-4000:]}")

    @classmethod
    def begin_three(cls, folder: Path) -> list[EtcdServer]:
        """Start a cluster of three."""
        servers: list[EtcdServer] = []
        for turn in range(TRIES):
            servers = [cls(folder / f"{turn}-{name}", name) for name in ("one", "two", "three")]
            for member in servers:
                member.folder.mkdir()
                member.cluster = ",".join(each.named for each in servers)
            # Only together do they become healthy.
            for each in servers:
                each.start(wait=False)
            if all(each.wait_ready() for each in servers):
                return servers
            for each in servers:
                each.stop()
        raise AssertionError(f"etcd did not start:\n{servers[0].log()}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def named(self) -> str:
        return f"{self.name}=http://127.0.0.1:{self._peer_port}"

    def start(self, *, wait: bool = True) -> bool:
        """Start at the same ports; with its data, where it was not forgotten."""
        client, peer = f"http://{self.address}", f"http://127.0.0.1:{self._peer_port}"
        return self._start(
            [
                program("etcd") or "etcd",
                f"--name={self.name}",
                f"--data-dir={self.folder / 'data'}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster={self.cluster}",
                "--heartbeat-interval=50",
                "--election-timeout=500",
            ],
            self._is_ready if wait else lambda: True,
        )

    def restart(self, *, forget: bool = False) -> None:
        self.stop()
        if forget:
            shutil.rmtree(self.folder / "data")
        assert self.start(), self.log()

    def _is_ready(self) -> bool:
        import httpx

        try:
            answer = httpx.get(f"http://{self.address}/health", timeout=1, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.json().get("health") in ("true", True)


class DnsServer(Server):
    """A dnsmasq that knows what it is told and asks nobody."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = 0
        self.hosts = folder / "hosts"
        self.hosts.write_text("")
        for _ in range(TRIES):
            self.port = free_port()
            if self.start():
                return
        raise AssertionError(f"dnsmasq did not start:\n{self.log()}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, *options: str) -> bool:
        """Start at the same port, with more options such as ``--srv-host=...``."""
        return self._start(
            [
                program("dnsmasq") or "dnsmasq",
                "--no-daemon",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--no-poll",
                "--user=" + _user(),
                "--group=",
                "--pid-file=",
                "--listen-address=127.0.0.1",
                "--bind-interfaces",
                f"--port={self.port}",
                "--local=/test/",  # NXDOMAIN for what it does not know there, REFUSED elsewhere
                "--address=/ready.invalid/127.0.0.1",
                f"--addn-hosts={self.hosts}",
                *options,
            ],
            self._is_ready,
        )

    def restart(self, *options: str) -> None:
        self.stop()
        assert self.start(*options), self.log()

    def tell(self, *lines: str) -> None:
        """Replace the addresses, lines as of /etc/hosts; the server reads them at once."""
        self.hosts.write_text("".join(f"{line}\n" for line in lines))
        self.signal(signal.SIGHUP)

    def _is_ready(self) -> bool:
        import dns.exception
        import dns.message
        import dns.query

        try:
            dns.query.udp(
                dns.message.make_query("ready.invalid", "A"),
                "127.0.0.1",
                timeout=0.5,
                port=self.port,
            )
        except (dns.exception.DNSException, OSError):
            return False
        return True


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name
