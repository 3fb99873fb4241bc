"""What a remote client trusts and shows: refused at once where it cannot work, and read again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kamacache.errors import ConfigError
from kamacache.security.client_tls import ClientFiles, system_roots
from tests.pki import Pki, spoil


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def test_what_cannot_work_is_refused_at_once(pki: Pki, tmp_path: Path) -> None:
    own = pki.issue("client")
    assert ClientFiles(pki.ca_path, None, None).material.cert is None
    good = ClientFiles(pki.ca_path, own.tls_cert, own.tls_key)
    assert good.material.cert == Path(str(own.tls_cert)).read_bytes()
    assert str(good.material.key) not in repr(good.material)
    with pytest.raises(ConfigError, match="tls_key is not"):
        ClientFiles(pki.ca_path, own.tls_cert, None)
    with pytest.raises(ConfigError, match="tls_cert is not"):
        ClientFiles(pki.ca_path, None, own.tls_key)
    with pytest.raises(ConfigError, match="no certificate of a CA"):
        ClientFiles(str(own.tls_cert), None, None)
    with pytest.raises(ConfigError, match="No such file"):
        ClientFiles(tmp_path / "gone.pem", None, None)
    os.chmod(str(own.tls_key), 0o604)
    with pytest.raises(ConfigError, match="open to every user"):
        ClientFiles(pki.ca_path, own.tls_cert, own.tls_key)
    old = pki.issue("client", days=-0.5)
    with pytest.raises(ConfigError, match="has expired"):
        ClientFiles(pki.ca_path, old.tls_cert, old.tls_key)


def test_files_that_have_changed_are_read_again(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    own = pki.issue("client")
    files = ClientFiles(pki.ca_path, own.tls_cert, own.tls_key)
    assert not files.refresh()
    pki.issue("client")
    assert files.refresh()
    new = files.material
    assert new.cert == Path(str(own.tls_cert)).read_bytes()
    spoil(own)
    with caplog.at_level(logging.ERROR):
        assert not files.refresh()
        assert not files.refresh()
    assert files.material is new
    assert caplog.text.count("cannot be used") == 1


def test_the_systems_roots_are_found_or_their_lack_is_told(
    monkeypatch: pytest.MonkeyPatch, pki: Pki
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", pki.ca_path)
    assert system_roots() == pki.ca_path
    assert ClientFiles(True, None, None).material.ca == Path(pki.ca_path).read_bytes()
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(ConfigError, match="ca-certificates"):
        system_roots()
