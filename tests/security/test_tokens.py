"""`kamacache.security.tokens`: what a file of tokens may say, and who is found in it."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kamacache.errors import ConfigError
from kamacache.limits import SECURITY_FILE_BYTES_MAX, TOKENS_MAX
from kamacache.rundir.live import SecurityFiles
from kamacache.security import tokens
from kamacache.security.check import check_files
from kamacache.security.tokens import Tokens

SECRET = "correct-horse-battery-staple"
OTHER = "another-secret-of-ours"
FileOf = Callable[..., Path]


@pytest.fixture
def file_of(tmp_path: Path) -> FileOf:
    def write(text: str | bytes, mode: int = 0o600) -> Path:
        path = tmp_path / "tokens.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)
        return path

    return write


def one(**fields: str) -> str:
    told = {"name": '"web"', "secret": f'"{SECRET}"', **fields}
    return "[[token]]\n" + "".join(f"{name} = {value}\n" for name, value in told.items() if value)


def test_a_token_is_found_by_its_secret_or_its_digest_with_its_scopes(file_of: FileOf) -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    text = one(read='["scores", "pages"]', write='["scores"]') + one(
        name='"ops"', secret="", sha256=f'"{digest.upper()}"', read='["*"]', stats="true"
    )
    found = Tokens.load(str(file_of(text)))
    web, ops = found.find(SECRET), found.find(OTHER.encode())
    assert web is not None
    assert ops is not None
    assert (web.name, ops.name, len(found)) == ("web", "ops", 2)
    assert (web.may_read("pages"), web.may_write("pages"), web.may_write("scores")) == (
        True,
        False,
        True,
    )
    assert (web.stats, web.knows("pages"), web.knows("other")) == (False, True, False)
    assert (ops.stats, ops.may_read("anything"), ops.may_write("anything")) == (True, True, False)


@pytest.mark.parametrize(
    "presented", ["", "web", SECRET[:-1], SECRET + "x", SECRET.upper(), "ü" * 20, OTHER]
)
def test_nothing_else_is_found(file_of: FileOf, presented: str) -> None:
    assert Tokens.load(str(file_of(one()))).find(presented) is None


def test_every_token_is_compared_whichever_is_found(
    file_of: FileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"n{number}" for number in range(5)]
    text = "".join(one(name=f'"{name}"', secret=f'"{SECRET}-{name}"') for name in names)
    found = Tokens.load(str(file_of(text)))
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return compare_digest(left, right)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for presented in (f"{SECRET}-n0", f"{SECRET}-n4", "nobody's"):
        compared.clear()
        found.find(presented)
        assert len(compared) == len(set(compared)) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "[[token]]"),
        ("token = 1", "[[token]]"),
        ("token = [1]", "[[token]]"),
        (one() + "[other]\n", "nothing else"),
        ("[[token", "no TOML"),
        (f'[[token]]\nname = "{SECRET}', "no TOML"),
        (f"[[token]]\n{SECRET}", "no TOML"),
        (b"\xff\xfe", "no TOML"),
        ("token = " + "[" * 100_000, "no TOML"),
        (one(name=""), "needs a name"),
        (one(name='"two words"'), "needs a name"),
        (one(name=f'"{"n" * 65}"'), "needs a name"),
        (one(secret=""), "one of sha256 and secret"),
        (one(sha256=f'"{"0" * 64}"'), "one of sha256 and secret"),
        (one(secret='"short-secret-15"'), "16 characters"),
        (one(secret=f'"{SECRET} with spaces"'), "16 characters"),
        (one(secret="[1]"), "16 characters"),
        (one(secret="", sha256='"abc"'), "64 hex digits"),
        (one(read='"scores"'), "list of groups"),
        (one(write="[1]"), "list of groups"),
        (one(read='[""]'), "list of groups"),
        (one(read=str([f"g{n}" for n in range(257)])), "more than 256"),
        (one(stats='"yes"'), "true or false"),
        (one(**{SECRET: "true"}), "unknown field"),
        (one() + one(secret=f'"{OTHER}"'), "called 'web'"),
        (one() + one(name='"app"'), "same token"),
        ("".join(one(name=f'"n{n}"') for n in range(TOKENS_MAX + 1)), "256 at most"),
        (b"#" * (SECURITY_FILE_BYTES_MAX + 1), "more than it may have"),
    ],
)
def test_a_bad_file_is_refused_and_no_secret_is_told(
    file_of: FileOf, text: str | bytes, said: str
) -> None:
    path = file_of(text)
    with pytest.raises(ConfigError) as caught:
        Tokens.load(str(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.setting == "tokens"
    error: BaseException | None = caught.value
    while error is not None:  # what a traceback in a log would show
        assert SECRET not in repr(error)
        error = error.__cause__


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_a_file_of_one_user_and_readers_of_his_group_is_taken(file_of: FileOf, mode: int) -> None:
    assert len(Tokens.load(str(file_of(one(), mode)))) == 1


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o660, 0o666])
def test_a_file_that_others_may_read_or_write_is_refused(file_of: FileOf, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"{mode:04o}.*chmod 0600"):
        Tokens.load(str(file_of(one(), mode)))


def test_what_is_no_file_is_refused_and_waited_for_by_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    for place in (path, tmp_path, Path("/dev/null"), Path("/dev/zero")):
        link = tmp_path / f"link-to-{place.name}"
        link.symlink_to(place)
        for name in (place, link):
            with pytest.raises(ConfigError, match=r"no file|cannot be read"):
                Tokens.load(str(name))


def test_nothing_that_is_kept_tells_a_token(file_of: FileOf) -> None:
    found = Tokens.load(str(file_of(one())))
    token = found.find(SECRET)
    for text in (repr(found), repr(token), str(found)):
        assert SECRET not in text
        assert hashlib.sha256(SECRET.encode()).hexdigest() not in text
    assert "web" in repr(found)


def test_what_was_checked_last_outlives_a_file_that_was_spoiled(
    file_of: FileOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokens._proven, "_last", None)
    files = SecurityFiles(tokens=str(file_of(one())))
    check_files(files)
    os.unlink(str(files.tokens))
    with pytest.raises(ConfigError, match="cannot be read"):
        check_files(files)
    kept = tokens.load(files)
    assert kept is not None
    assert kept.find(SECRET) is not None
    assert "stay in force" in caplog.text
    with pytest.raises(ConfigError):
        tokens.load(SecurityFiles(tokens="/nowhere"))
    assert tokens.load(SecurityFiles()) is None
