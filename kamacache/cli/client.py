"""``kamacache``: get, set and delete from a shell, and the commands of `kamacache.cli.admin`.

*Process*: a short-lived one of its own. At a run directory it is an attached process like any
other; with ``--address`` it is a gRPC client, and only then imports grpc.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

import kamacache
from kamacache.cli.access import OPTIONS as ACCESS_OPTIONS
from kamacache.cli.access import access_to
from kamacache.cli.admin import COMMANDS
from kamacache.cli.target import LocalTarget, Target
from kamacache.config import seconds_to_ms
from kamacache.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    KeyTooLongError,
    LoadError,
    NodeUnavailableError,
    ValueTooLargeError,
)
from kamacache.limits import CALL_TIMEOUT_MAX_S, KEY_BYTES_MAX, VALUE_BYTES_CEILING
from kamacache.rundir.layout import default_run_dir
from kamacache.store.entries import Entry

if TYPE_CHECKING:
    import grpc

    from kamacache.v1 import kamacache_pb2

EXIT_NOT_FOUND: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_FAILED: Final = 70  # EX_SOFTWARE: the getter raised, or a defect
EXIT_TIMEOUT: Final = 75  # EX_TEMPFAIL
EXIT_NOT_PERMITTED: Final = 77  # EX_NOPERM

EPILOG: Final = """\
Where: --run-dir, or --address, or else $KAMACACHE_RUN_DIR, $KAMACACHE_ADDRESS, or the default run
directory of this user, in this order.

\b
Examples:
  kamacache set Tom 630 --ttl 60
  kamacache get Tom
  head -c 1000 /dev/urandom | kamacache set --key-hex 00ff -
  kamacache stats --json --address 127.0.0.1:8001
  kamacache stats scores --watch
  kamacache ring Tom
  kamacache doctor

\b
Exit codes: 0 done, 1 the key was not found (doctor: a check failed), 2 wrong usage (also an
unknown group, a key or value that is too large), 69 no node answers, 70 the getter failed, 75 not
answered in time (drain: it still drains), 77 not permitted.
"""


class RemoteTarget:
    """A node's front, over gRPC."""

    def __init__(self, address: str, timeout_s: float) -> None:
        from kamacache.cluster.environment import set_grpc_environment

        set_grpc_environment()
        import grpc

        from kamacache.v1 import kamacache_pb2, kamacache_pb2_grpc

        access = access_to(address)
        self._address = address
        self._metadata, self._tls = access.metadata, access.tls
        self._deadline_s = time.monotonic() + timeout_s
        limits = [
            ("grpc.max_receive_message_length", VALUE_BYTES_CEILING + (1 << 16)),
            ("grpc.enable_http_proxy", 0),  # a cache is not reached through a web proxy
        ]
        self._pb = kamacache_pb2
        self._stub = kamacache_pb2_grpc.CacheStub(access.channel(grpc, address, limits))
        self._error: type[grpc.RpcError] = grpc.RpcError

    def groups(self) -> list[str]:
        """Return the names of the node's groups."""
        reply = self._call(self._stub.Stats, self._pb.StatsRequest())
        return [group.name for group in reply.groups]

    def get(self, group: str, key: bytes) -> Entry | None:
        """Ask the front."""
        reply = self._call(self._stub.Get, self._pb.GetRequest(group=group, key=key))
        if not reply.found:
            return None
        ttl_ms = reply.ttl_ms if reply.HasField("ttl_ms") else None
        return Entry(reply.value, ttl_ms, reply.version)

    def set(self, group: str, key: bytes, value: bytes, ttl_ms: int | None) -> None:
        """Store."""
        request = self._pb.SetRequest(group=group, key=key, value=value, ttl_ms=ttl_ms)
        self._call(self._stub.Set, request)

    def delete(self, group: str, key: bytes) -> bool:
        """Remove; return whether it was there."""
        request = self._pb.DeleteRequest(group=group, key=key)
        return bool(self._call(self._stub.Delete, request).found)

    def stats(self, group: str) -> dict[str, Any]:
        """Return the group's counters."""
        reply = self._call(self._stub.Stats, self._pb.StatsRequest(group=group))
        return dict(reply.groups[0].values)

    def members(self) -> kamacache_pb2.MembersResponse:
        """Return the cluster as the node knows it, its version and its clock."""
        reply: kamacache_pb2.MembersResponse = self._call(
            self._stub.Members, self._pb.MembersRequest()
        )
        return reply

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        from kamacache.cluster.status import from_rpc

        try:
            left_s = max(0.0, self._deadline_s - time.monotonic())
            return method(request, timeout=left_s, metadata=self._metadata)
        except self._error as error:
            raise from_rpc(error, self._address, tls=self._tls) from error


