"""``kamacache-node``: flags, environment and file in, a supervisor out.

*Process*: becomes the supervisor. Wiring only: the settings are `kamacache.node.settings`.

The ready line is the one line on stdout, and stable::

    kamacache-node ready: 8 workers, listening on 127.0.0.1:8001, attach with KAMACACHE_RUN_DIR=/...

("not listening" in place of "listening on ..." without gRPC; "1 worker" for one).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from functools import partial
from typing import Any

import click

import kamacache
from kamacache.errors import ConfigError
from kamacache.limits import (
    FRONTS_MAX,
    SLOW_LOAD_MS_MAX,
    WARM_RESTART_DOWNTIME_MAX_S,
    WARM_RESTART_DOWNTIME_S,
    WORKERS_MAX,
)
from kamacache.node.exits import NodeEndError, why_no_node
from kamacache.node.inherited import InheritedSocket, take_inherited
from kamacache.node.settings import (
    ENVIRONMENT_PREFIX,
    LISTEN_DEFAULT,
    LOG_FORMATS,
    LOG_LEVELS,
    NodeSettings,
    from_layers,
    read_file,
    source_of,
)
from kamacache.rundir.context import EXIT_CONFIG, EXIT_ROLE

EPILOG = """\
Every option is also a variable (--run-dir: KAMACACHE_RUN_DIR) and a key of the TOML file
(run_dir = "..."), where groups are tables: [groups.scores] cache_bytes = "64MiB". Options beat
variables, variables beat the file.

\b
Examples:
  kamacache-node --group scores:64MiB
  kamacache-node --workers 8 --app myapp.cache:groups --run-dir /run/myapp-cache
  kamacache-node --listen 10.0.0.1:8001 --insecure --peers 10.0.0.1:8001,10.0.0.2:8001 ...
  kamacache-node --config /etc/kamacache/node.toml --log-format json

