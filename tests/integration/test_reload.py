"""SIGHUP on real nodes: what changes in which process, what is refused, and what the log says."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kamacache.cluster.membership import MembershipReader
from kamacache.limits import SECRETS_LOOK_EVERY_S, SECRETS_SETTLE_S
from kamacache.local.attach import Attachment
from kamacache.local.attached import AttachedEngine
from kamacache.rundir.roster import Roster, read_roster
from tests.cluster_nodes import _ports as free_ports
from tests.node_process import ROOT, NodeProcess
from tests.service_manager import ServiceManager

pytestmark = pytest.mark.integration

OWN = ("node", "role", "shard", "pid", "level", "event", "timestamp", "logger")

APP = """
import logging, sys, threading, time, warnings
import structlog
import kamacache

logging.basicConfig(level=logging.ERROR, format="PLAIN %(message)s", force=True)  # apps do that

@kamacache.group("scores", cache_bytes="1MiB", ttl=60)
def scores(key: str) -> bytes:
    log = logging.getLogger("app")
    if key == "talk":
        odd = {"role": "mine", "odd": b"\\xff", "lone": "\\udc80", "nan": float("nan")}
        log.info("two\\nlines", extra=odd)
        structlog.get_logger("app.structlog").info("said", user="n\\nm")
        log.info("%d arguments", "no number")
        log.info("long %s", "x" * 100_000)
        warnings.warn("beware", stacklevel=1)
        try:
            raise ValueError("bad\\nvalue")
        except ValueError:
            log.exception("it failed")
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    if key.startswith("slow"):
        time.sleep(0.05)
    return key.encode()
