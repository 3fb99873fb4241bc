"""A client's token and certificates: with which calls they go, and what is said where they fail."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import kamacache
from kamacache.front.credentials import server_credentials
from kamacache.rundir.live import SecurityFiles
from kamacache.security.certificates import Certificates
from tests.client.conftest import Caller, MakeNodes
from tests.client.fakes import FakeNode
from tests.pki import Pki, changed

TOKEN = "not-so-secret-in-a-test"
WaitUntil = Callable[..., None]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


SecureNode = Callable[..., FakeNode]


@pytest.fixture
def secure_node() -> Iterator[SecureNode]:
    made: list[FakeNode] = []

    def make(files: SecurityFiles) -> FakeNode:
        made.append(FakeNode(credentials=server_credentials(Certificates(files))))
        return made[-1]

    yield make
    for node in made:
        node.stop()


# -- tokens -------------------------------------------------------------------------------------


def test_the_token_goes_with_every_call(caller: Caller, make_nodes: MakeNodes) -> None:
    seen: dict[str, set[object]] = {}
    lock = threading.Lock()

    def note(method: str) -> Callable[[Any, grpc.ServicerContext], None]:
        def script(request: Any, context: grpc.ServicerContext) -> None:
            found = dict(context.invocation_metadata()).get("authorization")
            with lock:
                seen.setdefault(method, set()).add(found)

        return script

    (node,) = make_nodes(1)
    methods = ("Get", "Set", "Delete", "BatchGet", "BatchSet", "BatchDelete", "Stats", "Members")
    node.on = {method: note(method) for method in methods}
    client = caller.client(node.address, token=TOKEN)
    caller(client, "set", "scores", "a", b"1")
    assert caller(client, "get", "scores", "a") == b"1"
    caller(client, "set_many", "scores", {"b": b"2", "c": b"3"})
    assert len(caller(client, "get_many", "scores", ["a", "b"])) == 2
    caller(client, "delete", "scores", "a")
    caller(client, "delete_many", "scores", ["b", "c"])
    caller(client, "stats", "scores")
    assert seen == {method: {f"Bearer {TOKEN}"} for method in methods}


def test_without_a_token_none_is_sent(caller: Caller, make_nodes: MakeNodes) -> None:
    (node,) = make_nodes(1)
    seen: list[object] = []
    node.on = {"Set": lambda _, context: seen.append(dict(context.invocation_metadata()))}
    caller(caller.client(node.address), "set", "scores", "a", b"1")
    assert "authorization" not in seen[0]  # type: ignore[operator]


def test_a_token_does_not_leave_this_host_in_clear(pki: Pki) -> None:
    for seed in ("10.0.0.1:8001", "cache.example:8001", "[fd00::1]:8001"):
        with pytest.raises(kamacache.ConfigError, match="in clear") as caught:
            kamacache.Client([seed], token=TOKEN)
        assert TOKEN not in str(caught.value)
        kamacache.Client([seed])
        kamacache.Client([seed], token=TOKEN, insecure=True)
        kamacache.Client([seed], token=TOKEN, tls_ca=pki.ca_path)
    kamacache.Client(["127.0.0.1:1", "localhost:1", "[::1]:1"], token=TOKEN)


def test_a_member_beyond_this_host_is_not_told_the_token(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    node, other = make_nodes(2, "10.255.255.1:8001")
    client = caller.client(node.address, token=TOKEN)
    for i in range(40):
        caller(client, "set", "scores", f"k{i}", b"1")
    assert node.count("Set") + other.count("Set") == 40
    assert "in clear" in client._nodes.view.nodes["10.255.255.1:8001"].why


@pytest.mark.parametrize("token", ["", "a b", "ü", "x\n", "x" * 4097, 5])
def test_what_is_no_token_is_refused_and_not_repeated(token: Any) -> None:
    with pytest.raises(kamacache.ConfigError, match="printable") as caught:
        kamacache.Client(["127.0.0.1:1"], token=token)
    assert str(token) not in str(caught.value) or len(str(token)) < 2


def test_a_node_that_knows_the_token_not_says_so_in_the_call(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    def deny(request: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")

    (node,) = make_nodes(1)
    node.on = {"Get": deny, "Members": deny}
    client = caller.client(node.address, token=TOKEN)
    for _ in range(3):
        with pytest.raises(kamacache.KamaCacheError) as caught:
            caller(client, "get", "scores", "a")
        assert not isinstance(caught.value, kamacache.NodeUnavailableError)
        assert TOKEN not in str(caught.value)


# -- TLS ----------------------------------------------------------------------------------------


def test_calls_go_over_tls(caller: Caller, pki: Pki, secure_node: SecureNode) -> None:
    node = secure_node(pki.issue("127.0.0.1"))
    client = caller.client(node.address, tls_ca=pki.ca_path, token=TOKEN)
    caller(client, "set", "scores", "a", b"1")
    assert caller(client, "get", "scores", "a") == b"1"
    assert caller(client, "get_many", "scores", ["a", "b"]) == {"a": b"1"}


def why(caller: Caller, *seeds: str, **access: Any) -> str:
    with pytest.raises(kamacache.NodeUnavailableError) as caught:
        caller(caller.client(*seeds, **access), "get", "scores", "a")
    return str(caught.value)


def test_what_is_wrong_with_a_connection_is_told(
    caller: Caller, pki: Pki, secure_node: SecureNode, make_nodes: MakeNodes, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Pki(tmp_path / "other")
    node = secure_node(pki.issue("127.0.0.1"))
    assert "comes from none of those that are trusted" in why(
        caller, node.address, tls_ca=stranger.ca_path
    )
    assert "if it speaks TLS, tls_ca is needed" in why(caller, node.address)
    named = secure_node(pki.issue("other.example", file="named"))
    assert "not for the name" in why(caller, named.address, tls_ca=pki.ca_path)
    plain = make_nodes(1)[0]
    assert "does not speak TLS" in why(caller, plain.address, tls_ca=pki.ca_path)
    plain.stop()
    assert "Connection refused" in why(caller, plain.address, tls_ca=pki.ca_path)


def test_a_node_that_demands_a_certificate_is_shown_one(
    caller: Caller, pki: Pki, secure_node: SecureNode
) -> None:
    node = secure_node(changed(pki.issue("127.0.0.1"), tls_client_ca=pki.ca_path))
    assert "client certificate" in why(caller, node.address, tls_ca=pki.ca_path)
    own = pki.issue("client", file="client")
    client = caller.client(
        node.address, tls_ca=pki.ca_path, tls_cert=own.tls_cert, tls_key=own.tls_key
    )
    caller(client, "set", "scores", "a", b"1")
    assert caller(client, "get", "scores", "a") == b"1"


def test_a_client_certificate_that_was_replaced_is_shown_to_new_connections(
    caller: Caller, pki: Pki, secure_node: SecureNode, wait_until: WaitUntil
) -> None:
    seen: list[object] = []
    node = secure_node(changed(pki.issue("127.0.0.1"), tls_client_ca=pki.ca_path))

    def note(request: Any, context: grpc.ServicerContext) -> None:
        seen.extend(context.auth_context()["x509_pem_cert"])

    node.on = {"Set": note}
    own = pki.issue("client", file="client")
    client = caller.client(
        node.address, tls_ca=pki.ca_path, tls_cert=own.tls_cert, tls_key=own.tls_key
    )
    caller(client, "set", "scores", "a", b"1")
    first = Path(str(own.tls_cert)).read_bytes()
    pki.issue("client", file="client")
    second = Path(str(own.tls_cert)).read_bytes()
    client._access.look()  # as it does every few seconds, with the question for the members
    caller(client, "set", "scores", "a", b"1")
    assert seen == [first, second]


def test_settings_that_cannot_work_are_refused_at_once(pki: Pki) -> None:
    own = pki.issue("client")
    with pytest.raises(kamacache.ConfigError, match="give tls_ca, too"):
        kamacache.Client(["127.0.0.1:1"], tls_cert=own.tls_cert, tls_key=own.tls_key)
    with pytest.raises(kamacache.ConfigError, match="tls_key is not"):
        kamacache.Client(["127.0.0.1:1"], tls_ca=pki.ca_path, tls_cert=own.tls_cert)
    with pytest.raises(kamacache.ConfigError, match="No such file"):
        kamacache.Client(["127.0.0.1:1"], tls_ca="/nowhere.pem")


def test_a_client_with_certificates_loads_no_grpc_before_its_first_call(pki: Pki) -> None:
    code = (
        "import sys, kamacache\n"
        f"kamacache.Client(['127.0.0.1:1'], tls_ca={pki.ca_path!r}, token='x' * 16)\n"
        "assert 'grpc' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
