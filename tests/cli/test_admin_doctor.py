"""`kamacache doctor`: every check made to fail as it would fail on a host, where that can be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kamacache.cli.admin.asking import Told
from kamacache.cli.admin.diagnosis import Finding, host, node
from kamacache.cli.admin.diagnosis.cluster import cluster_checks, link_checks
from kamacache.clock import boottime_ms
from kamacache.cluster.membership import Member, Membership
from kamacache.errors import NodeUnavailableError
from kamacache.rundir.description import read_description
from kamacache.rundir.kept import NOTE, keep_shards
from kamacache.rundir.layout import RunDir
from kamacache.store.arena import is_tmpfs
from kamacache.wire.messages import LinkNow
from tests.cli.conftest import kamacache, told
from tests.cluster_nodes import MakeCluster
from tests.node_process import ROOT, NodeProcess
from tests.pki import Pki

TOKENS = """\
[[token]]
name = "admin"
secret = "a-token-of-an-admin"
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, shm_root: Path) -> Iterator[NodeProcess]:
    folder = tmp_path_factory.mktemp("dr")
    args = ("--workers", "2", "--group", "g:1MiB", "--listen", "127.0.0.1:0")
    with NodeProcess(folder / "run", *args, "--warm-restart-max-downtime", "0") as found:
        found.await_ready()
        try:
            yield found
        finally:
            found.process.send_signal(signal.SIGCONT)
            assert found.stop() == 0


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in found["checks"]}


def failures(found: dict[str, Any]) -> dict[str, str]:
    return {c["check"]: c["detail"] for c in found["checks"] if c["status"] == "failed"}


# -- a node ---------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_node_that_is_well_has_nothing_failed(alone: NodeProcess, shm_root: Path) -> None:
    found = told("doctor", "--run-dir", alone.run_dir)
    assert set(found) == {"ok", "failed", "warnings", "checks"}
    assert found["ok"] is True
    for check in found["checks"]:
        assert set(check) == {"check", "status", "detail", "remedy"}
        assert (check["remedy"] is None) == (check["status"] == "ok")
    checks = by_name(found)
    assert {
        *("platform", "shared memory", "memory limit", "open files", "run directory", "grpc"),
        *("clock", "left-overs", "version", "node", "shards", "sockets", "roles", "workers"),
        *("restarts", "open files of the node", "grpc of the node", "grpc port", "versions"),
        "cluster",
    } == set(checks)
    assert str(shm_root) in checks["shared memory"]["detail"]
    shown = kamacache("doctor", "--run-dir", alone.run_dir)
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    assert re.search(r"\n\d+ checks: 0 failed, \d+ warnings\n$", shown.stdout)
    by_address = told("doctor", "--address", alone.description().listen)
    assert by_name(by_address)["node"]["status"] == "ok"


@pytest.mark.integration
def test_without_a_node_the_host_is_checked(short_dir: Path) -> None:
    found = told("doctor", "--run-dir", short_dir / "none")
    assert by_name(found)["node"]["status"] == "warning"
    assert "platform" in by_name(found)
    gone = told("doctor", "--address", "127.0.0.1:1", "--timeout", 2, code=1)
    assert set(failures(gone)) == {"node"}


@pytest.mark.integration
def test_a_supervisor_that_stands_still_and_a_version_that_differs(
    alone: NodeProcess, short_dir: Path
) -> None:
    other = short_dir / "run"
    other.mkdir()
    text = json.loads((alone.run_dir / "node.json").read_text())
    (other / "node.json").write_text(json.dumps(text | {"version": "9.9"}))
    other.chmod(0o707)
    found = failures(told("doctor", "--run-dir", other, code=1))
    assert set(found) == {"version", "node", "run directory"}
    assert "the node 9.9" in found["version"]
    assert "no process holds the run directory's lock" in found["node"]
    assert "every user of the host may enter" in found["run directory"]
    alone.process.send_signal(signal.SIGSTOP)
    try:
        about = alone.description()
        end = Path(about.shm_dir) / "control"
        assert end.exists()
        while node.check_serving(RunDir(alone.run_dir), about).status == "ok":
            pass
        found = failures(told("doctor", "--run-dir", alone.run_dir, code=1))
        assert "it stands still" in found["node"]
    finally:
        alone.process.send_signal(signal.SIGCONT)


@pytest.mark.integration
def test_a_worker_that_hangs_and_one_that_died(alone: NodeProcess, wait_until: Any) -> None:
    wait_until(lambda: alone.role("worker 0") and alone.role("worker 1"))
    worker, killed = alone.role("worker 0"), alone.role("worker 1")
    assert worker is not None
    assert killed is not None
    killed.kill()
    wait_until(lambda: alone.role("worker 1") not in (None, killed))
    worker.suspend()
    try:
        found = told("doctor", "--run-dir", alone.run_dir, code=1)
        assert failures(found)["workers"].startswith("worker 0")
        assert "worker 1: 1" in by_name(found)["restarts"]["detail"]
    finally:
        worker.resume()
    (Path(alone.description().sockets_dir) / "worker-1.sock").rename(alone.run_dir / "away")
    try:
        assert "worker 1" in failures(told("doctor", "--run-dir", alone.run_dir, code=1))["sockets"]
    finally:
        (alone.run_dir / "away").rename(alone.description().socket_path(1))


