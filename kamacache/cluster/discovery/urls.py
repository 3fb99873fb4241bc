"""The URL of ``--discover``, taken apart and checked.

Two shapes, told apart by ``//`` after the scheme::

    static:A,B,C                  scheme:path?name=value&name=value
    etcd://HOST:PORT,HOST:PORT/p  scheme://servers/path?name=value&name=value

*Invariant*: `Source.shown` and every error hold no password. Names and values of options are
percent-decoded; a ``+`` stays a ``+``, since passwords have them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from kamacache.cluster.membership import check_address
from kamacache.errors import ConfigError
from kamacache.limits import DISCOVERY_SERVERS_MAX

FORMS: Final = {
    "static": "static:HOST:PORT,HOST:PORT=WEIGHT",
    "file": "file:/etc/kamacache/peers.toml or file:/etc/kamacache/peers.json",
    "dns": "dns:NAME:PORT or dns:_SERVICE._tcp.NAME, then ?server=IP:PORT&every=SECONDS",
    "etcd": "etcd://HOST:PORT,HOST:PORT/PREFIX?ttl=SECONDS",
    "nacos": "nacos://HOST:PORT,HOST:PORT/SERVICE?namespace=ID&group=NAME",
}
_SECRET: Final = re.compile(r"((?:^|[?&])password=)[^&]*", re.IGNORECASE)
# A password may hold anything, and a slash may be missing: rather too much than a part.
_LOGIN: Final = re.compile(r"(:/*|//).*@", re.DOTALL)
_NO_PATH: Final = frozenset(("static", "dns"))  # what a list or a name cannot be is no path


@dataclass(frozen=True, slots=True)
class Source:
    """A URL's parts; ``servers`` are HOST:PORT, empty where the form has none."""

    shown: str
    scheme: str
    servers: tuple[str, ...]
    path: str
    options: Mapping[str, str]

    def refused(self, why: str) -> ConfigError:
        """Return the error that says what is wrong and what is expected."""
        form = FORMS.get(self.scheme)
        expected = f"write {form}" if form else "write " + "; ".join(FORMS.values())
        return ConfigError(
            f"discover: {self.shown!r}: {why}; {expected}", setting="discover", value=self.shown
        )

    def allow_options(self, *names: str) -> None:
        """Raise `ConfigError` for an option that is none of ``names``."""
        for name in self.options:
            if name not in names:
                known = f"known are {', '.join(names)}" if names else "this form has none"
                raise self.refused(f"no option is named {name!r} ({known})")

    def seconds(self, name: str, default: float, least: float, most: float) -> float:
        """Return an option that is a time. Raises `ConfigError`."""
        text = self.options.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise self.refused(
                f"{name} is {text!r}, and must be from {least:g} to {most:g} seconds"
            )
        return value

    def login(self) -> tuple[str, str] | None:
        """Return username and password. Raises `ConfigError` where only one of them is given."""
        name, password = self.options.get("username"), self.options.get("password")
        if bool(name) != bool(password):
            raise self.refused("username and password go together")
        return (name, password) if name and password else None


def parse_source(url: str) -> Source:
    """Take a URL apart. Raises `ConfigError` for one that has neither shape."""
    shown = _LOGIN.sub(r"\1***@", _SECRET.sub(r"\1***", url))
    scheme, colon, rest = url.strip().partition(":")
    rest, _, query = rest.partition("?")
    bare = Source(shown, scheme.lower(), (), "", {})
    if not colon or bare.scheme not in FORMS:
        raise bare.refused("the scheme is not known")
    servers: tuple[str, ...] = ()
    if rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        rest = unquote(slash + path)
        servers = _servers(bare, authority)
    elif bare.scheme not in _NO_PATH:
        rest = unquote(rest)
    return Source(shown, bare.scheme, servers, rest, _options(bare, query))


def _servers(bare: Source, authority: str) -> tuple[str, ...]:
    if "@" in authority:
        raise bare.refused("a login goes into ?username=NAME&password=WORD")
    if bare.scheme not in ("etcd", "nacos"):
        if authority or bare.scheme != "file":
            raise bare.refused("there is no // in this form")
        return ()
    found = []
    for text in filter(None, authority.split(",")):
        try:
            found.append(check_address(text, "discover").address)
        except ConfigError:  # its text may be half a login
            raise bare.refused("each server must be HOST:PORT") from None
        if "=" in text:
            raise bare.refused("a server has no weight")
    if not 1 <= len(found) <= DISCOVERY_SERVERS_MAX:
        raise bare.refused(f"it must name 1 to {DISCOVERY_SERVERS_MAX} servers")
    return tuple(dict.fromkeys(found))


def _options(bare: Source, query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        name = unquote(name)
        if not equals:
            raise bare.refused(f"an option is NAME=VALUE, and {name!r} is not")
        if name in found:
            raise bare.refused(f"{name} is given twice")
        found[name] = unquote(value)
    return found
