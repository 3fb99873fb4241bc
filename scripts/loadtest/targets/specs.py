"""``--target`` and ``--compare`` as text: which cache, and where.

*Process*: the parent and load processes. *Invariant*: only the module of the target asked for is
imported, so that a load process of a local node never loads grpc.
"""

from __future__ import annotations

import re
from typing import Final

from scripts.loadtest.limits import TARGETS_MAX
from scripts.loadtest.targets.base import Target

SCHEMES: Final = ("local", "grpc", "http", "redis", "memcached")
FORMS: Final = (
    "local[:RUN_DIR], grpc[:HOST:PORT,...], http[:HOST:PORT], redis[:SOCKET|:HOST:PORT] "
    "or memcached[:SOCKET|:HOST:PORT]"
)
_NAMES: Final = "|".join(SCHEMES)
# A comma ends a target only where another begins: grpc takes a list of addresses.
_BETWEEN: Final = re.compile(rf";|,(?=\s*(?:{_NAMES})\s*(?:[:;,]|$))")
DEFAULTS: Final = {
    "grpc": "127.0.0.1:8001",
    "http": "127.0.0.1:9999",
    "redis": "127.0.0.1:6379",
    "memcached": "127.0.0.1:11211",
}


def split_targets(texts: tuple[str, ...] | list[str]) -> list[str]:
    """Return the targets that the values of ``--compare`` name; raises ValueError."""
    found = [part.strip() for text in texts for part in _BETWEEN.split(text)]
    targets = [part for part in found if part]
    for target in targets:
        check_spec(target)
    if len(targets) < 2:
        raise ValueError(f"{', '.join(texts)!r} names {len(targets)} target; compare at least two")
    if len(targets) > TARGETS_MAX:
        raise ValueError(f"{len(targets)} targets; the limit is {TARGETS_MAX}")
    twice = {target for target in targets if targets.count(target) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is named twice")
    return targets


def check_spec(text: str) -> None:
    """Raise ValueError with a sentence where this names no target."""
    scheme, place = split_spec(text)
    if scheme == "local":
        return
    addresses = place.split(",") if scheme == "grpc" else [place]
    for address in addresses:
        if "/" in address and scheme in ("redis", "memcached"):
            continue
        host_and_port(address, text)


def split_spec(text: str) -> tuple[str, str]:
    """Return scheme and place; the place of a local one may be empty. Raises ValueError."""
    scheme, _, place = text.partition(":")
    if scheme not in SCHEMES:
        raise ValueError(f"{text!r} is no target; give {FORMS}")
    return scheme, place or DEFAULTS.get(scheme, "")


def host_and_port(address: str, text: str) -> tuple[str, int]:
    """Return the halves of HOST:PORT; raises ValueError that names the target's text."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r}: {address!r} is no HOST:PORT with a port from 1 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def make_target(text: str) -> Target:
    """Return the target that a text names; nothing is connected. Raises ValueError."""
    check_spec(text)
    scheme, place = split_spec(text)
    if scheme == "local":
        from scripts.loadtest.targets.local import LocalTarget

        return LocalTarget(text, place)
    if scheme == "grpc":
        from scripts.loadtest.targets.grpc import GrpcTarget

        return GrpcTarget(text, place.split(","))
    if scheme == "http":
        from scripts.loadtest.targets.http import HttpTarget

        return HttpTarget(text, place)
    if scheme == "redis":
        from scripts.loadtest.targets.redis import RedisTarget

        return RedisTarget(text, place)
    from scripts.loadtest.targets.memcached import MemcachedTarget

    return MemcachedTarget(text, place)
