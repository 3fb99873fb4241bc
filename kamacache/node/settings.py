"""A node's settings: flags beat the environment, the environment beats the TOML file.

*Process*: the command and the program that embeds a `Node`; the supervisor gets the result. One
table names each setting once; flag, environment variable and TOML key follow from its name::

    run_dir    --run-dir    KAMACACHE_RUN_DIR    run_dir = "..." (or run-dir)
"""

from __future__ import annotations

import grp
import importlib.util
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from kamacache.errors import ConfigError
from kamacache.limits import (
    FRONTS_MAX,
    SLOW_LOAD_MS_MAX,
    WARM_RESTART_DOWNTIME_MAX_S,
    WARM_RESTART_DOWNTIME_S,
    WORKERS_MAX,
)
from kamacache.node.address import Address, parse_address
from kamacache.node.exposure import check_exposure
from kamacache.node.group_options import Fields, group_fields, nearest, parse_group
from kamacache.node.inherited import InheritedSocket
from kamacache.node.place import Place, find_place
from kamacache.rundir.layout import SHM_ROOT, default_run_dir
from kamacache.rundir.live import LiveSettings, SecurityFiles
from kamacache.security.files import read_bounded

ENVIRONMENT_PREFIX: Final = "KAMACACHE_"
LISTEN_DEFAULT: Final = "127.0.0.1:8001"
WORKERS_DEFAULT_MAX: Final = 8
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("console", "json")
_NONE: Final = ("", "none")
_GID_NONE: Final = 2**32 - 1  # (gid_t) -1 is "let the group be", chown(2)
_HTTP_PACKAGES: Final = ("starlette", "uvicorn")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What one host's node is to be; checked, nothing of it acted upon yet."""

    run_dir: Path
    shm_dir: Path = Path(SHM_ROOT)
    workers: int = 1
    fronts: int = 0
    listen: Address | None = None  # None: no gRPC
    place: Place = field(default_factory=Place)
    api: Address | None = None  # None: no HTTP
    api_fd: int | None = None  # of a socket that listens there already
    app: str | None = None
    groups: dict[str, Fields] = field(default_factory=dict)
    socket_gid: int | None = None
    log_level: str = "info"
    log_format: str = "console"
    slow_load_ms: int = 0  # 0: no load is logged for being slow
    security: SecurityFiles = field(default_factory=SecurityFiles)
    cautions: tuple[str, ...] = ()  # of what is not wrong, a sentence each; for the log
    warm_restart_max_downtime_s: float = 0  # 0: the shards go with the node

    def live(self, number: int) -> LiveSettings:
        """Return what the roles are told of them, as of this reload."""
        return LiveSettings(
            number=number,
            log_level=self.log_level,
            slow_load_ms=self.slow_load_ms,
            security=self.security,
        )


def workers_default() -> int:
    """Return one worker for each CPU we may use, up to `WORKERS_DEFAULT_MAX`."""
    return min(len(os.sched_getaffinity(0)), WORKERS_DEFAULT_MAX)


def _bad(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r}; {expected}", setting=name, value=str(value))


