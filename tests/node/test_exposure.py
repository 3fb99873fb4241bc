"""The rule of --insecure: what a node that other hosts can reach needs, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from kamacache.errors import ConfigError
from kamacache.node.address import Address
from kamacache.node.exposure import check_exposure
from kamacache.node.place import Place, find_place
from kamacache.rundir.live import SecurityFiles

OPEN = Address("10.0.0.1", 8001)
CLOSED = Address("127.0.0.1", 8001)
CLUSTER = find_place(OPEN, listen_text="10.0.0.1:8001", peers=("10.0.0.1:8001", "10.0.0.2:8001"))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    made = ca.issue_cert("10.0.0.1", "127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("tls_cert", "tls_key", "ca")}
    made.cert_chain_pems[0].write_to_path(str(paths["tls_cert"]))
    made.private_key_pem.write_to_path(str(paths["tls_key"]))
    paths["tls_key"].chmod(0o600)
    ca.cert_pem.write_to_path(str(paths["ca"]))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[[token]]\nname = "web"\nsecret = "{"x" * 32}"\nread = ["*"]\n')
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = tmp_path / "peers"
    path.write_text("y" * 32 + "\n")
    path.chmod(0o600)
    return str(path)


def said(
    *,
    listen: Address | None = OPEN,
    api: Address | None = None,
    place: Place | None = None,
    insecure: bool = False,
    **files: str,
) -> tuple[str, ...]:
    return check_exposure(
        SecurityFiles(**files),
        place or Place(),
        {"listen": listen, "api": api},
        insecure=insecure,
    )


def pair(tls: dict[str, str]) -> dict[str, Any]:
    return {name: tls[name] for name in ("tls_cert", "tls_key")}


@pytest.mark.parametrize("setting", ["listen", "api"])
def test_beyond_loopback_needs_tls_or_tokens_or_a_word(
    setting: str, tls: dict[str, str], tokens: str
) -> None:
    where: dict[str, Any] = {"listen": None, "api": None, setting: OPEN}
    with pytest.raises(ConfigError, match=rf"{setting} is 10\.0\.0\.1.*--insecure") as caught:
        said(**where)
    for remedy in ("--tls-cert", "--tokens", "127.0.0.1"):
        assert remedy in str(caught.value)
    assert said(**where, insecure=True) == ()
    (clear,) = said(**where, tokens=tokens)
    assert "in clear" in clear
    (anybody,) = said(**where, **pair(tls))
    assert "whoever reaches 10.0.0.1:8001 may read and write" in anybody
    assert said(**where, **pair(tls), tokens=tokens) == ()
    assert said(**where, **pair(tls), tls_client_ca=tls["ca"]) == ()


def test_on_loopback_nothing_is_needed(tls: dict[str, str]) -> None:
    assert said(listen=CLOSED, api=CLOSED) == ()
    assert said(listen=None) == ()
    assert said(listen=CLOSED, **pair(tls)) == ()
    place = find_place(CLOSED, listen_text="127.0.0.1:8001", peers=("127.0.0.1:8001", "a:1"))
    assert said(listen=CLOSED, place=place) == ()


def test_a_cluster_beyond_loopback_needs_peers_that_prove_who_they_are(
    tls: dict[str, str], tokens: str, secret: str
) -> None:
    with pytest.raises(ConfigError, match="--peer-secret") as caught:
        said(place=CLUSTER, tokens=tokens)
    assert "--tls-client-ca" in str(caught.value)
    with pytest.raises(ConfigError, match="--peer-secret"):
        said(place=CLUSTER, **pair(tls), tls_ca=tls["ca"])
    assert len(said(place=CLUSTER, tokens=tokens, peer_secret=secret)) == 1
    assert said(place=CLUSTER, insecure=True) == ()
    assert said(place=CLUSTER, **pair(tls), tls_ca=tls["ca"], tls_client_ca=tls["ca"]) == ()


def test_a_cluster_with_tls_needs_a_ca_and_its_own_name(tls: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--tls-ca"):
        said(place=CLUSTER, insecure=True, **pair(tls))
    other = find_place(OPEN, listen_text="", peers=("b:1", "c:1"), advertise="b:1")
    with pytest.raises(ConfigError, match="--advertise"):
        said(place=other, insecure=True, **pair(tls), tls_ca=tls["ca"])


def test_files_are_looked_at_whatever_else_is_said(tls: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        said(listen=CLOSED, insecure=True, tls_cert="/nowhere", tls_key=tls["tls_key"])


def test_tokens_in_a_cluster_need_nodes_that_know_each_other_on_loopback_too(
    tokens: str, secret: str
) -> None:
    near = find_place(
        CLOSED, listen_text="127.0.0.1:8001", peers=("127.0.0.1:8001", "127.0.0.1:8002")
    )
    with pytest.raises(ConfigError, match="--peer-secret"):
        said(listen=CLOSED, place=near, tokens=tokens)
    with pytest.raises(ConfigError, match="--peer-secret"):  # wherever HTTP listens
        said(listen=CLOSED, api=OPEN, place=near, tokens=tokens)
    assert said(listen=CLOSED, place=near, tokens=tokens, insecure=True) == ()
    assert said(listen=CLOSED, place=near, tokens=tokens, peer_secret=secret) == ()
    assert said(listen=CLOSED, tokens=tokens) == ()
    assert said(listen=None, place=near, tokens=tokens) == ()
