"""How the ``kamacache`` command reaches a node over gRPC: its options for TLS and a token.

*Process*: the command's own. The options are kept in click's context, and every command that names
an address has them by `where_options` (`kamacache.cli.client`) without saying so itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from kamacache.errors import ConfigError
from kamacache.rundir.live import SecurityFiles
from kamacache.security.files import read_bounded

if TYPE_CHECKING:
    from kamacache.client.access import Access

SYSTEM_ROOTS: Final = "system"
_META: Final = "kamacache.access."


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    assert param.name is not None
    from_user = ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    ctx.meta[_META + param.name] = value, from_user


def _option(name: str, metavar: str, text: str) -> Callable[..., Any]:
    variable = "KAMACACHE_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(
        name, metavar=metavar, envvar=variable, expose_value=False, callback=_keep, help=text
    )


OPTIONS: Final = (
    click.option(
        "--insecure",
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Send the token without TLS beyond this host, too.",
    ),
    _option("--token-file", "FILE", "The token, for a node that demands one: its first line."),
    _option("--tls-key", "FILE", "The key of --tls-cert."),
    _option("--tls-cert", "FILE", "A certificate, for a node that demands one of its clients."),
    _option(
        "--tls-ca",
        "FILE",
        "Call over TLS, a node whose certificate comes from this CA; "
        f"'{SYSTEM_ROOTS}': from one that this system trusts.",
    ),
)


def use_node_files(files: SecurityFiles) -> None:
    """Call other nodes as this host's node calls them, where the user has said nothing of TLS."""
    context = click.get_current_context(silent=True)
    if context is None or not files.tls_ca or context.meta.get(_META + "tls_ca", (None,))[0]:
        return
    for name in ("tls_ca", "tls_cert", "tls_key"):
        context.meta[_META + name] = getattr(files, name), True


def access_to(address: str) -> Access:
    """Return what the options say; raises `ConfigError`."""
    from kamacache.client.access import Access

    context = click.get_current_context(silent=True)
    meta = {} if context is None else context.meta

    def given(name: str) -> tuple[Any, bool]:
        found: tuple[Any, bool] = meta.get(_META + name, (None, False))
        return found

    ca = given("tls_ca")[0] or None
    # A node's host may have the variables of the node: they are no wish of this command's user.
    cert, key = (
        value if ca or from_user else None
        for value, from_user in (given("tls_cert"), given("tls_key"))
    )
    token_file = given("token_file")[0]
    access = Access(
        True if ca == SYSTEM_ROOTS else ca,
        cert,
        key,
        _token(token_file) if token_file else None,
        insecure=bool(given("insecure")[0]),
    )
    access.check_seed(address)
    return access


def _token(path: str) -> str:
    data = read_bounded("token_file", path, secret=True)
    try:
        line = data.decode("ascii").partition("\n")[0].strip()
    except UnicodeDecodeError:
        line = ""
    if not line:
        raise ConfigError(
            f"token_file: the first line of {path} is no token; it is printable ASCII",
            setting="token_file",
            value=path,
        )
    return line
