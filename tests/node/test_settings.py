"""Settings: which source wins, what is refused, and in which words."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kamacache.cluster.membership import Member
from kamacache.config import GroupSpec
from kamacache.errors import ConfigError
from kamacache.node.address import Address, parse_address
from kamacache.node.group_options import merge_groups, parse_group
from kamacache.node.place import Place
from kamacache.node.settings import READERS, NodeSettings, from_layers, read_file

FileOf = Callable[[str], Path]


@pytest.fixture
def file_of(tmp_path: Path) -> FileOf:
    def write(text: str) -> Path:
        path = tmp_path / "node.toml"
        path.write_text(text)
        return path

    return write


def settings(
    file: Path | None = None, env: dict[str, str] | None = None, **flags: object
) -> NodeSettings:
    return from_layers(flags, env or {}, read_file(file) if file else {})


def test_flags_beat_environment_beats_file(file_of: FileOf) -> None:
    file = file_of("workers = 3\nfronts = 3\nlog_level = 'error'\n")
    env = {"KAMACACHE_WORKERS": "4", "KAMACACHE_FRONTS": "4"}
    found = settings(file, env, workers=5)
    assert (found.workers, found.fronts, found.log_level) == (5, 4, "error")


def test_every_setting_is_known_to_the_file_by_both_spellings(
    file_of: FileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There are no such files: here it is the names alone that are read.
    monkeypatch.setattr("kamacache.node.settings.check_exposure", lambda *_, **__: ())
    values = {
        "workers": "2", "fronts": "2", "listen": "'127.0.0.1:0'", "app": "'m:a'",
        "group": "['a:1MiB']", "run_dir": "'/tmp/r'", "shm_dir": "'/tmp/s'",
        "socket_group": "'0'", "insecure": "true", "log_level": "'debug'",
        "log_format": "'json'", "peers": "[]", "discover": "''", "advertise": "''", "api": "''",
        "slow_load_ms": "100", "warm_restart_max_downtime": "30.5", "tls_cert": "'/c'",
        "tls_key": "'/k'", "tls_ca": "'/a'", "tls_client_ca": "'/l'", "tokens": "'/t'",
        "peer_secret": "'/p'",
    }  # fmt: skip
    assert set(values) == set(READERS)
    under = settings(file_of("\n".join(f"{name} = {value}" for name, value in values.items())))
    dashed = settings(
        file_of("\n".join(f"{n.replace('_', '-')} = {value}" for n, value in values.items()))
    )
    assert under == dashed
    assert under.groups == {"a": {"cache_bytes": 1 << 20}}
    assert under.shm_dir == Path("/tmp/s")
    assert under.security.tls_client_ca == "/l"
    assert under.warm_restart_max_downtime_s == 30.5
    assert under.socket_gid == 0


def test_unknown_key_is_refused_with_the_nearest_known_one(file_of: FileOf) -> None:
    with pytest.raises(ConfigError, match=r"'worker'; did you mean 'workers'\?"):
        read_file(file_of("worker = 3"))
    with pytest.raises(ConfigError, match=r"'evictoin'; did you mean 'eviction'\?"):
        settings(file_of("[groups.a]\ncache_bytes = 9\nevictoin = 'lru'"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("workers = 'many'", "workers"),
        ("workers = 0", "workers"),
        ("workers = true", "workers"),
        ("listen = 8001", "listen"),
        ("log_level = 'loud'", "log_level"),
        ("groups = 3", "groups"),
        ("[groups]\na = 3", "groups"),
        ("[groups.a]\nttl = 'soon'", "in the config file, group 'a': ttl"),
        ('tokens = "/etc/a\\u0000b"', "tokens in the config file"),
        ("group = 'a'", "NAME:SIZE"),
        ("not toml", "not TOML"),
    ],
)
def test_wrong_value_in_the_file_names_the_setting(file_of: FileOf, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(file_of(text))


def test_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file("/no/such/file.toml")


def test_what_is_no_file_or_has_no_end_is_refused_at_once(tmp_path: Path) -> None:
    pipe, huge, deep = (tmp_path / name for name in ("pipe", "huge", "deep"))
    os.mkfifo(pipe)
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    deep.write_text("workers = " + "[" * 100_000)
    for path, says in (
        (pipe, "is no file"),
        (Path("/dev/zero"), "is no file"),
        (tmp_path, "cannot be read"),
        (huge, "more than it may have"),
        (deep, "is not TOML"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_file(path)


def test_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="KAMACACHE_WORKERS"):
        settings(env={"KAMACACHE_WORKERS": "x"})


def test_groups_of_all_sources_are_joined_field_by_field(file_of: FileOf) -> None:
    file = file_of("[groups.a]\ncache_bytes = '1MiB'\nttl = 60\n[groups.b]\ncache_bytes = 5\n")
    found = settings(file, {"KAMACACHE_GROUP": "c:1KiB d:2KiB"}, group=("a:2MiB",)).groups
    assert found["a"] == {"cache_bytes": 2 << 20, "ttl_ms": 60_000}
    assert set(found) == {"a", "b", "c", "d"}


def test_group_text_takes_options() -> None:
    name, fields = parse_group("a:1MiB,eviction=s3fifo,ttl=0.5,negative-ttl=0,load_timeout=3")
    assert name == "a"
    assert fields == {
        "cache_bytes": 1 << 20,
        "eviction": "s3fifo",
        "ttl_ms": 500,
        "negative_ttl_ms": 0,
        "load_timeout_s": 3,
    }


@pytest.mark.parametrize(
    "text", ["a", "a:", ":1MiB", "a:1MiB,ttl", "a:1MiB,ttl=x", "a:1MiB,eviction=fifo", "a:1XiB",
             "a b:1MiB", "a:1MiB,load_threads=1.5"]
)  # fmt: skip
def test_wrong_group_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_group(text)


def test_operator_overrides_the_app_in_what_is_named_only() -> None:
    app = [GroupSpec(name="a", cache_bytes=1, ttl_ms=9, has_getter=True)]
    merged = merge_groups(app, {"a": {"cache_bytes": 5}, "b": {"cache_bytes": 7}})
    assert merged == [
        GroupSpec(name="a", cache_bytes=5, ttl_ms=9, has_getter=True),
        GroupSpec(name="b", cache_bytes=7),
    ]


def test_node_without_a_group_or_with_one_of_no_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="--group"):
        merge_groups([], {})
    with pytest.raises(ConfigError, match=r"did you mean 'scores'\?"):
        merge_groups([GroupSpec(name="scores", cache_bytes=1)], {"score": {"ttl_ms": 5}})


def test_listening_beyond_loopback_needs_a_word() -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        settings(listen="0.0.0.0:8001")
    assert settings(listen="0.0.0.0:8001", insecure=True).listen == Address("0.0.0.0", 8001)
    assert settings(env={"KAMACACHE_INSECURE": "1"}, listen="[::]:8001").listen is not None


def test_listen_can_be_turned_off() -> None:
    for off in (settings(listen="none"), settings(listen=""), settings(fronts=0)):
        assert off.listen is None
        assert off.fronts == 0


@pytest.mark.parametrize("text", ["8001", ":8001", "host:", "127.0.0.1:x", "127.0.0.1:70000", ""])
def test_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text, "listen")


def test_addresses_are_told_as_they_are_typed() -> None:
    assert str(parse_address("[::1]:8001", "listen")) == "[::1]:8001"
    assert parse_address("[::1]:8001", "listen").loopback
    assert str(parse_address("localhost:8001", "listen")) == "127.0.0.1:8001"
    assert not parse_address("192.0.2.1:1", "listen").loopback


def test_cluster_comes_from_every_source(file_of: FileOf) -> None:
    file = file_of("peers = ['127.0.0.1:8001', '10.0.0.2:8001=2']\napi = '127.0.0.1:0'\n")
    found = settings(file)
    assert found.place.name == "127.0.0.1:8001"
    assert found.place.peers == (Member("10.0.0.2:8001", 2), Member("127.0.0.1:8001"))
    assert found.place.clustered
    assert found.api == Address("127.0.0.1", 0)
    env = {"KAMACACHE_PEERS": "a:1, b:2", "KAMACACHE_ADVERTISE": "a:1", "KAMACACHE_API": "none"}
    found = settings(file, env)
    assert [peer.address for peer in found.place.peers] == ["a:1", "b:2"]
    assert found.place.name == "a:1"
    assert found.api is None
    found = settings(file, env, peers=("x:1,y:1", "z:1"), advertise="z:1", discover="dns:x:1")
    assert [peer.address for peer in found.place.peers] == ["x:1", "y:1", "z:1"]
    assert found.place.discover == "dns:x:1"
    named = file_of("discover = 'static:x:1'\nadvertise = 'x:1'\n")
    assert (settings(named).place.discover, settings(named).place.name) == ("static:x:1", "x:1")
    env = {"KAMACACHE_DISCOVER": "static:y:1", "KAMACACHE_API": "127.0.0.1:7"}
    found = settings(named, env)
    assert (found.place.discover, found.api) == ("static:y:1", Address("127.0.0.1", 7))


def test_place_is_named_by_the_listen_address_as_it_was_written() -> None:
    found = settings(listen="localhost:8001", peers=("localhost:8001,localhost:8002",))
    assert found.listen == Address("127.0.0.1", 8001)
    assert found.place.name == "localhost:8001"
    assert settings().place == Place(name="127.0.0.1:8001")
    assert settings(listen="none").place == Place()


def test_http_beyond_loopback_needs_a_word() -> None:
    with pytest.raises(ConfigError, match=r"api is 0\.0\.0\.0:9999.*--insecure"):
        settings(api="0.0.0.0:9999")
    assert settings(api="0.0.0.0:9999", insecure=True).api == Address("0.0.0.0", 9999)
    with pytest.raises(ConfigError, match="api is '9999'; write HOST:PORT"):
        settings(api="9999")


def test_http_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name)
    )
    with pytest.raises(ConfigError, match=r"uvicorn: pip install 'kamacache\[http\]'"):
        settings(api="127.0.0.1:9999")


def test_unknown_socket_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such group"):
        settings(socket_group="no-such-group-here")
    for number in (2**32 - 1, 10**20):
        with pytest.raises(ConfigError, match="no such group"):
            settings(socket_group=str(number))
    assert settings(socket_group=str(os.getgid())).socket_gid == os.getgid()