\b
Exit codes: 0 stopped as told, 2 wrong usage, 3 a role could not start, 4 the app could not be
loaded, 78 a setting cannot work. Signals: TERM finishes what is in flight, INT and QUIT end at
once.
"""


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.option(
    "--workers",
    type=click.IntRange(1, WORKERS_MAX),
    metavar="N",
    help="Worker processes; each owns one shard of every group. Default: one for each "
    "CPU, at most 8.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help=f"Where the gRPC fronts listen; 'none' for no gRPC. Default: {LISTEN_DEFAULT}.",
)
@click.option(
    "--fronts",
    type=click.IntRange(0, FRONTS_MAX),
    metavar="M",
    help="gRPC front processes, sharing the port; 0 for no gRPC. Default: 1.",
)
@click.option(
    "--app",
    metavar="MODULE:ATTR",
    help="The groups with their getters: a Group, a list of Groups, a Node, or a "
    "callable that returns one. Imported from the working directory, in the workers.",
)
@click.option(
    "--group",
    multiple=True,
    metavar="NAME:SIZE[,OPTION=VALUE...]",
    help="A group without a getter, or another size for one of the app's: "
    "scores:64MiB,eviction=s3fifo,ttl=60. May be given more than once.",
)
@click.option(
    "--run-dir",
    metavar="DIR",
    help="Where processes attach; one node for each. Default: $XDG_RUNTIME_DIR/"
    "kamacache, for root /run/kamacache.",
)
@click.option("--shm-dir", metavar="DIR", help="Folder on tmpfs for the shards. Default: /dev/shm.")
@click.option("--config", metavar="FILE", help="TOML file with any of these settings.")
@click.option(
    "--socket-group",
    metavar="GROUP",
    help="A Unix group whose processes may attach too. Default: only the own user's.",
)
@click.option(
    "--insecure",
    is_flag=True,
    default=None,
    help="Listen (and serve HTTP) beyond loopback although there is neither TLS nor a token.",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="Default: info.")
@click.option("--log-format", type=click.Choice(LOG_FORMATS), help="Default: console.")
@click.option(
    "--peers",
    multiple=True,
    metavar="HOST:PORT[=WEIGHT],...",
    help="All nodes of the cluster, this one included; the same text on every node.",
)
@click.option(
    "--discover",
    metavar="URL",
    help="What knows the cluster's nodes, now and later: static:, file:, dns:, etcd:// or nacos://.",
)
@click.option(
    "--advertise",
    metavar="HOST:PORT",
    help="This node's name in the cluster, by which the others reach it. Default: --listen.",
)
@click.option("--api", metavar="HOST:PORT", help="Where HTTP listens. Default: no HTTP.")
@click.option(
    "--slow-load-ms",
    type=click.IntRange(0, SLOW_LOAD_MS_MAX),
    metavar="MS",
    help="Log loads that take longer. Default: none.",
)
@click.option(
    "--warm-restart-max-downtime",
    type=click.FloatRange(0, WARM_RESTART_DOWNTIME_MAX_S),
    metavar="SECONDS",
    help="A node that TERM stopped leaves its shards for one that starts within this time; 0: "
    f"never. Default: {WARM_RESTART_DOWNTIME_S:g}.",
)
@click.option("--tls-cert", metavar="FILE", help="This node's certificate, with its chain (PEM).")
@click.option("--tls-key", metavar="FILE", help="The key of --tls-cert (PEM, not encrypted).")
@click.option(
    "--tls-ca",
    metavar="FILE",
    help="Certificates (PEM) from which those of the other nodes must come.",
)
@click.option(
    "--tls-client-ca",
    metavar="FILE",
    help="Certificates (PEM) from which every client's must come: mutual TLS.",
)
@click.option(
    "--tokens", metavar="FILE", help="TOML file of tokens, and the groups that each may use."
)
@click.option(
    "--peer-secret",
    metavar="FILE",
    help="A secret by which the nodes of a cluster know each other; the same on all of them.",
)
@click.option(
    "--check-config",
    is_flag=True,
    help="Say what the node would be and whether it could start, and end. Exit codes: 0 it could, "
    "4 the app cannot be loaded, 78 anything else.",
)
@click.version_option(kamacache.__version__, prog_name="kamacache-node")
def command(config: str | None, check_config: bool, **flags: Any) -> None:
    """Run a cache node on this host: worker processes that hold groups in shared memory.

    Attach to it from Python with kamacache.attach(DIR), or by KAMACACHE_RUN_DIR=DIR in the
    environment of the program.
    """
    sys.exit(_run(config, flags, check_only=check_config))


def _run(config: str | None, flags: dict[str, Any], *, check_only: bool = False) -> int:
    if (reason := why_no_node()) is not None:
        return _refused(EXIT_ROLE, reason)
    environment = dict(os.environ)
    path = config or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    try:
        inherited = take_inherited()
        reread = partial(_settings, flags, environment, path and os.path.abspath(path), inherited)
        settings = reread()
        if check_only:
            return _check(settings, flags, environment, path)
    except ConfigError as error:
        return _refused(EXIT_CONFIG, str(error))
    # Now and not at the top: --help and a wrong flag answer without loading the node.
    from kamacache.node.logs import configure_logs, node_label
    from kamacache.node.supervisor import Supervisor

    configure_logs(
        settings.log_level,
        settings.log_format,
        node=node_label(settings.place.name, settings.listen, settings.run_dir),
    )
    try:
        return Supervisor(settings, reread=reread, on_ready=_say).run()
    except NodeEndError as error:
        return _ended(error, settings.log_format) if error.code else 0


def _check(
    settings: NodeSettings, flags: dict[str, Any], environment: dict[str, str], path: str | None
) -> int:
    """Print what the node would be; return the exit code."""
    from kamacache.node.checking import check

    found = check(settings, flags, environment, read_file(path) if path else {})
    for line in found.lines():
        click.echo(line)
    return found.code


def _settings(
    flags: dict[str, Any],
    environment: dict[str, str],
    path: str | None,
    inherited: InheritedSocket | None,
) -> NodeSettings:
    """Return the node that flags, environment and file describe now; raises `ConfigError`."""
    file = read_file(path) if path else {}
    try:
        return from_layers(flags, environment, file, inherited)
    except ConfigError as error:
        text, setting = str(error), error.setting or ""
        in_file = "config file" in text or source_of(setting, flags, environment, file) == "file"
        if path is None or path in text or not in_file:
            raise
        raise ConfigError(f"{text} (config file {path})", setting=setting) from error


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more: no reason to end
        os.write(1, f"{line}\n".encode())  # print would fail once more when Python ends


def _ended(error: NodeEndError, log_format: str) -> int:
    """Say why the node ends, in a line of the log's form; return the exit code."""
    from kamacache.node.stderr import Stderr

    if log_format == "json":
        fields = {"code": error.code, "reason": error.message}
        logging.getLogger("kamacache.node").error("the node cannot run", extra=fields)
    else:  # not print: a pipe that nobody reads must not keep the process
        Stderr().write(f"kamacache-node: {error.message}\n")
    return error.code


def _refused(code: int, message: str) -> int:
    print(f"kamacache-node: {message}", file=sys.stderr, flush=True)
    return code


def _open_streams() -> None:
    """Put /dev/null where a starter closed a standard stream: a pipe would take its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def main() -> None:
    """Run the command; the console script."""
    _open_streams()
    command.main(prog_name="kamacache-node")


if __name__ == "__main__":
    main()