def exit_code(error: KamaCacheError) -> int:
    """Return the exit code that tells a script what kind of failure it was."""
    if isinstance(error, NodeUnavailableError):
        return EXIT_UNAVAILABLE
    if isinstance(error, DeadlineExceededError):
        return EXIT_TIMEOUT
    if isinstance(error, AccessDeniedError):
        return EXIT_NOT_PERMITTED
    usage = (GroupNotFoundError, KeyTooLongError, ValueTooLargeError, ConfigError)
    return EXIT_USAGE if isinstance(error, usage) else EXIT_FAILED


def fail(message: str, code: int) -> NoReturn:
    """Say one sentence on stderr and end."""
    click.echo(f"kamacache: {message}", err=True)
    sys.exit(code)


class Commands(click.Group):
    """Turns every `KamaCacheError` of a command into its sentence and exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, those of `kamacache.cli.admin` too."""
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return a command, imported now: a get needs none of the others."""
        if name not in COMMANDS:
            return super().get_command(ctx, name)
        found: click.Command = import_module(COMMANDS[name]).command
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LoadError as error:
            fail(f"the value could not be loaded: {error}", EXIT_FAILED)
        except KamaCacheError as error:
            fail(str(error), exit_code(error))


def target_of(run_dir: str | None, address: str | None, timeout_s: float) -> Target:
    """Return the node to ask; options beat the environment."""
    run_dir, address = place_of(run_dir, address)
    if address is not None:
        return RemoteTarget(address, timeout_s)
    return LocalTarget(str(run_dir), timeout_s)


def place_of(run_dir: str | None, address: str | None) -> tuple[str | None, str | None]:
    """Return the run directory or the address to ask, one of them; options beat the environment."""
    if run_dir is not None and address is not None:
        raise click.UsageError("give --run-dir or --address, not both")
    if run_dir is None and address is None:
        run_dir = os.environ.get("KAMACACHE_RUN_DIR") or None
        address = None if run_dir else os.environ.get("KAMACACHE_ADDRESS") or None
    if address is None:
        return run_dir or str(default_run_dir()), None
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit()):
        raise click.UsageError(f"address {address!r}: write HOST:PORT, such as 10.0.0.1:8001")
    return None, address


def group_of(target: Target, group: str | None) -> str:
    """Return the group to use: the one named, or the only one there is."""
    if group is not None:
        return group
    names = target.groups()
    if len(names) != 1:
        has = f"has {len(names)} groups ({', '.join(names[:16])})" if names else "has no groups"
        raise click.UsageError(f"the node {has}; name one with --group")
    return names[0]


def key_of(text: str, as_hex: bool) -> bytes:
    """Return a key's bytes: those of the argument as typed, or the ones its hex digits say."""
    if as_hex:
        try:
            key = bytes.fromhex(text)
        except ValueError as error:
            raise click.UsageError(f"key {text!r}: --key-hex needs pairs of hex digits") from error
    else:
        key = os.fsencode(text)
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise click.UsageError(f"the key has {len(key)} bytes; 1 to {KEY_BYTES_MAX} are allowed")
    return key


