"""What a group is: its settings, checked and written down for every process of the node.

*Process*: all. `GroupSpec` is what the node publishes in its run directory; what only the process
at hand needs (getter, codec, near cache) stays in `kamacache.group.Group`.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from kamacache.errors import ConfigError
from kamacache.limits import LOAD_THREADS, LOAD_THREADS_MAX, LOAD_TIMEOUT_S, TTL_MS_MAX

EVICTIONS: Final = ("lru", "s3fifo")
ITEM_BYTES_MEAN: Final = 128  # key and value together; sizes the index where the user says nothing
GROUP_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")

_UNITS: Final = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def parse_bytes(value: int | str, setting: str) -> int:
    """Return a count of bytes from an int or from text such as ``"64MiB"`` or ``"2kB"``."""
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(
                f"{setting} is {value!r}; write bytes as 65536, '64KiB', '64MiB' or '2GiB'",
                setting=setting,
                value=value,
            )
        count = int(float(match[1]) * _UNITS[match[2].lower()])
    else:
        raise ConfigError(
            f"{setting} is {value!r}; give an int or text such as '64MiB'",
            setting=setting,
            value=repr(value),
        )
    if count < 1:
        raise ConfigError(f"{setting} is {value!r}; it must be above 0", setting=setting)
    return count


def seconds_to_ms(value: float | None, setting: str, *, zero: bool = False) -> int | None:
    """Return whole milliseconds (at least 1; 0 where allowed and given) of a time in seconds."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{setting} is {value!r}; give seconds as a number, or None",
            setting=setting,
            value=repr(value),
        )
    if zero and value == 0:
        return 0
    ms = value * 1000
    if not 0 < ms <= TTL_MS_MAX:  # also catches NaN
        least = "0 or more" if zero else "above 0"
        raise ConfigError(
            f"{setting} is {value!r} seconds; it must be {least} and at most {TTL_MS_MAX // 1000}",
            setting=setting,
            value=repr(value),
        )
    return max(1, int(ms))


def check_callable(setting: str, hook: object) -> None:
    """Raise `ConfigError` for a hook that is neither None nor callable."""
    if hook is not None and not callable(hook):
        raise ConfigError(
            f"{setting} is {hook!r}, which cannot be called", setting=setting, value=repr(hook)
        )


def text(setting: str, value: object) -> str:
    """Return a setting that must be text."""
    if not isinstance(value, str):
        raise ConfigError(f"{setting} is {value!r}; give text", setting=setting, value=repr(value))
    return value


def integer(setting: str, value: object, most: int) -> int:
    """Return a setting that must be a whole number from 0 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ConfigError(
            f"{setting} is {value!r}; give a whole number from 0 to {most}",
            setting=setting,
            value=repr(value),
        )
    return value


def number(setting: str, value: object) -> float:
    """Return a setting that must be a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{setting} is {value!r}; give a number", setting=setting, value=repr(value)
        )
    return value


def milliseconds(setting: str, value: float) -> int:
    """Return the milliseconds of a time that must be given; 0 is allowed but for a load timeout."""
    ms = seconds_to_ms(value, setting, zero=setting != "load_timeout")
    if ms is None:
        raise ConfigError(f"{setting} is None; give seconds", setting=setting, value="None")
    return ms


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A group's settings that every process of a node must agree on."""

    name: str
    cache_bytes: int
    eviction: str = "lru"
    item_bytes_mean: int = ITEM_BYTES_MEAN
    ttl_ms: int | None = None
    negative_ttl_ms: int = 0
    load_timeout_s: float = LOAD_TIMEOUT_S
    load_threads: int = LOAD_THREADS
    mirror_ttl_ms: int = 5_000
    mirror_share: float = 1 / 8
    has_getter: bool = False
    codec: str = ""  # what its values are written in, as far as the node is told

    def __post_init__(self) -> None:
        if not GROUP_NAME.fullmatch(self.name):
            raise ConfigError(
                f"group name {self.name!r}: use 1 to 63 of letters, digits, '_', '.', '-', "
                "beginning with a letter, a digit or '_'",
                setting="name",
                value=self.name,
            )
        if self.eviction not in EVICTIONS:
            raise ConfigError(
                f"eviction is {self.eviction!r}; choose one of {', '.join(EVICTIONS)}",
                setting="eviction",
                value=str(self.eviction),
            )
        for setting, value, least, most in (
            ("cache_bytes", self.cache_bytes, 1, 1 << 46),
            ("item_bytes_mean", self.item_bytes_mean, 8, 1 << 24),
            ("load_threads", self.load_threads, 1, LOAD_THREADS_MAX),
            ("load_timeout", self.load_timeout_s, 0.001, 3600),
            ("mirror_share", self.mirror_share, 0, 0.5),
        ):
            if not least <= value <= most:
                raise ConfigError(
                    f"group {self.name!r}: {setting} is {value!r}; "
                    f"it must be from {least} to {most}",
                    setting=setting,
                    value=repr(value),
                )
