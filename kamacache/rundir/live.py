"""``live.json``: the settings of a node that may change while it runs.

*Process*: written by the supervisor, before the first role starts and at each reload; read by each
role, when the supervisor says the word ``reload`` (`kamacache.rundir.context`). Written whole and
renamed. It names files of secrets and holds none.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from kamacache.errors import NodeUnavailableError
from kamacache.rundir.files import write_whole


class SecurityFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where certificates, keys and tokens lie; all absolute, None where there is none."""

    tls_cert: str | None = None  # of this node, with the chain to its CA; PEM, as all are
    tls_key: str | None = None
    tls_ca: str | None = None  # which other nodes' certificates must come from
    tls_client_ca: str | None = None  # which every client's must come from: mutual TLS
    tokens: str | None = None  # who may read and write which groups
    peer_secret: str | None = None  # by which the nodes of a cluster know each other


class LiveSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload may change in the roles."""

    number: int = 0  # of the reload; 0: as the node was started
    log_level: str = "info"
    slow_load_ms: int = 0  # loads that take longer are logged; 0: none is
    security: SecurityFiles = SecurityFiles()


def live_path(sockets_dir: str | os.PathLike[str]) -> Path:
    """Return where the settings of an epoch lie."""
    return Path(sockets_dir) / "live.json"


def write_live(sockets_dir: str | os.PathLike[str], live: LiveSettings) -> None:
    """Publish the settings; raises OSError. For the supervisor."""
    write_whole(live_path(sockets_dir), msgspec.json.encode(live))


def read_live(sockets_dir: str | os.PathLike[str]) -> LiveSettings:
    """Return the settings as they are now; raises `NodeUnavailableError` where they are gone."""
    path = live_path(sockets_dir)
    try:
        return msgspec.json.decode(path.read_bytes(), type=LiveSettings)
    except (OSError, msgspec.MsgspecError) as error:
        raise NodeUnavailableError(f"{path} cannot be read: {error}") from error