def _whole(least: int, most: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        try:
            count = int(value) if isinstance(value, str) else value
        except ValueError:
            count = None
        if not isinstance(count, int) or isinstance(count, bool) or not least <= count <= most:
            raise _bad(name, value, f"give a whole number from {least} to {most}")
        return count

    return read


def _seconds(most: float) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        try:
            seconds = float(value) if isinstance(value, str | int | float) else -1.0
        except ValueError:
            seconds = -1.0
        if isinstance(value, bool) or not 0 <= seconds <= most:  # "not a number" is neither
            raise _bad(name, value, f"give seconds from 0 to {most:g}")
        return seconds

    return read


def _path(name: str, value: Any) -> str | None:
    text = _text(name, value)
    return os.path.abspath(text) if text else None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise _bad(name, value, "give text")
    return value


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if not isinstance(value, str) or value.lower() not in {*words, ""}:
        raise _bad(name, value, "give true or false")
    return words.get(value.lower(), False)


def _choice(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise _bad(name, value, f"choose one of {', '.join(choices)}")
        return value.lower()

    return read


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str):  # the environment: separated by blanks, since "," has a meaning
        return value.split()
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise _bad(name, value, "give a list of texts")
    return list(value)


def _peers(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else _texts(name, value)
    return [peer.strip() for text in texts for peer in text.split(",") if peer.strip()]


READERS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "workers": _whole(1, WORKERS_MAX),
    "fronts": _whole(0, FRONTS_MAX),
    "listen": _text,
    "app": _text,
    "group": _texts,
    "run_dir": _text,
    "shm_dir": _text,
    "socket_group": _text,
    "insecure": _truth,
    "log_level": _choice(LOG_LEVELS),
    "log_format": _choice(LOG_FORMATS),
    "peers": _peers,
    "discover": _text,
    "advertise": _text,
    "api": _text,
    "slow_load_ms": _whole(0, SLOW_LOAD_MS_MAX),
    "warm_restart_max_downtime": _seconds(WARM_RESTART_DOWNTIME_MAX_S),
    **dict.fromkeys(SecurityFiles.__struct_fields__, _path),
}


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings of a TOML file, keys with ``_``; raises `ConfigError`."""
    # A supervisor that reloads must not wait for a pipe's writer, nor read without end.
    data = read_bounded("config", os.fspath(path))
    try:
        found = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # of TOML, UTF-8; nested too deeply
        raise ConfigError(f"config file {path} is not TOML: {error}", setting="config") from error
    settings = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name != "groups" and name not in READERS:
            raise ConfigError(
                f"config file {path}: unknown key {key!r}{nearest(name, [*READERS, 'groups'])}",
                setting=key,
                value=str(value),
            )
        settings[name] = value
    return settings


def source_of(
    name: str, flags: Mapping[str, Any], environment: Mapping[str, str], file: Mapping[str, Any]
) -> Literal["flag", "environment", "file"] | None:
    """Return where a setting's value comes from; None: nobody set it."""
    if flags.get(name) not in (None, ()):
        return "flag"
    if ENVIRONMENT_PREFIX + name.upper() in environment:
        return "environment"
    return "file" if name in file else None


def from_layers(
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Mapping[str, Any],
    inherited: InheritedSocket | None = None,
) -> NodeSettings:
    """Return the node that flags, environment and file together describe.

    ``flags`` and ``file`` map names of settings to values (a flag that was not given is absent or
    None); ``environment`` is the process's. Groups of all three are joined, by name the stronger
    source wins. HTTP listens on the ``inherited`` socket, where there is one. Raises `ConfigError`.
    """
    values: dict[str, Any] = {}
    for name, read in READERS.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        match source_of(name, flags, environment, file):
            case "flag":
                values[name] = read("--" + name.replace("_", "-"), flags[name])
            case "environment":
                values[name] = read(variable, environment[variable])
            case "file":
                values[name] = read(f"{name} in the config file", file[name])
    groups = _file_groups(file)
    layers = (
        file.get("group"),
        environment.get(ENVIRONMENT_PREFIX + "GROUP"),
        flags.get("group"),
    )
    for layer in layers:
        for text in _texts("group", layer or ()):
            name, fields = parse_group(text)
            groups[name] = {**groups.get(name, {}), **fields}
    listen = _listen(values)
    place = find_place(
        listen,
        listen_text=values.get("listen", LISTEN_DEFAULT),
        peers=values.get("peers", ()),
        discover=values.get("discover"),
        advertise=values.get("advertise"),
    )
    told = values.get("api")
    api = read_api(inherited.agree(told) if inherited else told)
    security = SecurityFiles(**{name: values.get(name) for name in SecurityFiles.__struct_fields__})
    insecure = values.get("insecure", False)
    cautions = check_exposure(security, place, {"listen": listen, "api": api}, insecure=insecure)
    return NodeSettings(
        run_dir=Path(values.get("run_dir") or default_run_dir()),
        shm_dir=Path(values.get("shm_dir") or SHM_ROOT),
        workers=values.get("workers", workers_default()),
        fronts=values.get("fronts", 1) if listen else 0,
        listen=listen,
        place=place,
        api=api,
        api_fd=inherited.fd if inherited else None,
        app=values.get("app") or None,
        groups=groups,
        socket_gid=group_id(values.get("socket_group")),
        log_level=values.get("log_level", "info"),
        log_format=values.get("log_format", "console"),
        slow_load_ms=values.get("slow_load_ms", 0),
        security=security,
        cautions=cautions,
        warm_restart_max_downtime_s=values.get(
            "warm_restart_max_downtime", WARM_RESTART_DOWNTIME_S
        ),
    )


def _file_groups(file: Mapping[str, Any]) -> dict[str, Fields]:
    tables = file.get("groups", {})
    if not isinstance(tables, Mapping) or not all(isinstance(t, Mapping) for t in tables.values()):
        raise ConfigError(
            "groups in the config file: write a table [groups.NAME] for each", setting="groups"
        )
    try:
        return {name: group_fields(name, table) for name, table in tables.items()}
    except ConfigError as error:
        raise ConfigError(
            f"in the config file, {error}", setting=error.setting, value=error.value
        ) from error


def _listen(values: Mapping[str, Any]) -> Address | None:
    text = values.get("listen", LISTEN_DEFAULT)
    if text.lower() in _NONE or values.get("fronts", 1) == 0:
        return None
    return parse_address(text, "listen")


def read_api(text: str | None) -> Address | None:
    """Return where HTTP listens, None for no HTTP.

    Raises `ConfigError` where it cannot for want of packages.
    """
    if text is None or text.lower() in _NONE:
        return None
    address = parse_address(text, "api")
    missing = [name for name in _HTTP_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"api is {text!r}, and HTTP needs {' and '.join(missing)}: "
            "pip install 'kamacache[http]'",
            setting="api",
            value=text,
        )
    return address


def group_id(group: str | None) -> int | None:
    """Return the number of a Unix group, given by name or number; raises `ConfigError`."""
    if not group:
        return None
    if group.isdecimal() and int(group) < _GID_NONE:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ConfigError(
            f"socket_group is {group!r}, and the system has no such group",
            setting="socket_group",
            value=group,
        ) from error
