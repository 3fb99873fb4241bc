"""Two real nodes with tokens and a peer secret: who gets in, what a reload changes, what is told.

The nodes log at level debug. The last test looks for every secret, and what stands for one, in all
that the nodes wrote and are: logs, files, titles and environments of their processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import kamacache
from kamacache.cluster.link import LinkEnd, PeerLink
from kamacache.cluster.proving import Trust
from kamacache.errors import AccessDeniedError
from kamacache.limits import PEER_RENEW_S
from kamacache.security.peer_secret import PeerSecrets
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.cluster_nodes import Cluster, ClusterNode, clusters
from tests.scraping import fresh

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]

WAIT_S = 20.0
READ, ALL, GONE = (f"{name}-Secret-of-a-client-4711" for name in ("read", "all", "gone"))
PEERS, NEXT, WRONG = (f"{name}-Secret-of-the-nodes-0815" for name in ("old", "next", "wrong"))
GUESS = "Guess-of-somebody-who-is-unknown"
SECRETS = (READ, ALL, GONE, PEERS, NEXT, WRONG, GUESS)


def token(name: str, secret: str, *more: str) -> str:
    return "\n".join(("[[token]]", f'name = "{name}"', f'secret = "{secret}"', *more, "\n"))


TOKENS = token("reader", READ, 'read = ["scores"]') + token(
    "all", ALL, 'read = ["*"]', 'write = ["*"]', "stats = true"
)


class Secured:
    """The nodes, and the files of their secrets."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.tokens, self.secret = folder / "tokens.toml", folder / "peer-secret"
        for path in (self.tokens, self.secret):
            path.touch(mode=0o600)
        self.tokens.write_text(TOKENS + token("gone", GONE, 'read = ["scores"]'))
        self.secret.write_text(PEERS)
        ports = iter(_free_ports(len(cluster.nodes)))
        for node in cluster.nodes:
            api = f"127.0.0.1:{next(ports)}"
            node.arguments += (
                *("--tokens", str(self.tokens), "--peer-secret", str(self.secret)),
                *("--log-level", "debug", "--api", api),
            )
            self.apis = {**getattr(self, "apis", {}), node.address: api}

    def get(self, node: ClusterNode, path: str, authorization: str | None = None) -> int:
        """Return the status of a GET over HTTP."""
        request = urllib.request.Request(f"http://{self.apis[node.address]}{path}")
        if authorization is not None:
            request.add_header("authorization", authorization)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def reload(self, what: str) -> None:
        """Have all nodes reload, and wait until they say that it was taken, or refused."""
        before = {node.address: node.log.count(what) for node in self.cluster.nodes}
        for node in self.cluster.nodes:
            assert node.process is not None
            node.process.process.send_signal(signal.SIGHUP)
        for node in self.cluster.nodes:
            until(partial(_says_more, node, what, before[node.address]))


def _says_more(node: ClusterNode, what: str, count: int) -> bool:
    return node.log.count(what) > count


def _is_linked(node: ClusterNode) -> bool:
    return bool(node.group().stats()["peers_up"] == 1)


def _free_ports(count: int) -> list[int]:
    from tests.cluster_nodes import _ports

    return _ports(count)


def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, "not within the deadline"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def secured(shm_root: Path, environment: None) -> Iterator[Secured]:
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    try:
        with clusters(shm_root, folder) as make:
            found = Secured(make(2, workers=1), folder)
            found.cluster.start()
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def node(secured: Secured) -> ClusterNode:
    return secured.cluster.nodes[0]


def ask(node: ClusterNode, secret: str | None, channel: grpc.Channel | None = None) -> Any:
    """Return the status of a get."""
    metadata = [] if secret is None else [("authorization", f"Bearer {secret}")]
    opened = channel or grpc.insecure_channel(node.address)
    try:
        request = pb.GetRequest(group="scores", key=b"k")
        CacheStub(opened).Get(request, metadata=metadata, timeout=WAIT_S)
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()
    finally:
        if channel is None:
            opened.close()


def denied(node: ClusterNode, method: str, code: str) -> float:
    """Return how many calls ended with a status, as the metrics tell it."""
    return fresh(node.run_dir).of("kamacache_grpc_requests_total", method=method, code=code)


def test_a_client_with_a_token_does_what_it_may_on_either_node(
    secured: Secured, wait_until: WaitUntil
) -> None:
    for number, node in enumerate(secured.cluster.nodes, 1):
        with kamacache.Client([node.address], token=ALL) as client:
            scores = client.group("scores")
            scores.set("written", b"v")
            assert scores.get("written") == b"v"
        with kamacache.Client([node.address], token=READ) as client:
            assert client.group("scores").get("written") == b"v"
            with pytest.raises(AccessDeniedError) as caught:
                client.group("scores").set("written", b"w")
            assert caught.value.token == "reader"
        for secret in (None, GUESS):
            assert ask(node, secret) is grpc.StatusCode.UNAUTHENTICATED
        # A call is counted when its answer is on its way.
        # By the key's owner, once the client has heard who that is.
        wait_until(
            lambda number=number: (
                sum(denied(each, "Set", "PERMISSION_DENIED") for each in secured.cluster.nodes)
                == number
            )
        )
        wait_until(lambda node=node: denied(node, "Get", "UNAUTHENTICATED") >= 2)


