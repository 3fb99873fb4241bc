"""`kamacache.security.peer_secret`: what a file may say, and which proofs hold."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamacache.errors import ConfigError
from kamacache.rundir.live import SecurityFiles
from kamacache.security import peer_secret
from kamacache.security.check import check_files
from kamacache.security.peer_secret import ANSWERS, ASKS, RENEWED, RENEWS, Meeting, PeerSecrets

OLD, NEW = "the-old-secret-0123456789", "the-new-secret-0123456789"
MEETING = Meeting("10.0.0.1:8001", "its life", 3, "10.0.0.2:8001", b"a" * 32, b"b" * 32)
LABELS = (ASKS, ANSWERS, RENEWS, RENEWED)


def write(path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path.touch()
    path.chmod(0o600)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(path)


def test_the_first_line_proves_and_every_line_is_taken(tmp_path: Path) -> None:
    both = PeerSecrets.load(write(tmp_path / "both", f"{NEW}\n\n  {OLD}  \n"))
    old = PeerSecrets.load(write(tmp_path / "old", f"{OLD}\r\n"))
    new = PeerSecrets.load(write(tmp_path / "new", NEW))
    assert both.proven(MEETING, ASKS, MEETING.proof(old.own, ASKS)) == old.own
    assert both.proven(MEETING, ASKS, MEETING.proof(new.own, ASKS)) == both.own == new.own
    assert new.proven(MEETING, ASKS, MEETING.proof(old.own, ASKS)) is None
    assert (both.has(old.own), new.has(old.own), new.has(None)) == (True, False, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 lines"),
        ("\n \n", "0 lines"),
        ("fifteen-chars-x", "line 1 has fewer than 16"),
        (f"{OLD}\nshort", "line 2 has fewer than 16"),
        ("\n".join(f"{OLD}-{number}" for number in range(9)), "9 lines"),
        (b"\xff" * 20, "not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_and_no_secret_is_told(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        PeerSecrets.load(write(tmp_path / "secret", text))
    assert OLD not in str(caught.value)
    assert "fifteen" not in str(caught.value)


def test_a_file_that_all_may_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0644"):
        PeerSecrets.load(write(tmp_path / "secret", OLD, 0o644))


def test_what_was_checked_last_outlives_a_file_that_was_spoiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_secret._proven, "_last", None)
    files = SecurityFiles(peer_secret=write(tmp_path / "secret", OLD))
    check_files(files)
    os.unlink(str(files.peer_secret))
    with pytest.raises(ConfigError):
        check_files(files)
    kept = peer_secret.load(files)
    assert kept is not None
    assert kept.own == PeerSecrets([OLD]).own
    assert "stays in force" in caplog.text
    assert peer_secret.load(SecurityFiles()) is None
    assert OLD not in repr(kept)


def test_a_proof_is_of_one_end_one_purpose_and_one_stream() -> None:
    secrets = PeerSecrets([OLD])
    others = [
        replace(MEETING, asker="10.0.0.9:8001"),
        replace(MEETING, asker_id="another life"),
        replace(MEETING, worker=4),
        replace(MEETING, answerer="10.0.0.9:8001"),
        replace(MEETING, asker_nonce=b"c" * 32),
        replace(MEETING, answerer_nonce=b"c" * 32),
        replace(MEETING, asker=MEETING.answerer, answerer=MEETING.asker),
        replace(MEETING, asker_nonce=b"b" * 32, answerer_nonce=b"a" * 32),
    ]
    for label in LABELS:
        proof = MEETING.proof(secrets.own, label)
        assert secrets.proven(MEETING, label, proof) == secrets.own
        for other in others:
            assert secrets.proven(other, label, proof) is None
        for other_label in set(LABELS) - {label}:
            assert secrets.proven(MEETING, other_label, proof) is None


TEXTS = st.text(max_size=6)
NONCES = st.binary(max_size=6)
MEETINGS = st.builds(Meeting, TEXTS, TEXTS, st.integers(0, 20), TEXTS, NONCES, NONCES)


@given(MEETINGS, MEETINGS)
def test_two_meetings_have_one_proof_only_where_they_are_one(one: Meeting, other: Meeting) -> None:
    key = PeerSecrets([OLD]).own
    assert (one == other) == (one.proof(key, ASKS) == other.proof(key, ASKS))
