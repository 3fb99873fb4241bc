"""Certificates: what is refused before anything uses it, and in which words."""

from __future__ import annotations

import datetime
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from kamacache.errors import ConfigError
from kamacache.rundir.live import SecurityFiles
from kamacache.security import tls
from kamacache.security.check import cautions, check_files
from kamacache.security.files import read_bounded
from tests.pki import NOW, Pki, changed

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def old_ca() -> bytes:
    """Return the certificate of a CA that has expired."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "old")])
    made = x509.CertificateBuilder(
        name, name, key.public_key(), 1, NOW - datetime.timedelta(9), NOW - datetime.timedelta(1)
    ).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def self_signed(cert: Path, key: Path, *how: str) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", *how, "-nodes", "-subj", "/CN=a", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def why_not(files: SecurityFiles) -> str:
    with pytest.raises(ConfigError) as caught:
        check_files(files)
    return str(caught.value)


def test_no_files_and_good_files_pass(pki: Pki) -> None:
    check_files(SecurityFiles())
    assert tls.load(SecurityFiles()) is None
    for key_type in trustme.KeyType:
        files = pki.issue(key_type=key_type)
        check_files(changed(files, tls_ca=pki.ca_path, tls_client_ca=pki.ca_path))
        assert cautions(files) == []


def test_certificate_and_key_go_together(pki: Pki) -> None:
    files = pki.issue()
    assert "give --tls-key, too" in why_not(changed(files, tls_key=None))
    assert "give --tls-cert, too" in why_not(changed(files, tls_cert=None))
    for name in ("tls_ca", "tls_client_ca"):
        alone = why_not(SecurityFiles(**{name: pki.ca_path}))
        assert name in alone
        assert "give --tls-cert and --tls-key, too" in alone


def test_a_key_that_is_not_the_certificates_is_refused(pki: Pki) -> None:
    other = trustme.CA().issue_cert("127.0.0.1").private_key_pem
    files = pki.issue()
    Path(str(files.tls_key)).write_bytes(other.bytes())
    assert "is not the key of this certificate" in why_not(files)


def test_a_key_open_to_all_users_is_refused(pki: Pki) -> None:
    files = pki.issue()
    os.chmod(str(files.tls_key), 0o644)
    told = why_not(files)
    assert "open to every user" in told
    assert "chmod 0600" in told
    os.chmod(str(files.tls_key), 0o640)
    check_files(files)


@needs_openssl
def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(pki: Pki) -> None:
    files = pki.issue()
    key = str(files.tls_key)
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", f"{key}.enc"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert "is encrypted" in why_not(changed(files, tls_key=f"{key}.enc"))


def test_files_that_cannot_be_read_are_named(pki: Pki, tmp_path: Path) -> None:
    files = pki.issue()
    gone = str(tmp_path / "gone.pem")
    for name in ("tls_cert", "tls_key", "tls_ca", "tls_client_ca"):
        told = why_not(changed(files, **{name: gone}))
        assert name in told
        assert gone in told
        assert "No such file" in told
    assert "is no file" in why_not(changed(files, tls_ca="/dev/null"))
    large = tmp_path / "large.pem"
    large.write_bytes(b" " * ((1 << 20) + 1))
    assert "above 1048576 bytes" in why_not(changed(files, tls_ca=str(large)))


def test_what_is_no_certificate_is_refused(pki: Pki, tmp_path: Path) -> None:
    files = pki.issue()
    text = tmp_path / "text.pem"
    text.write_text("no certificate\n")
    assert "both must be PEM" in why_not(changed(files, tls_cert=str(text)))
    for name in ("tls_ca", "tls_client_ca"):
        assert "holds no certificate in PEM" in why_not(changed(files, **{name: str(text)}))
        leaf = why_not(changed(files, **{name: files.tls_cert}))
        assert "no certificate of a CA" in leaf


def test_an_expired_certificate_is_refused_and_one_that_expires_soon_is_told(pki: Pki) -> None:
    assert "has expired; put a new one" in why_not(pki.issue(days=-0.5))
    assert "not valid yet" in why_not(pki.issue(begun_days=-0.5))
    files = pki.issue(days=3.5)
    check_files(files)
    (said,) = cautions(files)
    assert "expires in 3 days" in said


def test_a_ca_that_has_expired_is_refused(pki: Pki, tmp_path: Path) -> None:
    old = tmp_path / "old.pem"
    old.write_bytes(old_ca())
    files = pki.issue()
    assert "all its certificates have expired" in why_not(changed(files, tls_ca=str(old)))
    both = tmp_path / "both.pem"
    both.write_bytes(old.read_bytes() + pki.ca.cert_pem.bytes())
    files = changed(files, tls_ca=str(both))
    check_files(files)
    assert [said for said in cautions(files) if "1 have expired" in said]


@needs_openssl
def test_keys_that_grpc_does_not_speak_are_refused(pki: Pki, tmp_path: Path) -> None:
    cert, key = tmp_path / "ed.pem", tmp_path / "ed.key"
    self_signed(cert, key, "-newkey", "ed25519")
    key.chmod(0o600)
    told = why_not(SecurityFiles(tls_cert=str(cert), tls_key=str(key)))
    assert "Ed25519" in told
    assert "ECDSA" in told


@needs_openssl
def test_a_certificate_for_clients_alone_is_refused(pki: Pki, tmp_path: Path) -> None:
    cert, key = tmp_path / "client.pem", tmp_path / "client.key"
    self_signed(cert, key, "-newkey", "rsa:2048", "-addext", "extendedKeyUsage=clientAuth")
    key.chmod(0o600)
    assert "serverAuth" in why_not(SecurityFiles(tls_cert=str(cert), tls_key=str(key)))


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("127.0.0.1", "a.example"), "127.0.0.1:8001"),
        (("127.0.0.1", "a.example"), "a.example:8001"),
        (("::1",), "[::1]:8001"),
        (("*.b.example",), "a.b.example:8001"),
    ],
)
def test_a_nodes_name_must_be_in_its_certificate(
    pki: Pki, names: tuple[str, ...], name: str
) -> None:
    files = changed(pki.issue(*names), tls_ca=pki.ca_path)
    tls.check_peering(files, name)
    for other in ("127.0.0.2:8001", "c.test:8001", "[::2]:8001"):
        with pytest.raises(ConfigError, match="--advertise"):
            tls.check_peering(files, other)
    with pytest.raises(ConfigError, match="--tls-ca"):
        tls.check_peering(changed(files, tls_ca=None), name)


@needs_openssl
def test_where_nodes_demand_certificates_of_clients_a_nodes_own_must_be_one(
    pki: Pki, tmp_path: Path
) -> None:
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    usage = ("-addext", "extendedKeyUsage=serverAuth", "-addext", "subjectAltName=DNS:a.example")
    self_signed(cert, key, "-newkey", "rsa:2048", *usage)
    key.chmod(0o600)
    files = SecurityFiles(tls_cert=str(cert), tls_key=str(key), tls_ca=pki.ca_path)
    tls.check_peering(files, "a.example:1")
    with pytest.raises(ConfigError, match="clientAuth"):
        tls.check_peering(changed(files, tls_client_ca=pki.ca_path), "a.example:1")
    tls.check_peering(pki.mutual("a.example"), "a.example:1")


def test_a_role_has_what_was_good_last_where_the_file_was_spoiled_since(pki: Pki) -> None:
    files = pki.issue()
    check_files(files)
    good = tls.load(files)
    assert good is not None
    Path(str(files.tls_cert)).write_text("spoiled")
    assert tls.load(files) == good
    with pytest.raises(ConfigError):
        tls.load(changed(files, tls_ca=str(pki.folder / "gone.pem")))
    assert good.key.decode() not in repr(good)


@pytest.fixture
def context_of(pki: Pki) -> Callable[[SecurityFiles], ssl.SSLContext]:
    def make(files: SecurityFiles) -> ssl.SSLContext:
        material = tls.load(files)
        assert material is not None
        return tls.server_context(material)

    return make


def test_servers_speak_tls_1_2_and_later_and_demand_what_they_are_told(
    pki: Pki, context_of: Callable[[SecurityFiles], ssl.SSLContext]
) -> None:
    context = context_of(pki.issue())
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_NONE
    context = context_of(changed(pki.issue(), tls_client_ca=pki.ca_path))
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_a_file_of_secrets_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 100)
    path.chmod(0o604)
    assert read_bounded("tls_cert", str(path)) == b"x" * 100
    with pytest.raises(ConfigError, match="0604"):
        read_bounded("peer_secret", str(path), secret=True)


def test_a_reload_changes_files_and_not_whether_there_is_tls() -> None:
    none, tls_only = SecurityFiles(), SecurityFiles(tls_cert="/c", tls_key="/k")
    mutual = changed(tls_only, tls_client_ca="/a")
    assert tls.why_restart(mutual, changed(mutual, tls_cert="/d", tls_client_ca="/b")) is None
    for old, new in ((none, tls_only), (tls_only, none), (tls_only, mutual), (mutual, tls_only)):
        assert "restart" in (tls.why_restart(old, new) or "")