"""


def lines(node: NodeProcess) -> list[dict[str, Any]]:
    """Return the lines of the log; each must be one of JSON."""
    return [json.loads(line) for line in node.log.splitlines()]


@contextlib.contextmanager
def engine_of(node: NodeProcess) -> Iterator[AttachedEngine]:
    attachment = Attachment(node.run_dir)
    try:
        yield AttachedEngine(attachment, "scores")
    finally:
        attachment.close()


class Reloaded:
    """A node of every role, whose settings are in a file."""

    def __init__(self, folder: Path, shm: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {
            "workers": 2,
            "log_format": "json",
            "api": "127.0.0.1:0",
            "slow_load_ms": 0,
            "insecure": True,  # tokens in a cluster of which nobody knows another
        }
        self.port = free_ports(1)[0]
        self.source = self.source_of("first", self.port)
        self.write()
        (folder / "reloaded_app.py").write_text(APP)
        self.manager = ServiceManager(str(folder / "notify"))
        self.node = NodeProcess(
            folder / "run",
            *("--config", str(self.config), "--app", "reloaded_app:scores"),
            *("--listen", f"127.0.0.1:{self.port}", "--shm-dir", str(shm)),
            *("--warm-restart-max-downtime", "0"),
            environment={"PYTHONPATH": f"{folder}:{ROOT}", "NOTIFY_SOCKET": self.manager.address},
        )

    @property
    def config(self) -> Path:
        return self.folder / "node.toml"

    def source_of(self, name: str, *ports: int) -> str:
        path = self.folder / f"{name}.toml"
        path.write_text(f"members = {[f'127.0.0.1:{port}' for port in ports]}")
        return f"file:{path}"

    def write(self, **settings: Any) -> None:
        """Write the file whole, with these settings changed; None takes one out."""
        self.settings = {
            name: value
            for name, value in {**self.settings, "discover": self.source, **settings}.items()
            if value is not None
        }
        fresh = self.folder / "node.new"
        fresh.write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.settings.items())
        )
        fresh.replace(self.config)

    def hang_up(self, **settings: Any) -> None:
        """Write the file, send SIGHUP and wait until it was taken or refused."""
        before = self.roster
        if settings:
            self.write(**settings)
        self.node.process.send_signal(signal.SIGHUP)
        self.until(
            lambda: (
                (self.roster.reloads, self.roster.reloads_refused)
                != (before.reloads, before.reloads_refused)
            )
        )

    @property
    def roster(self) -> Roster:
        return read_roster(self.node.description().sockets_dir)

    def until(self, condition: Callable[[], object], deadline_s: float = 20) -> None:
        end_s = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end_s, self.node.log
            time.sleep(0.01)

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in lines(self.node) if line["event"] == event]

    def get(self, key: str) -> None:
        with engine_of(self.node) as engine:
            engine.get(key.encode(), time.monotonic() + 10)


@pytest.fixture(scope="module")
def reloaded(shm_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloaded]:
    folder = tmp_path_factory.mktemp("r")
    made = Reloaded(folder, shm_root)
    with made.manager, made.node as node:
        node.await_ready()
        yield made
        assert node.stop() == 0


def test_the_log_level_changes_in_every_role(reloaded: Reloaded) -> None:
    taken = "a reload was taken up"
    roles = {(role.role, role.index) for role in reloaded.roster.roles}
    assert roles == {("worker", 0), ("worker", 1), ("front", 0), ("http", 0), ("agent", 0)}
    reloaded.hang_up(log_level="debug")
    reloaded.until(
        lambda: {(line["role"], line["shard"]) for line in reloaded.events(taken)} == roles
    )
    number = reloaded.roster.reloads
    reloaded.hang_up(log_level="info")
    reloaded.hang_up()
    assert {line["number"] for line in reloaded.events(taken)} == {number}
    told = len(reloaded.events("reloaded"))
    reloaded.hang_up(log_level="error")  # the line that says so is not hidden by it
    reloaded.until(lambda: len(reloaded.events("reloaded")) == told + 1)
    reloaded.hang_up(log_level="info")


def test_every_line_is_json_and_says_whose_it_is(reloaded: Reloaded) -> None:
    pids: dict[tuple[str, int | None], int] = {
        (role.role, role.index): role.pid for role in reloaded.roster.roles
    }
    pids["supervisor", None] = reloaded.node.pid
    for line in lines(reloaded.node):
        assert all(name in line for name in OWN), line
        assert line["node"] == f"127.0.0.1:{reloaded.port}"
        assert pids[line["role"], line["shard"]] == line["pid"]


def test_what_getters_log_has_the_nodes_form(reloaded: Reloaded) -> None:
    reloaded.get("talk")
    reloaded.until(lambda: reloaded.events("a thread failed"))
    said = [line for line in lines(reloaded.node) if line["role"] == "worker"]
    by_event = {line["event"]: line for line in said}
    first = by_event["two\nlines"]
    assert (first["role_"], first["odd"], first["nan"]) == ("mine", "b'\\xff'", "nan")
    assert first["role"] == "worker"
    assert by_event["said"]["user"] == "n\nm"
    assert by_event["it failed"]["exception"].endswith("ValueError: bad\nvalue")
    assert by_event["it failed"]["level"] == "error"
    assert "ZeroDivisionError" in by_event["a thread failed"]["exception"]
    assert by_event["a log line could not be formatted"]["error"] == "TypeError"
    [long] = [line for line in said if line["event"].startswith("long xxx")]
    assert long["cut"] is True
    assert any("beware" in line["event"] for line in said)
    assert "PLAIN" not in reloaded.node.log
    assert max(map(len, reloaded.node.log.splitlines())) < 4096


def test_slow_loads_are_logged_from_a_reload_on(reloaded: Reloaded) -> None:
    reloaded.get("slow-before")
    reloaded.hang_up(slow_load_ms=20)

    def is_logged() -> bool:  # the worker takes it up a moment later
        reloaded.get(f"slow-{time.monotonic_ns()}")
        return bool(reloaded.events("slow load"))

    reloaded.until(is_logged)
    [line, *_] = reloaded.events("slow load")
    assert line["group"] == "scores"
    assert line["ms"] >= 20
    assert line["role"] == "worker"
    assert line["key_bytes"] > 5
    assert "slow-" not in json.dumps(line)
    reloaded.hang_up(slow_load_ms=0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"log_level": "loud"}, "'loud'"), ({"tokens": "/no/such/file"}, "/no/such/file")],
)
def test_a_bad_file_leaves_the_old_one_in_force_and_says_so(
    reloaded: Reloaded, wrong: dict[str, str], told: str
) -> None:
    before = reloaded.roster
    reloaded.hang_up(slow_load_ms=7, **wrong)
    assert reloaded.roster.reloads == before.reloads
    assert reloaded.roster.reloads_refused == before.reloads_refused + 1
    reason = reloaded.events("reload refused, all stays as it was")[-1]["reason"]
    assert told in reason
    reloaded.hang_up(slow_load_ms=0, **{**dict.fromkeys(wrong), "log_level": "info"})
    assert reloaded.roster.reloads == before.reloads + 1


def test_the_service_manager_is_told_of_each_reload_and_of_what_was_refused(
    reloaded: Reloaded,
) -> None:
    manager = reloaded.manager
    manager.heard()
    reloaded.hang_up(log_level="info")
    began = manager.await_told(lambda message: message[0] == "RELOADING=1")
    assert 0 < int(began[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    manager.await_told(lambda message: message[0] == "READY=1")
    reloaded.hang_up(log_level="loud")
    manager.await_told(lambda message: message[0] == "READY=1")  # the node goes on
    manager.await_told(lambda message: "the last reload was refused: log_level" in message[0])
    reloaded.hang_up(log_level="info")
    again = manager.await_told(lambda message: message[0] == "READY=1")
    assert not any("refused" in line for line in again)  # it was the one before that was
    manager.await_told(lambda m: m[0].startswith("STATUS=") and "refused" not in m[0])


def test_a_file_that_is_no_toml_is_named(reloaded: Reloaded) -> None:
    reloaded.config.write_text("workers = [")
    reloaded.hang_up()
    reason = reloaded.events("reload refused, all stays as it was")[-1]["reason"]
    assert str(reloaded.config) in reason
    reloaded.write()


def test_what_needs_a_restart_is_named_and_not_touched(reloaded: Reloaded) -> None:
    workers = len(reloaded.roster.roles)
    reloaded.hang_up(workers=3, log_format="console", slow_load_ms=5)
    event = "settings that only a restart can change stay as they are"
    reloaded.until(lambda: reloaded.events(event))
    assert reloaded.events(event)[-1]["settings"] == "workers log_format"
    assert reloaded.events("reloaded")[-1]["changed"] == "slow_load_ms"
    assert len(reloaded.roster.roles) == workers
    reloaded.hang_up(workers=2, log_format="json", slow_load_ms=0)


def test_another_source_of_peers_is_followed_by_a_new_agent(reloaded: Reloaded) -> None:
    other = free_ports(1)[0]
    agent = reloaded.node.role("agent 0")
    about = reloaded.node.description()
    reader = MembershipReader(about)
    try:
        assert reader.current().others == ()
        reloaded.source = reloaded.source_of("second", reloaded.port, other)
        reloaded.hang_up(log_level="info")
        reloaded.until(lambda: reader.current().others == (f"127.0.0.1:{other}",))
        assert agent is not None
        assert not agent.is_running() or agent.pid != reloaded.node.role("agent 0")
        reloaded.source = reloaded.source_of("first", reloaded.port)
        reloaded.hang_up(log_level="info")
        reloaded.until(lambda: reader.current().others == ())
    finally:
        reader.close()
    reloaded.until(lambda: all(role.ready for role in reloaded.roster.roles))


def test_tokens_come_and_go_with_a_reload(reloaded: Reloaded) -> None:
    def status(token: str) -> int:
        request = urllib.request.Request(
            f"http://{reloaded.node.description().api}/api?group=scores&key=k",
            headers={"Authorization": f"Bearer {token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def give(name: str) -> None:
        path = reloaded.folder / f"{name}.tokens"
        path.touch(0o600)
        path.write_text(f'[[token]]\nname = "{name}"\nsecret = "{name * 16}"\nread = ["*"]\n')
        reloaded.hang_up(tokens=str(path))

    give("a")
    reloaded.until(lambda: (status("a" * 16), status("b" * 16)) == (200, 401))
    give("b")
    reloaded.until(lambda: (status("a" * 16), status("b" * 16)) == (401, 200))
    assert "b" * 16 not in reloaded.node.log
    reloaded.hang_up(tokens=None)
    reloaded.until(lambda: status("none") == 200)


def test_many_signals_are_a_few_reloads_and_a_worker_that_died_has_the_newest(
    reloaded: Reloaded,
) -> None:
    before = reloaded.roster.reloads
    worker = reloaded.node.role("worker 0")
    assert worker is not None
    reloaded.write(log_level="debug")
    worker.kill()
    for _ in range(300):
        reloaded.node.process.send_signal(signal.SIGHUP)
    reloaded.until(lambda: reloaded.roster.reloads > before)
    reloaded.until(lambda: all(role.ready for role in reloaded.roster.roles))
    reloaded.hang_up()
    taken = reloaded.roster.reloads
    reloaded.until(
        lambda: [
            line
            for line in reloaded.events("a reload was taken up")
            if (line["role"], line["shard"], line["number"]) == ("worker", 0, taken)
        ]
    )
    assert taken - before < 20
    reloaded.hang_up(log_level="info")


def test_peers_come_and_go_with_a_reload(short_dir: Path, shm_root: Path) -> None:
    names = [f"127.0.0.1:{port}" for port in free_ports(3)]
    config = short_dir / "peers.toml"

    def write(count: int, weight: int = 1) -> None:
        config.write_text(f"peers = {[*names[: count - 1], f'{names[count - 1]}={weight}']}\n")

    def start(index: int) -> NodeProcess:
        return NodeProcess(
            short_dir / f"n{index}",
            *("--config", str(config), "--listen", names[index], "--workers", "1"),
            *("--group", "scores:1MiB", "--shm-dir", str(shm_root)),
            *("--warm-restart-max-downtime", "0"),
        )

    def until(condition: Callable[[], object], deadline_s: float = 25) -> None:
        end_s = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end_s, first.log + second.log
            time.sleep(0.02)

    write(2)
    with start(0) as first, start(1) as second:
        first.await_ready()
        second.await_ready()
        readers = [MembershipReader(node.description()) for node in (first, second)]
        write(3, weight=2)
        with start(2) as third:
            third.await_ready()
            for node in (first, second):
                node.process.send_signal(signal.SIGHUP)
            until(lambda: all(len(reader.current().members) == 3 for reader in readers))
            assert {member.weight for member in readers[0].current().members} == {1, 2}
            with engine_of(third) as there, engine_of(first) as here:
                items = {b"%d" % number: b"v" for number in range(20)}  # each node owns some

                def found_there() -> bool:  # once the workers look at one ring, and have links
                    here.set_many(items, None, time.monotonic() + 10)
                    return len(there.get_many([*items], time.monotonic() + 10)) == len(items)

                until(found_there)
            config.write_text(f"peers = {names[1:]}\n")  # without the first's own name
            first.process.send_signal(signal.SIGHUP)
            until(lambda: "reload refused" in first.log)
            assert "every node is among its own peers" in first.log
            assert len(readers[0].current().members) == 3
            write(2)
            for node in (first, second):
                node.process.send_signal(signal.SIGHUP)
            until(lambda: all(len(reader.current().members) == 2 for reader in readers))
            assert third.stop() == 0
        for reader in readers:
            reader.close()
        assert (first.stop(), second.stop()) == (0, 0)


def test_a_signal_while_the_app_is_loaded_is_a_reload_of_the_node_that_is_ready(
    short_dir: Path, shm_root: Path
) -> None:
    (short_dir / "late_app.py").write_text(
        "import pathlib, time, kamacache\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'begun').touch()\n"
        "while not (here / 'go').exists(): time.sleep(0.01)\n"
        "groups = [kamacache.Group('scores', cache_bytes='1MiB')]\n"
    )
    with NodeProcess(
        short_dir / "run",
        *("--app", "late_app:groups", "--listen", "none", "--workers", "1"),
        *("--shm-dir", str(shm_root), "--warm-restart-max-downtime", "0"),
        environment={"PYTHONPATH": f"{short_dir}:{ROOT}"},
    ) as node:
        end_s = time.monotonic() + 15
        while not (short_dir / "begun").exists():
            assert time.monotonic() < end_s, node.log
            time.sleep(0.01)
        node.process.send_signal(signal.SIGHUP)
        (short_dir / "go").touch()
        node.await_ready()
        while not read_roster(node.description().sockets_dir).reloads:
            assert time.monotonic() < end_s, node.log
            time.sleep(0.01)
        assert node.stop() == 0


@pytest.mark.soak
def test_files_that_change_are_taken_up_without_a_signal(short_dir: Path, shm_root: Path) -> None:
    path = short_dir / "tokens.toml"

    def give(secret: str) -> None:
        fresh = short_dir / "tokens.new"
        fresh.touch(0o600)
        fresh.write_text(f'[[token]]\nname = "t"\nsecret = "{secret * 16}"\nread = ["*"]\n')
        fresh.replace(path)

    give("a")
    with NodeProcess(
        short_dir / "run",
        *(
            "--group",
            "scores:1MiB",
            "--listen",
            "none",
            "--workers",
            "1",
            "--shm-dir",
            str(shm_root),
        ),
        *("--tokens", str(path), "--warm-restart-max-downtime", "0"),
    ) as node:
        node.await_ready()
        give("b")
        end_s = time.monotonic() + 2 * (SECRETS_LOOK_EVERY_S + SECRETS_SETTLE_S)
        while not read_roster(node.description().sockets_dir).reloads:
            assert time.monotonic() < end_s, node.log
            time.sleep(0.1)
        assert node.stop() == 0
