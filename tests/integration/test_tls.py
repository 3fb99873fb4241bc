"""Whole nodes over TLS: gRPC, HTTP, reloads, and what is refused at the start."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kamacache
from kamacache.rundir.live import SecurityFiles
from kamacache.rundir.roster import read_roster
from tests.node_process import ROOT, NodeProcess
from tests.pki import Pki, changed, expiry_of, flags, serial_at, serial_of, spoil
from tests.scraping import fresh

WaitUntil = Callable[..., None]
GROUP = ("--group", "scores:1MiB", "--workers", "1", "--warm-restart-max-downtime", "0")


class SecureNode:
    """A node with TLS on both its ports."""

    def __init__(self, pki: Pki, files: SecurityFiles, process: NodeProcess) -> None:
        self.pki = pki
        self.files = files
        self.process = process
        match = process.await_ready()
        self.listen = match["listen"]
        self.api = str(process.description().api)

    def client(self, own: SecurityFiles | None = None) -> kamacache.Client:
        """Return a client that trusts the CA."""
        own = own or SecurityFiles()
        return kamacache.Client(
            [self.listen], tls_ca=self.pki.ca_path, tls_cert=own.tls_cert, tls_key=own.tls_key
        )

    def serials(self) -> set[int]:
        """Return what new handshakes with gRPC and HTTP show."""
        context = self.pki.client_context
        return {serial_at(self.listen, context(), "h2"), serial_at(self.api, context())}

    def outcomes(self) -> tuple[int, int]:
        """Return how many reloads were taken, and refused."""
        roster = read_roster(self.process.description().sockets_dir)
        return roster.reloads, roster.reloads_refused

    def expiry(self) -> float:
        """Return what the metrics say of the certificate."""
        told = fresh(self.process.run_dir)
        return told["kamacache_tls_certificate_expiry_timestamp_seconds"]

    def hang_up(self, wait_until: WaitUntil) -> None:
        """Have it reload, and wait for what comes of it."""
        before = self.outcomes()
        self.process.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.outcomes() != before)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="kc-tls-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def secure(folder: Path) -> Iterator[SecureNode]:
    """A node with TLS for all tests of the module."""
    pki = Pki(folder)
    files = pki.issue("127.0.0.1")
    ports = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
    with NodeProcess(folder / "run", *GROUP, *ports, *flags(files)) as process:
        yield SecureNode(pki, files, process)
        assert process.stop() == 0


def request(address: str, context: ssl.SSLContext, path: str = "/healthz") -> int:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def test_both_ports_speak_tls_and_nothing_else(secure: SecureNode, folder: Path) -> None:
    with secure.client() as client:
        client.set("scores", "Tom", b"630")
        assert client.get("scores", "Tom") == b"630"
    assert request(secure.api, secure.pki.client_context(), "/api?key=Tom") == 200
    with (
        kamacache.Client([secure.listen]) as plain,
        pytest.raises(kamacache.NodeUnavailableError, match="tls_ca"),
    ):
        plain.get("scores", "Tom")
    (folder / "other").mkdir()
    stranger = Pki(folder / "other")
    with (
        kamacache.Client([secure.listen], tls_ca=stranger.ca_path) as strange,
        pytest.raises(kamacache.NodeUnavailableError, match="trusted"),
    ):
        strange.get("scores", "Tom")
    with pytest.raises(ssl.SSLCertVerificationError):
        request(secure.api, stranger.client_context())
    host, _, port = secure.api.rpartition(":")
    clear = http.client.HTTPConnection(host, int(port), timeout=10)
    with contextlib.closing(clear):
        clear.request("GET", "/healthz")
        with pytest.raises((http.client.HTTPException, OSError)):
            clear.getresponse()


def test_a_request_in_one_packet_with_the_end_of_the_handshake_is_answered(
    secure: SecureNode,
) -> None:
    host, _, port = secure.api.rpartition(":")
    for _ in range(20):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = secure.pki.client_context().wrap_bio(incoming, outgoing, server_hostname=host)
        with socket.create_connection((host, int(port)), 10) as raw:
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    raw.sendall(outgoing.read())
                    incoming.write(raw.recv(1 << 16))
            client.write(b"GET /healthz HTTP/1.1\r\nhost: node\r\n\r\n")
            raw.sendall(outgoing.read())
            answer = b""
            while b"alive" not in answer:
                try:
                    answer += client.read(1 << 16)
                except ssl.SSLWantReadError:
                    data = raw.recv(1 << 16)
                    assert data, answer
                    incoming.write(data)


def test_a_reload_is_for_new_handshakes_and_a_bad_file_changes_nothing(
    secure: SecureNode, wait_until: WaitUntil
) -> None:
    host, _, port = secure.api.rpartition(":")
    kept = http.client.HTTPSConnection(
        host, int(port), context=secure.pki.client_context(), timeout=10
    )
    with secure.client() as client, contextlib.closing(kept):
        client.set("scores", "Jack", b"589")
        kept.request("GET", "/healthz")
        kept.getresponse().read()
        before = serial_of(secure.files)
        assert secure.serials() == {before}
        assert secure.expiry() == expiry_of(secure.files)
        secure.pki.issue("127.0.0.1", days=20)
        expiry = expiry_of(secure.files)
        after = serial_of(secure.files)
        secure.hang_up(wait_until)
        wait_until(lambda: secure.serials() == {after})
        wait_until(lambda: secure.expiry() == expiry)

        spoil(secure.files)
        refused = secure.outcomes()[1]
        secure.hang_up(wait_until)
        assert secure.outcomes()[1] > refused
        assert secure.expiry() == expiry
        assert "holds no" in secure.process.log or "cannot be used" in secure.process.log
        assert secure.serials() == {after}
        assert client.get("scores", "Jack") == b"589"
        kept.request("GET", "/healthz")
        assert kept.getresponse().status == 200

        # A role that comes back meanwhile serves with what was good last.
        for title in ("front 0", "http 0"):
            role = secure.process.role(title)
            assert role is not None
            role.kill()
            role.wait(10)
        deadline_s = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                # That of the start: the roles are forked with what the supervisor has checked.
                assert secure.serials() == {after}
                break
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert secure.expiry() == expiry
    secure.pki.issue("127.0.0.1")
    secure.hang_up(wait_until)


def test_a_client_that_is_slow_to_shake_hands_holds_up_nobody(secure: SecureNode) -> None:
    slow = []
    for address in (secure.listen, secure.api):
        host, _, port = address.rpartition(":")
        for _ in range(20):
            slow.append(socket.create_connection((host, int(port)), 10))
            slow[-1].sendall(b"\x16\x03\x01\x02")
    try:
        with secure.client() as client:
            client.set("scores", "Sam", b"567")
            assert client.get("scores", "Sam") == b"567"
        assert request(secure.api, secure.pki.client_context()) == 200
    finally:
        for connection in slow:
            connection.close()


def test_where_clients_need_a_certificate_both_ports_demand_it(folder: Path) -> None:
    place = folder / "mutual"
    place.mkdir()
    pki = Pki(place)
    files = changed(pki.issue("127.0.0.1", days=3.5), tls_client_ca=pki.ca_path)
    own = pki.issue("client", file="client")
    ports = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
    with NodeProcess(place / "run", *GROUP, *ports, *flags(files)) as process:
        node = SecureNode(pki, files, process)
        with node.client(own) as client:
            client.set("scores", "Tom", b"630")
            assert client.get("scores", "Tom") == b"630"
        assert request(node.api, pki.client_context(own)) == 200
        with (
            node.client() as client,
            pytest.raises(kamacache.NodeUnavailableError, match="client certificate"),
        ):
            client.get("scores", "Tom")
        with pytest.raises((OSError, http.client.HTTPException)):
            request(node.api, pki.client_context())
        assert process.log.count("the certificate expires in 3 days") == 1
        assert process.stop() == 0


def test_files_that_cannot_work_end_the_start_with_78(folder: Path) -> None:
    place = folder / "bad"
    place.mkdir()
    pki = Pki(place)
    expired = pki.issue("127.0.0.1", file="expired", days=-1)
    good = pki.issue("127.0.0.1")
    command = [sys.executable, "-m", "kamacache.cli.node", "--run-dir", str(place / "run"), *GROUP]
    for given, words in (
        (flags(expired), "has expired"),
        (["--tls-cert", str(good.tls_cert)], "--tls-key"),
        (["--listen", "0.0.0.0:1", "--advertise", "a:1"], "--tls-cert"),
    ):
        done = subprocess.run(
            [*command, *given],
            check=False,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 78, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


EMBEDDED = """
import sys, http.client, ssl, kamacache
cert, key, ca = sys.argv[1:]
group = kamacache.Group("scores", cache_bytes="1MiB", getter=lambda key: key.upper().encode())
with kamacache.Node("127.0.0.1:0", api="127.0.0.1:0", workers=1, groups=[group],
                    tls_cert=cert, tls_key=key) as node:
    assert group.get("tom") == b"TOM"
    context = ssl.create_default_context(cafile=ca)
    host, _, port = node.api.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
    connection.request("GET", "/api?key=tom")
    assert connection.getresponse().read() == b"TOM"
    connection.close()
    assert "grpc" not in sys.modules
    with kamacache.Client([node.listening], tls_ca=ca) as client:
        assert client.get("scores", "tom") == b"TOM"
print("done")
"""


def test_an_embedded_node_serves_over_tls(folder: Path) -> None:
    place = folder / "embedded"
    place.mkdir()
    pki = Pki(place)
    files = pki.issue("127.0.0.1")
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED, str(files.tls_cert), str(files.tls_key), pki.ca_path],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "done\n", done.stderr
