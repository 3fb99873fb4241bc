"""A list in a file: replaced, broken, emptied, deleted."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kamacache.cluster.discovery import file as module
from kamacache.cluster.discovery.file import read_members
from kamacache.cluster.discovery.retry import SourceError
from tests.cluster.discovery.conftest import Follow, until

A, B, C = "10.0.0.1:8001", "10.0.0.2:8001", "cache-3.internal:8001"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISCOVERY_FILE_EVERY_S", 0.02)
    monkeypatch.setattr(module, "DISCOVERY_FILE_SETTLE_S", 0.02)


def put(path: Path, text: str) -> None:
    """Replace a file as configuration tools do: write beside it, rename over it."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


@pytest.mark.parametrize("name", ["peers.toml", "peers.json"])
def test_both_formats_name_members_as_text_or_table(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".json"):
        path.write_text(json.dumps({"members": [A, {"address": B, "weight": 2}, f"{C}=3", A]}))
    else:
        path.write_text(
            f'members = ["{A}", {{address = "{B}", weight = 2}}, "{C}=3", {{address = "{A}"}}]'
        )
    found = read_members(str(path))
    assert [(m.address, m.weight) for m in found] == [(A, 1), (B, 2), (C, 3)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "members = []",
        'members = "a:1"',
        'member = ["a:1"]',
        'members = ["a:1"',
        'members = ["a:1", "b"]',
        'members = ["a:1", 7]',
        'members = [{address = "a:1", weight = "2"}]',
        'members = [{address = "a:1", weight = true}]',
        'members = [{address = "a:1", weight = 0}]',
        'members = [{address = "a:1=2"}]',
        'members = [{weight = 2}]',
        'members = [{address = "a:1", wieght = 2}]',
        'members = ["a:1", "a:1=2"]',
        "members = ['\ud800']",
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_list_of_members_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "peers.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(SourceError, match=str(path)):
        read_members(str(path))


@pytest.mark.parametrize("text", ["null", "[]", "[" * 100_000, '{"members": null}', "{", "\x00"])
def test_json_that_is_not_a_list_of_members_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "peers.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=str(path)):
        read_members(str(path))


def test_a_huge_file_and_a_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DISCOVERY_BYTES_MAX", 100)
    path = tmp_path / "peers.toml"
    path.write_text("#" * 101)
    with pytest.raises(SourceError, match="more than 100 bytes"):
        read_members(str(path))
    with pytest.raises(SourceError, match="cannot be read"):
        read_members(str(tmp_path))


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    os.mkfifo(path)
    with pytest.raises(SourceError, match="names nobody"):
        read_members(str(path))
    with open(os.open(path, os.O_RDWR), "wb"), pytest.raises(SourceError, match="names nobody"):
        read_members(str(path))


async def test_changes_are_seen_in_place_and_by_rename(tmp_path: Path, follow: Follow) -> None:
    path = tmp_path / "peers.toml"
    put(path, f'members = ["{A}"]')
    a = follow(f"file:{path}")
    await a.sees(A)
    put(path, f'members = ["{B}"]')  # same size, and perhaps the same time
    await a.sees(B)
    path.write_text(f'members = ["{A}", "{B}=2"]')
    await a.sees(A, f"{B}=2")
    target = tmp_path / "..data.toml"  # as Kubernetes' config maps: a link that is replaced
    put(target, f'members = ["{A}"]')
    path.unlink()
    path.symlink_to(target)
    await a.sees(A)
    put(target, f'members = ["{B}"]')
    await a.sees(B)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("emptied", lambda path: path.write_text("")),
        ("deleted", lambda path: path.unlink()),
        ("garbage", lambda path: path.write_bytes(b"\x00\xff[[")),
        ("half written", lambda path: path.write_text('members = ["10.0.0.1:8001", ')),
        ("nobody", lambda path: path.write_text("members = []")),
        ("a folder", lambda path: (path.unlink(), path.mkdir())),
    ],
)
async def test_a_spoilt_file_leaves_the_last_list_and_one_line(
    tmp_path: Path,
    follow: Follow,
    caplog: pytest.LogCaptureFixture,
    name: str,
    spoil: Callable[[Path], object],
) -> None:
    path = tmp_path / "peers.toml"
    put(path, f'members = ["{A}", "{B}"]')
    a = follow(f"file:{path}")
    await a.sees(A, B)
    spoil(path)

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "kamacache.discovery"]

    await until(lambda: len(lines()) >= 1)
    await asyncio.sleep(0.3)
    assert len(lines()) == 1
    assert len(a.lists) == 1
    if path.is_dir():
        path.rmdir()
    put(path, f'members = ["{A}"]')
    await a.sees(A)


async def test_a_file_may_come_later(tmp_path: Path, follow: Follow) -> None:
    path = tmp_path / "peers.json"
    a = follow(f"file:{path}")
    await asyncio.sleep(0.1)
    assert not a.lists
    put(path, json.dumps({"members": [A]}))
    await a.sees(A)


async def test_a_file_that_is_being_written_is_read_when_it_rests(
    tmp_path: Path, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DISCOVERY_FILE_SETTLE_S", 0.5)
    path = tmp_path / "peers.toml"
    with path.open("w") as file:
        a = follow(f"file:{path}")
        for address in (A, B, C):  # valid TOML after each, of too few members
            file.write(f'[[members]]\naddress = "{address}"\n')
            file.flush()
            await asyncio.sleep(0.1)
    await a.sees(A, B, C)
    assert len(a.lists) == 1
