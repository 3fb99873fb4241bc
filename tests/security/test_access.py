"""`kamacache.security.access`: who is let in; what is said, counted and logged of the others."""

from __future__ import annotations

import asyncio
import logging
import time
from base64 import b64encode
from pathlib import Path

import pytest

from kamacache.errors import AccessDeniedError, ConfigError
from kamacache.limits import ACCESS_REFUSED_WAIT_S, ACCESS_REFUSED_WAITING_MAX
from kamacache.rundir.live import LiveSettings, SecurityFiles
from kamacache.security.access import Access

WEB, OPS = "web-secret-0123456789", "ops-secret-0123456789"
CLIENT = "ipv4:10.0.0.9:4711"


def live(path: Path | None) -> LiveSettings:
    return LiveSettings(security=SecurityFiles(tokens=None if path is None else str(path)))


def write(path: Path, **secrets: str) -> None:
    path.touch(mode=0o600)
    path.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsecret = "{secret}"\n'
            f'read = ["scores"]\nwrite = []\nstats = {"true" if name == "ops" else "false"}\n'
            for name, secret in secrets.items()
        )
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "tokens.toml"
    write(found, web=WEB, ops=OPS)
    return found


@pytest.fixture
def access(path: Path) -> Access:
    made = Access()
    made.apply(live(path))
    return made


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


def test_without_a_file_everybody_may_do_everything() -> None:
    access = Access()
    access.apply(live(None))
    token = access.identify(None, CLIENT)
    assert token is None
    access.permit(token, "scores", CLIENT, write=True)
    access.permit_stats(token, "the page", CLIENT)


@pytest.mark.parametrize(
    "header",
    [
        f"Bearer {WEB}",
        f"bearer {WEB}",
        f"BEARER   {WEB} ",
        f"Bearer {WEB}".encode(),
        basic("", WEB),
        basic("anyone", WEB),
    ],
)
def test_a_token_is_taken_as_bearer_or_as_a_password(access: Access, header: str | bytes) -> None:
    token = access.identify(header, CLIENT)
    assert token is not None
    assert token.name == "web"


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "Bearer", "Bearer ", WEB, f"Token {WEB}", f"Bearer {WEB}x", "Bearer \udcff"),
        "Basic ???",
        "Basic " + b64encode(WEB.encode()).decode(),
        basic(WEB, ""),
        basic("", OPS[1:]),
    ],
)
def test_anything_else_is_refused(access: Access, header: str | None) -> None:
    with pytest.raises(AccessDeniedError) as caught:
        access.identify(header, CLIENT)
    assert caught.value.token is None
    assert WEB not in str(caught.value)
    assert access.unknown == 1


def test_what_is_beyond_a_token_is_refused_alike_for_groups_that_are_and_are_not(
    access: Access,
) -> None:
    token = access.identify(f"Bearer {WEB}", CLIENT)
    access.permit(token, "scores", CLIENT, write=False)
    said = []
    for group in ("pages", "no such group"):
        with pytest.raises(AccessDeniedError) as caught:
            access.permit(token, group, CLIENT, write=False)
        assert (caught.value.token, caught.value.group) == ("web", group)
        said.append(str(caught.value).replace(group, "GROUP"))
    assert said[0] == said[1]
    with pytest.raises(AccessDeniedError, match="write to"):
        access.permit(token, "scores", CLIENT, write=True)
    with pytest.raises(AccessDeniedError, match="stats = true"):
        access.permit_stats(token, "/metrics", CLIENT)
    access.permit_stats(access.identify(f"Bearer {OPS}", CLIENT), "/metrics", CLIENT)
    assert (access.denied, access.unknown) == (4, 0)


def test_a_reload_takes_effect_with_the_next_call_and_a_bad_one_does_not(
    access: Access, path: Path
) -> None:
    access.identify(f"Bearer {WEB}", CLIENT)
    path.write_text("nonsense")
    with pytest.raises(ConfigError):
        access.apply(live(path.with_name("other.toml")))
    access.identify(f"Bearer {WEB}", CLIENT)
    write(path, ops=OPS)
    access.apply(live(path))
    with pytest.raises(AccessDeniedError):
        access.identify(f"Bearer {WEB}", CLIENT)
    access.identify(f"Bearer {OPS}", CLIENT)


def test_refusals_are_logged_once_in_a_while_by_name_and_address_and_never_the_token(
    access: Access, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = access.identify(f"Bearer {WEB}", CLIENT)
    for number in range(50):
        for header in (None, f"Bearer guess-number-{number}-secret"):
            with pytest.raises(AccessDeniedError):
                access.identify(header, CLIENT)
        with pytest.raises(AccessDeniedError):
            access.permit(token, f"group {number}", CLIENT, write=True)
    assert (access.unknown, access.denied) == (100, 50)
    told = [(r.message, vars(r)["token"], vars(r)["client"]) for r in caplog.records]
    assert told == [
        ("a call without a token was refused", "unknown", CLIENT),
        ("a call with an unknown token was refused", "unknown", CLIENT),
        ("a token was used beyond its scopes", "web", CLIENT),
    ]
    assert not any("secret" in str(vars(record)) for record in caplog.records)


async def test_who_guesses_waits_and_who_has_a_token_or_comes_late_does_not(
    access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AccessDeniedError) as caught:
        access.identify("Bearer guess-0123456789", CLIENT)
    unknown = caught.value
    start_s = time.monotonic()
    guesses = [
        asyncio.ensure_future(access.wait(unknown)) for _ in range(ACCESS_REFUSED_WAITING_MAX)
    ]
    await asyncio.sleep(0)
    await access.wait(unknown)  # one too many to be kept waiting
    await access.wait(AccessDeniedError("beyond", token="web"))
    with pytest.raises(AccessDeniedError) as caught:
        access.identify(None, CLIENT)
    await access.wait(caught.value)  # nothing was guessed
    assert not any(guess.done() for guess in guesses)
    await asyncio.gather(*guesses)
    assert time.monotonic() - start_s >= ACCESS_REFUSED_WAIT_S
    guess = asyncio.ensure_future(access.wait(unknown))
    await asyncio.sleep(0)
    assert not guess.done()  # there is room again
    guess.cancel()