def test_a_port_that_nobody_listens_on_is_named(alone: NodeProcess) -> None:
    import msgspec

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        about = msgspec.structs.replace(alone.description(), listen=address, api=address)
        assert [f.status for f in node.check_ports(about)] == ["failed", "failed"]


# -- a cluster ------------------------------------------------------------------------------------


@pytest.mark.integration
def test_lists_of_peers_that_differ_are_told_from_both_sides(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(3, peers={0: (0, 1), 1: (0, 1, 2)}, workers=1)
    one, other = cluster.nodes[:2]
    cluster.start(0, 1, linked=False)
    cluster.await_links({0: 1, 1: 1})
    mine = failures(told("doctor", "--run-dir", one.run_dir, code=1))
    third = cluster.nodes[2].address
    assert f"{other.address} knows other members" in mine["ring"]
    assert f"it has {third} beside" in mine["ring"]
    theirs = failures(told("doctor", "--address", other.address, code=1))
    assert f"it lacks {third}" in theirs["ring"]
    assert theirs["peers"].startswith(f"1 of 2 do not answer this host: {third}")
    there = failures(told("doctor", "--run-dir", other.run_dir, code=1))
    assert there["links"] == f"1 are not up: worker 0 to {third}: down"


@pytest.mark.integration
def test_a_cluster_with_tls_and_tokens_is_asked_as_its_node_would(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    files = Pki(tmp_path).issue("127.0.0.1", "127.0.0.2")
    secrets = {"tokens": TOKENS, "token": "a-token-of-an-admin\n", "secret": "known-to-the-nodes\n"}
    for name, text in secrets.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    arguments = (
        *("--tls-cert", str(files.tls_cert), "--tls-key", str(files.tls_key)),
        *("--tls-ca", str(Path(tmp_path / "ca.pem")), "--tokens", str(tmp_path / "tokens")),
        *("--peer-secret", str(tmp_path / "secret")),
    )
    cluster = make_cluster(2, workers=1, arguments=arguments)
    cluster.start()
    where = ("--run-dir", cluster.nodes[0].run_dir)
    found = by_name(told("doctor", *where))
    assert found["links"]["status"] == "ok"
    assert found["peers"]["status"] == "warning"
    assert "demand a token" in found["peers"]["detail"]
    known = by_name(told("doctor", *where, "--token-file", tmp_path / "token"))
    assert known["peers"]["status"] == known["ring"]["status"] == "ok"
    remote = ("--address", cluster.nodes[1].address, "--token-file", tmp_path / "token")
    assert told("ring", "key", *remote, "--tls-ca", tmp_path / "ca.pem")["own"]


A, B, C = Member("a:1"), Member("b:1"), Member("c:1", 2)
OURS = Membership(number=3, own="a:1", members=(A, B, C))


def answer(address: str, **fields: Any) -> Told:
    known: dict[str, Any] = {
        "own": address,
        "number": 1,
        "members": (A, B, C),
        "version": "0.1.0",
        "ahead_s": 0.0,
        "uncertain_s": 0.002,
        "took_s": 0.002,
    }
    return Told(address=address, **(known | fields))


def statuses(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


@pytest.mark.parametrize(
    ("fields", "check", "status", "said"),
    [
        ({"own": "x:1"}, "ring", "failed", "calls itself x:1"),
        ({"members": (A, B, Member("c:1"))}, "ring", "failed", "weight 1 instead of 2"),
        ({"version": "0.0.9"}, "versions of peers", "warning", "b:1 0.0.9"),
        ({"version": ""}, "versions of peers", "warning", "too old to say"),
        ({"ahead_s": 2.0}, "clocks of peers", "warning", "b:1 by +2.00 s"),
        ({"ahead_s": -60.0}, "clocks of peers", "failed", "b:1 by -60.00 s"),
        ({"ahead_s": 2.0, "uncertain_s": 3.0}, "clocks of peers", "ok", "within"),
    ],
)
def test_what_a_peer_says_otherwise(
    fields: dict[str, Any], check: str, status: str, said: str
) -> None:
    answers: Any = {"b:1": answer("b:1", **fields), "c:1": answer("c:1")}
    found = {finding.check: finding for finding in cluster_checks(OURS, answers)}
    assert found[check].status == status
    assert said in found[check].detail
    others = {name for name, one in found.items() if one.status != "ok"}
    assert others <= {check}


def test_links_that_are_down_and_invalidations_that_wait() -> None:
    links = {
        0: [LinkNow("b:1", "usable", 0, 0, 0, 0), LinkNow("c:1", "down", 3, 0, 7, 9_000)],
        1: [LinkNow("b:1", "draining", 0, 0, 0, 0), LinkNow("c:1", "usable", 0, 0, 0, 0)],
    }
    answers: Any = {"c:1": answer("c:1"), "b:1": NodeUnavailableError("gone")}
    found = {finding.check: finding for finding in link_checks(links, answers)}
    assert statuses(iter(found.values())) == {"links": "failed", "invalidations": "warning"}
    assert "worker 0 to c:1: down, though it answers" in found["links"].detail
    assert "7 for 9.0 s" in found["invalidations"].detail


# -- the host -------------------------------------------------------------------------------------


def test_platforms() -> None:
    assert host.check_platform("linux", "x86_64").status == "ok"
    assert host.check_platform("linux", "aarch64").status == "warning"
    assert host.check_platform("darwin", "x86_64").status == "failed"


def test_a_folder_that_is_not_there_not_on_tmpfs_or_too_small(tmp_path: Path) -> None:
    assert host.check_shared_memory(str(tmp_path / "none"), 0).status == "failed"
    assert host.check_shared_memory("/dev/shm", 1 << 60).status == "failed"
    if is_tmpfs(tmp_path):
        pytest.skip("temporary files are on tmpfs here")
    assert "not on tmpfs" in host.check_shared_memory(str(tmp_path), 0).detail


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs, in a namespace of its own")
@pytest.mark.parametrize(
    ("size", "filled", "said"),
    [("64m", 0, "what a container has by default"), ("8m", 8_000, "nearly full")],
)
def test_a_small_tmpfs(tmp_path: Path, size: str, filled: int, said: str) -> None:
    script = (
        f"mount -t tmpfs -o size={size} none {tmp_path} && "
        f"head -c {filled}k /dev/zero > {tmp_path}/filled; "
        f"exec {sys.executable} -m kamacache.cli.client doctor --json "
        f"--run-dir {tmp_path}/none --shm-dir {tmp_path}"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no namespace can be made here: {done.stderr.strip()}")
    found = by_name(json.loads(done.stdout))["shared memory"]
    assert found["status"] == "warning"
    assert said in f"{found['detail']} {found['remedy']}"


def test_few_open_files_are_a_warning() -> None:
    done = subprocess.run(
        ["sh", "-c", f"ulimit -n 512; exec {sys.executable} -m kamacache.cli.client doctor --json"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GRPC_EXPERIMENTS": "odd"},
    )
    checks = by_name(json.loads(done.stdout))
    assert "512 open files" in checks["open files"]["detail"]
    assert checks["open files"]["status"] == checks["grpc"]["status"] == "warning"


def test_a_memory_limit_that_leaves_too_little(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    (cgroup / "memory.max").write_text(f"{100 << 20}\n")
    (cgroup / "memory.stat").write_text(f"anon {98 << 20}\nshmem 0\n")
    (tmp_path / "self/cgroup").write_text("0::/\n")
    (tmp_path / "self/mountinfo").write_text(f"1 1 0:1 / {cgroup} rw - cgroup2 cgroup2 rw\n")
    assert host.check_memory_limit(0, tmp_path).status == "warning"
    assert host.check_memory_limit(3 << 20, tmp_path).status == "failed"
    (cgroup / "memory.stat").write_text("anon 0\n")
    assert host.check_memory_limit(3 << 20, tmp_path).status == "ok"


def test_run_directories_that_others_may_enter_or_change(short_dir: Path) -> None:
    for mode, status in ((0o700, "ok"), (0o750, "ok"), (0o755, "failed"), (0o770, "failed")):
        short_dir.chmod(mode)
        assert host.check_run_dir(RunDir(short_dir)).status == status, oct(mode)
    short_dir.chmod(0o700)


@pytest.mark.integration
def test_what_stopped_nodes_left_is_named(shm_root: Path, short_dir: Path) -> None:
    shm = shm_root / "left"
    shm.mkdir()
    args = ("--workers", "1", "--group", "g:1MiB", "--listen", "none", "--shm-dir", str(shm))
    with NodeProcess(short_dir / "run", *args) as found:
        found.await_ready()
        run_dir = RunDir(found.run_dir)
        assert [f.status for f in host.check_left_overs(shm, run_dir)] == ["ok"]
        about = read_description(found.run_dir)
        assert found.stop(signal.SIGINT) == 0
    folder = Path(about.shm_dir)
    folder.mkdir(parents=True)
    try:
        (folder / "g-0.data").write_bytes(b"0" * 8192)
        (stale,) = host.check_left_overs(shm, run_dir)
        assert stale.check == "left-overs"
        assert str(folder) in stale.detail
        keep_shards(about, (), boottime_ms())
        assert (folder / NOTE).exists()
        (kept,) = host.check_left_overs(shm, run_dir)
        assert kept.check == "kept shards"
        assert "kept for its next start" in kept.detail
    finally:
        shutil.rmtree(shm)
