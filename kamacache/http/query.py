"""Reading a query: group, key, ttl, timeout, as bytes.

*Process*: http. *Invariant*: a key arrives byte for byte: what stands behind ``%`` need not be
UTF-8. ``+`` is a space, as in every HTML form; a plus sign is written ``%2B``.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Final
from urllib.parse import parse_qsl

from kamacache.config import seconds_to_ms
from kamacache.errors import ConfigError, KeyTooLongError
from kamacache.limits import CALL_TIMEOUT_MAX_S, HTTP_PARAMETERS_MAX, KEY_BYTES_MAX

PARAMETERS: Final = {
    "GET": ("group", "key", "timeout"),
    "HEAD": ("group", "key", "timeout"),
    "PUT": ("group", "key", "ttl", "timeout"),
    "DELETE": ("group", "key", "timeout"),
}


def read_query(query: bytes, allowed: Collection[str]) -> dict[str, bytes]:
    """Return the parameters by name; raises `ConfigError` for unknown and repeated ones."""
    # latin-1 both ways: each byte is one character and comes back as that byte.
    try:
        pairs = parse_qsl(
            query.decode("latin-1"),
            keep_blank_values=True,
            encoding="latin-1",
            max_num_fields=HTTP_PARAMETERS_MAX,
        )
    except ValueError as error:
        raise ConfigError(
            f"the query has more than {HTTP_PARAMETERS_MAX} parameters", setting="query"
        ) from error
    found: dict[str, bytes] = {}
    for name, value in pairs:
        if name not in allowed:
            # Not ignored: with a misspelt ttl a value would be kept for ever.
            raise ConfigError(
                f"the query has a parameter {name[:32]!r}; this request takes "
                f"{', '.join(allowed)} (is a & in the key not written %26?)",
                setting="query",
            )
        if name in found:
            raise ConfigError(f"the query names {name} twice", setting=name)
        found[name] = value.encode("latin-1")
    return found


def key_of(parameters: Mapping[str, bytes]) -> bytes:
    """Return the key; raises `ConfigError` where there is none, `KeyTooLongError`."""
    key = parameters.get("key")
    if key is None:
        raise ConfigError("the query has no key; write /api?key=Tom", setting="key")
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise KeyTooLongError(
            f"the key has {len(key)} bytes; 1 to {KEY_BYTES_MAX} are allowed",
            key_bytes=len(key),
            limit_bytes=KEY_BYTES_MAX,
        )
    return key


def ttl_ms_of(parameters: Mapping[str, bytes]) -> int | None:
    """Return the time to live, given in seconds; None: the group's default."""
    return seconds_to_ms(_seconds_of(parameters, "ttl"), "ttl")


def deadline_of(parameters: Mapping[str, bytes]) -> float | None:
    """Return the time.monotonic() of the deadline; None: the group's load timeout holds."""
    timeout_s = _seconds_of(parameters, "timeout")
    if timeout_s is None:
        return None
    if not timeout_s > 0:  # NaN, too
        raise ConfigError(
            f"timeout is {timeout_s!r}; give a number of seconds above 0", setting="timeout"
        )
    return time.monotonic() + min(timeout_s, CALL_TIMEOUT_MAX_S)


def _seconds_of(parameters: Mapping[str, bytes], name: str) -> float | None:
    text = parameters.get(name)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        shown = text[:32].decode("latin-1")
        raise ConfigError(
            f"{name} is {shown!r}; give a number of seconds", setting=name, value=shown
        ) from error
