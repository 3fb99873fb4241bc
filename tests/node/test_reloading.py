"""Tests of what a reload changes, refuses and notices; times are told, nothing waits."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError
from kamacache.limits import RELOAD_EVERY_S, SECRETS_LOOK_EVERY_S, SECRETS_SETTLE_S
from kamacache.node.children import Child
from kamacache.node.estate import Estate
from kamacache.node.notify import Notifier
from kamacache.node.place import Place
from kamacache.node.reloading import Reloading, compare, marks
from kamacache.node.settings import NodeSettings
from kamacache.node.telling import Teller
from kamacache.rundir.context import WORD_RELOAD
from kamacache.rundir.live import SecurityFiles, read_live
from kamacache.rundir.roster import State
from tests.pki import Pki

A, B, C = (Member(f"10.0.0.{number}:8001") for number in (1, 2, 3))


def node(**settings: Any) -> NodeSettings:
    return NodeSettings(run_dir=Path("/r"), **settings)


def at(*peers: Member, **place: Any) -> Place:
    return Place(name=A.address, peers=peers, **place)


# -- what changes --------------------------------------------------------------------------


def test_nothing_changes_between_equal_settings() -> None:
    changes = compare(node(), node(), clustered=False)
    assert (changes.changed, changes.restart) == ((), ())


def test_what_can_change_does_and_the_rest_is_named() -> None:
    fresh = node(log_level="debug", slow_load_ms=5, workers=3, groups={"a": {}}, socket_gid=1)
    changes = compare(node(), fresh, clustered=False)
    assert changes.changed == ("log_level", "slow_load_ms")
    assert changes.restart == ("workers", "group", "socket_group")
    assert changes.settings == node(log_level="debug", slow_load_ms=5)


@pytest.mark.parametrize(
    ("now", "fresh", "clustered", "changed", "restart"),
    [
        (at(A, B), at(A, B, C), True, ["peers"], []),
        (at(A, B), at(A, Member(B.address, 2)), True, ["peers"], []),
        (at(A, B), at(), True, ["peers"], []),
        (at(), at(A, B), False, [], ["peers"]),  # its workers have no links
        (at(A, B), replace(at(B, C), name=B.address), True, [], ["advertise", "peers"]),
        (at(A, B), at(discover="file:/p.toml"), True, [], ["peers", "discover"]),
        (at(discover="file:/p.toml"), at(A, B), True, [], ["peers", "discover"]),
        (at(discover="file:/p.toml"), at(discover="file:/q.toml"), True, ["discover"], []),
        (at(discover="static:x"), at(discover="static:x", weight=2), True, ["weight"], []),
        (at(A, B, discover="dns:x:1"), at(A, C, discover="dns:x:1"), True, [], ["peers"]),
    ],
)
def test_peers_change_where_the_roles_can_follow(
    now: Place, fresh: Place, clustered: bool, changed: list[str], restart: list[str]
) -> None:
    changes = compare(node(place=now), node(place=fresh), clustered=clustered)
    assert (changes.changed, changes.restart) == (tuple(changed), tuple(restart))
    if not changed:
        assert changes.settings.place == now


def test_files_change_and_tls_is_not_switched() -> None:
    plain = SecurityFiles(tokens="/a")
    tls = SecurityFiles(tokens="/b", tls_cert="/c", tls_key="/k")
    changes = compare(node(security=plain), node(security=tls), clustered=False)
    assert changes.settings.security == SecurityFiles(tokens="/b")
    assert (changes.changed, changes.restart) == (("tokens",), ("tls_cert", "tls_key"))
    other = SecurityFiles(tokens="/b", tls_cert="/d", tls_key="/k")
    changes = compare(node(security=tls), node(security=other), clustered=False)
    assert changes.settings.security == other
    assert (changes.changed, changes.restart) == (("tls_cert",), ())


# -- a node that reloads -------------------------------------------------------------------


class Reloaded:
    """`Reloading` with one child, whose words are read here."""

    def __init__(self, folder: Path, settings: NodeSettings) -> None:
        self.folder = folder
        self.settings = settings
        self.error: Exception | None = None
        self.reads = 0
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.children = [Child(role="worker", index=0, pid=0, words_fd=self.ours.fileno())]
        described = SimpleNamespace(sockets_dir=str(folder), clustered=False, name=None)
        self.estate = cast(Estate, SimpleNamespace(description=described))
        notifier = Notifier()
        self.teller = Teller(notifier, socket_gid=None)
        self.reloading = Reloading(settings, self._reread, self.teller, notifier)

    def _reread(self) -> NodeSettings:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return self.settings

    def tick(self, now_s: float, state: State = "ready") -> float:
        return self.reloading.tick(now_s, state, self.estate, self.children)

    @property
    def words(self) -> list[str]:
        try:
            return self.theirs.recv(1 << 16).decode().split()
        except BlockingIOError:
            return []

    @property
    def counts(self) -> tuple[int, int]:
        return self.teller.reloads, self.teller.reloads_refused


@pytest.fixture
def make(short_dir: Path) -> Iterator[Callable[..., Reloaded]]:
    made: list[Reloaded] = []

    def reloaded(**settings: Any) -> Reloaded:
        made.append(Reloaded(short_dir, node(**settings)))
        return made[-1]

    yield reloaded
    for one in made:
        one.ours.close()
        one.theirs.close()


def test_signals_at_once_are_one_reload_and_the_next_waits(make: Callable[..., Reloaded]) -> None:
    one = make()
    one.settings = node(slow_load_ms=9)
    for _ in range(5):
        one.reloading.ask()
    one.tick(100.0)
    assert (one.counts, one.words) == ((1, 0), [WORD_RELOAD])
    assert read_live(one.folder).slow_load_ms == 9
    one.reloading.ask()
    assert one.tick(100.1) == 100.0 + RELOAD_EVERY_S
    assert one.counts == (1, 0)
    one.tick(100.0 + RELOAD_EVERY_S)
    assert one.counts == (2, 0)
    assert one.reloading.live.number == 2


def test_a_signal_waits_for_a_node_that_starts_and_means_nothing_to_one_that_stops(
    make: Callable[..., Reloaded],
) -> None:
    one = make()
    one.reloading.ask()
    one.tick(1.0, "starting")
    assert one.reads == 0
    one.tick(2.0)
    assert one.reads == 1
    one.reloading.ask()
    one.tick(9.0, "stopping")
    one.tick(9.0)
    assert one.reads == 1


@pytest.mark.parametrize("error", [ConfigError("x is bad; write y"), RecursionError("a file")])
def test_what_is_wrong_changes_nothing(make: Callable[..., Reloaded], error: Exception) -> None:
    one = make()
    one.error = error
    one.reloading.ask()
    one.tick(1.0)
    assert (one.counts, one.words) == ((0, 1), [])
    assert str(error) in one.teller.trouble
    one.error = None
    one.reloading.ask()
    one.tick(2.0)
    assert (one.counts, one.teller.trouble) == ((1, 1), "")


def test_what_cannot_be_published_changes_nothing(make: Callable[..., Reloaded]) -> None:
    one = make()
    one.settings = node(slow_load_ms=9)
    one.folder.joinpath("live.json.new").mkdir()
    one.reloading.ask()
    one.tick(1.0)
    assert (one.counts, one.words) == ((0, 1), [])
    assert one.reloading.settings.slow_load_ms == 0


def test_a_role_that_hangs_gets_one_word(make: Callable[..., Reloaded]) -> None:
    one = make()
    for number in range(5):
        one.reloading.ask()
        one.tick(float(number))
    assert one.counts == (5, 0)
    assert one.words == [WORD_RELOAD]
    one.reloading.ask()
    one.tick(10.0)
    assert one.words == [WORD_RELOAD]


# -- files of secrets ----------------------------------------------------------------------


def tokens(path: Path, secret: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_text(f'[[token]]\nname = "t"\nsecret = "{secret}"\nread = ["*"]\n')
    fresh.replace(path)


def test_files_that_change_are_taken_up_when_they_stay_as_they_are(
    make: Callable[..., Reloaded], short_dir: Path
) -> None:
    path = short_dir / "tokens.toml"
    tokens(path, "first-secret-of-16")
    one = make(security=SecurityFiles(tokens=str(path)))
    assert one.tick(0.0) == SECRETS_LOOK_EVERY_S
    tokens(path, "second-secret-of-16")
    assert one.tick(5.0) == SECRETS_LOOK_EVERY_S, "not looked at yet"
    assert one.tick(10.0) == 10.0 + SECRETS_SETTLE_S
    tokens(path, "third-secret-of-16")
    assert one.tick(11.0) == 11.0 + SECRETS_SETTLE_S, "it changed meanwhile"
    one.tick(12.0)
    assert (one.counts, one.words, one.reads) == ((1, 0), [WORD_RELOAD], 0)
    one.tick(30.0)
    assert one.counts == (1, 0)


def test_a_file_that_is_wrong_is_told_once_until_it_changes(
    make: Callable[..., Reloaded], short_dir: Path
) -> None:
    path = short_dir / "tokens.toml"
    tokens(path, "first-secret-of-16")
    one = make(security=SecurityFiles(tokens=str(path)))
    one.tick(0.0)
    path.unlink()
    for now_s in (10.0, 11.0, 21.0, 31.0, 41.0):
        one.tick(now_s)
    assert (one.counts, one.words) == ((0, 1), [])
    assert str(path) in one.teller.trouble
    tokens(path, "other-secret-of-16")
    for now_s in (51.0, 52.0):
        one.tick(now_s)
    assert (one.counts, one.words) == ((1, 1), [WORD_RELOAD])


def test_a_new_certificate_without_the_nodes_own_name_is_refused(
    make: Callable[..., Reloaded], tmp_path: Path
) -> None:
    pki = Pki(tmp_path)
    files = pki.mutual("10.0.0.1")
    one = make(security=files, place=at(A, B))
    one.tick(0.0)
    pki.mutual("10.0.0.9")  # every other node would refuse it
    one.reloading.ask()
    one.tick(1.0)
    pki.mutual("10.0.0.8")
    for now_s in (11.0, 12.0):
        one.tick(now_s)
    assert (one.counts, one.words) == ((0, 2), [])
    assert "10.0.0.1" in one.teller.trouble
    pki.mutual("10.0.0.1")
    one.reloading.ask()
    one.tick(30.0)
    assert (one.counts, one.words) == ((1, 2), [WORD_RELOAD])


def test_a_swap_of_a_link_above_a_file_is_seen(short_dir: Path) -> None:
    for name in ("1", "2"):  # as Kubernetes mounts a secret
        (short_dir / name).mkdir()
        (short_dir / name / "tls.crt").write_text(name)
        os.utime(short_dir / name / "tls.crt", (1, 1))
    data = short_dir / "..data"
    data.symlink_to("1")
    (short_dir / "tls.crt").symlink_to("..data/tls.crt")
    files = SecurityFiles(tls_cert=str(short_dir / "tls.crt"))
    before = marks(files)
    fresh = short_dir / "..fresh"
    fresh.symlink_to("2")
    fresh.replace(data)
    assert marks(files) != before


def test_a_node_without_files_of_secrets_never_looks(make: Callable[..., Reloaded]) -> None:
    assert make().tick(0.0) == float("inf")


def test_an_embedded_node_takes_up_files_at_a_signal_and_reads_nothing_else(
    make: Callable[..., Reloaded], short_dir: Path
) -> None:
    path = short_dir / "tokens.toml"
    tokens(path, "first-secret-of-16")
    one = make(security=SecurityFiles(tokens=str(path)))
    settings = one.settings
    one.reloading = Reloading(settings, None, one.teller, Notifier())
    tokens(path, "second-secret-of-16")
    one.reloading.ask()
    one.tick(1.0)
    assert (one.counts, one.words, one.reads) == ((1, 0), [WORD_RELOAD], 0)
    assert one.reloading.settings == settings
    path.write_text("no toml at all")
    one.reloading.ask()
    one.tick(2.0)
    assert one.counts == (1, 1)
