"""``kamacache doctor``: looks for what is wrong with a node, its host and its cluster."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Final

import click
import msgspec
import psutil

from kamacache.cli.admin.asking import as_node, ask_members, links_of, mapped, membership_of
from kamacache.cli.admin.diagnosis import Finding, Status, failed, ok, warning
from kamacache.cli.admin.diagnosis.cluster import ask_cluster, cluster_checks, link_checks
from kamacache.cli.admin.diagnosis.host import check_grpc_environment, host_checks
from kamacache.cli.admin.diagnosis.node import (
    check_attaching,
    check_ports,
    check_serving,
    check_version,
    check_versions_clock,
    needed_bytes,
    snapshot_checks,
)
from kamacache.cli.admin.output import BAD, GOOD, WARNING, columns_of_terminal, paint
from kamacache.cli.client import place_of, place_options, say
from kamacache.cluster.membership import Membership
from kamacache.errors import KamaCacheError, NodeUnavailableError
from kamacache.local.observing import observe
from kamacache.rundir.description import NodeDescription, read_description
from kamacache.rundir.layout import SHM_ROOT, RunDir, default_run_dir

EXIT_CHECK_FAILED: Final = 1
COLOURS: Final[dict[Status, str]] = {"ok": GOOD, "warning": WARNING, "failed": BAD}
MARGIN: Final = 9  # columns before what was found


@click.command("doctor")
@click.option(
    "--shm-dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Where shards are kept. Default: the node's, $KAMACACHE_SHM_DIR, or /dev/shm.",
)
@place_options
def command(
    shm_dir: str | None,
    run_dir: str | None,
    address: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Check the host, the node that runs here, and its cluster; change nothing.

    Without a node it checks the host. With --address: the host, and the cluster as that node knows
    it. Every check is ok, a warning, or failed with what to do. Exit code 1 where one failed.
    """
    run_dir, address = place_of(run_dir, address)
    found: list[Finding] = []
    for finding in _look(run_dir, address, shm_dir, timeout):
        found.append(finding)
        if not as_json:
            _print(finding)
    bad = sum([finding.status == "failed" for finding in found])
    warned = sum([finding.status == "warning" for finding in found])
    if as_json:
        told = {"ok": not bad, "failed": bad, "warnings": warned}
        say({**told, "checks": msgspec.to_builtins(found)})
    else:
        click.echo(f"\n{len(found)} checks: {bad} failed, {warned} warnings")
    sys.exit(EXIT_CHECK_FAILED if bad else 0)


def _look(
    run_dir: str | None, address: str | None, shm_dir: str | None, timeout_s: float
) -> Iterator[Finding]:
    root = shm_dir or os.environ.get("KAMACACHE_SHM_DIR") or SHM_ROOT
    where = RunDir(run_dir or default_run_dir())
    about: NodeDescription | None = None
    trouble: NodeUnavailableError | None = None
    if run_dir is not None:
        try:
            about = read_description(where)
            root = shm_dir or os.path.dirname(os.path.dirname(about.shm_dir))
        except NodeUnavailableError as error:
            trouble = error
    # What runs has its memory already: a start of the same anew is what has to find room.
    free_again = about is not None and check_serving(where, about).status == "ok"
    needed = 0 if about is None or free_again else needed_bytes(about)
    yield from host_checks(root, where, needed_bytes=needed)
    if address is not None:
        yield from _by_address(address, timeout_s)
    elif about is not None:
        yield from _node(where, about, timeout_s)
    elif trouble is not None and where.description_path.exists():
        yield failed("node", str(trouble), "use the node's version, and a user who may read it")
    else:
        yield warning("node", str(trouble), "start one, or name its run directory: --run-dir")


def _node(where: RunDir, about: NodeDescription, timeout_s: float) -> Iterator[Finding]:
    yield check_version(about)
    serving = check_serving(where, about)
    yield serving
    if serving.status != "ok":
        return
    with contextlib.suppress(psutil.Error, OSError):  # another user's is not to be read
        environment = psutil.Process(about.pid).environ()
        yield check_grpc_environment(environment, check="grpc of the node")
    yield from check_attaching(about)
    try:
        snapshot = observe(where)
        yield from snapshot_checks(snapshot)
        yield from check_ports(about)
        with mapped(str(where.path)) as mapping:
            yield check_versions_clock(mapping)
            if not about.clustered:
                yield ok("cluster", "the node is of none")
                return
            as_node(about)
            membership = membership_of(mapping)
            answers = ask_cluster(membership, timeout_s)
            yield from cluster_checks(membership, answers)
            yield from link_checks(links_of(mapping), answers)
    except KamaCacheError as error:
        yield failed("node", f"it cannot be asked: {error}", "it may be ending: look again")


def _by_address(address: str, timeout_s: float) -> Iterator[Finding]:
    try:
        told = ask_members(address, timeout_s)
    except KamaCacheError as error:
        yield failed("node", str(error), "is it up, and is this its gRPC address?")
        return
    yield ok("node", f"{address} answers, kamacache {told.version or '(too old to say)'}")
    membership = Membership(number=told.number, own=told.own, members=told.members)
    if not membership.others:
        yield ok("cluster", "the node knows no other")
        return
    yield from cluster_checks(membership, ask_cluster(membership, timeout_s))


def _print(finding: Finding) -> None:
    width = columns_of_terminal() or sys.maxsize
    click.echo(f"{paint(finding.status.ljust(MARGIN), COLOURS[finding.status])}", nl=False)
    lines = _wrapped(f"{finding.check}: {finding.detail}", width - MARGIN)
    if finding.remedy:
        lines += _wrapped(f"-> {finding.remedy}", width - MARGIN)
    click.echo(f"\n{' ' * MARGIN}".join(lines))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_on_hyphens=False) or [""]