def test_http_wants_a_token_and_the_probes_do_not(secured: Secured, node: ClusterNode) -> None:
    basic = "Basic " + b64encode(f"x:{READ}".encode()).decode()
    guess = "Basic " + b64encode(f"x:{GUESS}".encode()).decode()
    api = "/api?group=scores&key=k"
    assert [secured.get(node, path) for path in ("/healthz", "/readyz")] == [200, 200]
    assert [secured.get(node, path) for path in (api, "/metrics", "/")] == [401, 401, 401]
    assert secured.get(node, api, guess) == 401
    assert secured.get(node, api, basic) == 200
    assert secured.get(node, "/metrics", f"Bearer {READ}") == 403
    assert secured.get(node, "/metrics", f"Bearer {ALL}") == 200
    told, requests = fresh(node.run_dir), "kamacache_http_requests_total"
    assert told.of(requests, handler="api", code="401") == 2
    assert told.of(requests, handler="metrics", code="403") == 1


async def test_a_token_opens_no_link_of_a_node_and_another_secret_neither(
    secured: Secured, node: ClusterNode
) -> None:
    for secrets in (None, PeerSecrets([WRONG]), PeerSecrets([READ])):
        link = PeerLink(
            node.address,
            LinkEnd("127.0.0.9:1", "strange life", 0, Trust(secrets)),
            asyncio.get_running_loop(),
            clock=lambda: 1,
            on_change=lambda link: None,
        )
        link.start()
        try:
            await asyncio.wait_for(link.wait_settled(), WAIT_S)
            assert not link.up
        finally:
            await link.close()
    async with grpc.aio.insecure_channel(node.address) as channel:
        call: Any = channel.stream_stream("/kamacache.v1.Peers/Link")(
            metadata=(("authorization", f"Bearer {READ}"), ("kamacache-peer", PEERS))
        )
        await call.write(b"\x0a\x01x")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    until(lambda: "a link of a node with another peer secret was refused" in node.log)
    assert "a link of a node without the peers' secret was refused" in node.log


def test_a_removed_token_ends_with_the_next_call_of_a_connection_that_stands(
    secured: Secured, node: ClusterNode
) -> None:
    with grpc.insecure_channel(node.address) as channel:
        assert ask(node, GONE, channel) is grpc.StatusCode.OK
        secured.tokens.write_text(f'[[token]]\nname = "bad"\nsecret = "{WRONG}')
        secured.reload("refused")
        assert ask(node, GONE, channel) is grpc.StatusCode.OK
        secured.tokens.write_text(TOKENS)
        secured.reload("reloaded")
        until(lambda: ask(node, GONE, channel) is grpc.StatusCode.UNAUTHENTICATED)
        assert ask(node, READ, channel) is grpc.StatusCode.OK


def test_the_peers_secret_changes_and_no_link_goes_down(secured: Secured) -> None:
    nodes = secured.cluster.nodes
    before = [len(node.log) for node in nodes]
    for text in (f"{PEERS}\n{NEXT}\n", f"{NEXT}\n{PEERS}\n", f"{NEXT}\n"):
        secured.secret.write_text(f"{text}{WRONG[:15]}\n")  # one line is too short
        secured.reload("refused")
        secured.secret.write_text(text)
        secured.reload("reloaded")
    # Links that know only a line that is gone would end after this.
    until_s = time.monotonic() + PEER_RENEW_S + 0.3
    while time.monotonic() < until_s:
        for number, node in enumerate(nodes):
            assert node.group().get(f"rotation-{number}-{time.monotonic_ns()}") is not None
        time.sleep(0.05)
    for node, start in zip(nodes, before, strict=True):
        said = node.log[start:].splitlines()
        assert not [line for line in said if "a peer link was ended" in line]
        down = [line for line in said if "the link to a peer is down" in line]
        # On a machine that stands still a link may fall silent, whatever its secret is.
        assert not [line for line in down if "nothing was heard" not in line]
        until(partial(_is_linked, node))


def traces(secret: str) -> list[bytes]:
    """Return a secret, and what stands for it or has a part of it."""
    digest = hashlib.sha256(secret.encode()).digest()
    plain = secret.encode()
    return [
        *(plain, plain[:12], b64encode(plain), b64encode(b"x:" + plain), plain.hex().encode()),
        *(digest.hex().encode(), b64encode(digest), repr(digest).encode()[2:-1]),
    ]


def test_no_secret_is_in_what_the_nodes_wrote_or_are(secured: Secured) -> None:
    """Runs last: all failures have happened."""
    found: dict[str, bytes] = {}
    for node in secured.cluster.nodes:
        found[f"{node.address} log"] = node.log.encode()
        assert "debug" in node.log
        for path in node.run_dir.rglob("*"):
            if path.is_file():
                found[str(path)] = path.read_bytes()
        for pid in node.pids():
            process = psutil.Process(pid)
            found[f"{pid} title"] = "\0".join(process.cmdline()).encode()
            found[f"{pid} environment"] = repr(process.environ()).encode()
    names = {Path(name).name for name in found}
    assert {"node.json", "live.json", "roster.json"} <= names
    assert any("refused" in text.decode(errors="replace") for text in found.values())
    for name, text in found.items():
        for secret in SECRETS:
            for trace in traces(secret):
                assert trace not in text, f"{name} has a trace of {secret.split('-')[0]}"
