"""``kamacache flush``: drops all records of a group, on this node and on every other one."""

from __future__ import annotations

import sys
from typing import Any, Final

import click

from kamacache.cli.admin.asking import mapped
from kamacache.cli.admin.output import count
from kamacache.cli.client import place_of, place_options, say
from kamacache.errors import ConfigError
from kamacache.local.flushing import flush

EVERY_GROUP: Final = ""


@click.command("flush")
@click.argument("name", metavar="[GROUP]", required=False)
@click.option("--all", "everything", is_flag=True, help="Every group of the cluster.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--local", is_flag=True, help="On this node alone, not on the others.")
@place_options
def command(
    name: str | None,
    everything: bool,
    yes: bool,
    local: bool,
    run_dir: str | None,
    address: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Drop all records of GROUP, on every node of the cluster.

    When it ends with exit code 0, no process of this node, nor of a node that was reached, finds
    what was there before; loads under way answer those who wait and are not kept. A node that was
    not reached is named, and drops its records before the others ask it again. Needs the run
    directory of a node.
    """
    if (name is None) != everything:
        raise click.UsageError("name a GROUP, or give --all for every group")
    run_dir, address = place_of(run_dir, address)
    if address is not None:
        raise ConfigError(
            "a flush needs a run directory: run it on the host of one of the nodes, with --run-dir",
            setting="address",
        )
    with mapped(str(run_dir)) as mapping:
        if name is not None:
            mapping.spec(name)
        clustered = mapping.description.clustered and not local
        what = "every group" if name is None else f"group {name!r}"
        where = "every node of the cluster" if clustered else "this node"
        if not yes:
            _confirm(f"drop all records of {what} on {where}?")
        done = flush(mapping, name or EVERY_GROUP, timeout, everywhere=not local)
    unreached = [node for node in done.nodes if not node.reached]
    if as_json:
        told: dict[str, Any] = {"group": name, "local": local, "dropped": done.dropped}
        nodes = [
            {"address": n.address, "reached": n.reached, "reason": n.reason or None}
            for n in done.nodes
        ]
        say({**told, "nodes": nodes})
    else:
        reached = len(done.nodes) - len(unreached)
        others = f", and all on {reached} other node{'s' * (reached != 1)}" if clustered else ""
        click.echo(f"{what}: {count(done.dropped)} records dropped on this node{others}")
    for node in unreached:
        click.echo(
            f"kamacache: {node.address} was not reached ({node.reason}); it drops its records when "
            "it is back",
            err=True,
        )


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Standard input is no terminal to answer on: say --yes")
    click.confirm(question, abort=True, err=True)