def as_text(name: str, data: bytes) -> dict[str, str]:
    """Return bytes as JSON can hold them: text, or base64 under another name."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def say(answer: dict[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    click.echo(json.dumps(answer))


def where_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of all commands that are about one group."""
    option = click.option(
        "--group", metavar="NAME", help="May be left out where the node has one group."
    )
    return option(place_options(command))


def place_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all commands have."""
    for option in (
        *ACCESS_OPTIONS,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option(
            "--timeout",
            type=click.FloatRange(0.001, CALL_TIMEOUT_MAX_S),
            default=10.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait for the answer, loading included.",
        ),
        click.option("--address", metavar="HOST:PORT", help="A node's gRPC address."),
        click.option(
            "--run-dir",
            type=click.Path(file_okay=False),
            metavar="DIR",
            help="Run directory of a node on this host.",
        ),
    ):
        command = option(command)
    return command


def key_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the key."""
    option = click.option("--key-hex", is_flag=True, help="KEY is written in hex digits.")
    return click.argument("key")(option(command))


@click.group(
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(kamacache.__version__, prog_name="kamacache")
def command() -> None:
    """Read, write, watch and tend a KamaCache node from the shell.

    A KEY or VALUE that begins with "-" comes after "--".
    """


@command.command("get")
@key_options
@where_options
def get_command(
    key: str,
    key_hex: bool,
    group: str | None,
    run_dir: str | None,
    address: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Print the value of KEY, its bytes unchanged; load it where the group can.

    On a terminal a newline follows. With --json: found, value (or value_base64 where it is not
    UTF-8), ttl_ms (null: does not expire) and version.
    """
    key_bytes = key_of(key, key_hex)
    target = target_of(run_dir, address, timeout)
    name = group_of(target, group)
    entry = target.get(name, key_bytes)
    about = {"group": name, **as_text("key", key_bytes), "found": entry is not None}
    if entry is None:
        if as_json:
            say(about)
        fail(f"group {name!r}: key {key!r} is not found", EXIT_NOT_FOUND)
    if as_json:
        say(
            {
                **about,
                **as_text("value", entry.value),
                "ttl_ms": entry.ttl_ms,
                "version": entry.version,
            }
        )
        return
    sys.stdout.buffer.write(entry.value)
    if sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


@command.command("set")
@key_options
@click.argument("value")
@click.option(
    "--ttl", type=float, metavar="SECONDS", help="Time to live. Default: the group's own."
)
@where_options
def set_command(
    key: str,
    key_hex: bool,
    value: str,
    ttl: float | None,
    group: str | None,
    run_dir: str | None,
    address: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Store VALUE under KEY; a VALUE of "-" is read from standard input."""
    key_bytes = key_of(key, key_hex)
    ttl_ms = seconds_to_ms(ttl, "--ttl")
    target = target_of(run_dir, address, timeout)
    name = group_of(target, group)
    if value == "-":  # one byte more than can be stored, so that too much is refused, not cut
        value_bytes = sys.stdin.buffer.read(VALUE_BYTES_CEILING + 1)
    else:
        value_bytes = os.fsencode(value)
    if len(value_bytes) > VALUE_BYTES_CEILING:
        raise click.UsageError(f"the value is above {VALUE_BYTES_CEILING} bytes")
    target.set(name, key_bytes, value_bytes, ttl_ms)
    if as_json:
        say({"group": name, **as_text("key", key_bytes), "value_bytes": len(value_bytes)})


@command.command("delete")
@key_options
@where_options
def delete_command(
    key: str,
    key_hex: bool,
    group: str | None,
    run_dir: str | None,
    address: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Remove KEY. Exit code 1 where it was not there."""
    key_bytes = key_of(key, key_hex)
    target = target_of(run_dir, address, timeout)
    name = group_of(target, group)
    found = target.delete(name, key_bytes)
    if as_json:
        say({"group": name, **as_text("key", key_bytes), "found": found})
    if not found:
        fail(f"group {name!r}: key {key!r} was not there", EXIT_NOT_FOUND)


def main() -> None:
    """Entry point of the command."""
    command.main(prog_name="kamacache")


if __name__ == "__main__":
    main()
