"""The command's options for TLS and tokens: what is sent, what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from kamacache.cli.client import command
from kamacache.errors import AccessDeniedError
from kamacache.front.credentials import server_credentials
from kamacache.security.certificates import Certificates
from tests.client.fakes import FakeNode
from tests.pki import Pki, changed

TOKEN = "not-so-secret-in-a-test"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def secure(pki: Pki) -> Iterator[FakeNode]:
    """A node that demands certificates of its clients."""
    files = changed(pki.issue("127.0.0.1"), tls_client_ca=pki.ca_path)
    node = FakeNode({b"Tom": b"630"}, credentials=server_credentials(Certificates(files)))
    yield node
    node.stop()


@pytest.fixture
def node() -> Iterator[FakeNode]:
    made = FakeNode({b"Tom": b"630"})
    yield made
    made.stop()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\nnot this\n")
    path.chmod(0o600)
    return path


def run(*args: object, **environment: str) -> Result:
    where = ("get", "Tom", "--group", "scores", "--timeout", "5")
    runner = CliRunner(env={"KAMACACHE_RUN_DIR": "", **environment})
    return runner.invoke(command, [*where, *map(str, args)])


def noted(node: FakeNode) -> list[Any]:
    seen: list[Any] = []

    def note(request: Any, context: grpc.ServicerContext) -> None:
        seen.append(dict(context.invocation_metadata()).get("authorization"))

    node.on["Get"] = note
    return seen


def test_a_node_is_called_over_tls_by_options_and_by_variables(pki: Pki, secure: FakeNode) -> None:
    own = pki.issue("client", file="client")
    where = ("--address", secure.address)
    options = ("--tls-ca", pki.ca_path, "--tls-cert", own.tls_cert, "--tls-key", own.tls_key)
    done = run(*where, *options)
    assert (done.exit_code, done.stdout) == (0, "630"), done.output
    done = run(
        *where,
        KAMACACHE_TLS_CA=pki.ca_path,
        KAMACACHE_TLS_CERT=str(own.tls_cert),
        KAMACACHE_TLS_KEY=str(own.tls_key),
    )
    assert (done.exit_code, done.stdout) == (0, "630"), done.output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 69, "if it speaks TLS, tls_ca is needed"),
        (("--tls-ca", "CA"), 69, "it may demand a client certificate"),
        (("--tls-ca", "OTHER"), 69, "none of those that are trusted"),
        (("--tls-ca", "/nowhere"), 2, "No such file"),
        (("--tls-cert", "CA", "--tls-key", "CA"), 2, "give tls_ca, too"),
    ],
)
def test_what_is_wrong_is_told(
    pki: Pki, secure: FakeNode, tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    (tmp_path / "other").mkdir()
    paths = {"CA": pki.ca_path, "OTHER": Pki(tmp_path / "other").ca_path}
    done = run("--address", secure.address, *(paths.get(option, option) for option in options))
    assert done.exit_code == code, done.output
    assert words in done.stderr


def test_a_nodes_own_variables_are_no_wish_of_the_commands_user(node: FakeNode) -> None:
    done = run("--address", node.address, KAMACACHE_TLS_CERT="/c", KAMACACHE_TLS_KEY="/k")
    assert (done.exit_code, done.stdout) == (0, "630"), done.output


def test_the_token_is_the_first_line_of_its_file(node: FakeNode, token_file: Path) -> None:
    seen = noted(node)
    where = ("--address", node.address)
    assert run(*where, "--token-file", token_file).exit_code == 0
    assert run(*where, KAMACACHE_TOKEN_FILE=str(token_file)).exit_code == 0
    assert run(*where).exit_code == 0
    assert seen == [f"Bearer {TOKEN}"] * 2 + [None]


def test_a_token_that_all_may_read_or_that_would_travel_in_clear_is_refused(
    node: FakeNode, token_file: Path
) -> None:
    away = ("--address", "10.255.255.1:8001", "--token-file", token_file)
    done = run(*away)
    assert done.exit_code == 2
    assert "in clear" in done.stderr
    assert TOKEN not in done.output
    token_file.chmod(0o644)
    done = run("--address", node.address, "--token-file", token_file)
    assert done.exit_code == 2
    assert "open to every user" in done.stderr
    token_file.chmod(0o600)
    token_file.write_text("\n")
    done = run("--address", node.address, "--token-file", token_file)
    assert done.exit_code == 2
    assert "is no token" in done.stderr


def test_a_token_that_is_refused_ends_with_77(node: FakeNode, token_file: Path) -> None:
    def deny(request: Any, context: grpc.ServicerContext) -> None:
        raise AccessDeniedError("no such token")

    node.on["Get"] = deny
    done = run("--address", node.address, "--token-file", token_file)
    assert done.exit_code == 77
    assert "no such token" in done.stderr
