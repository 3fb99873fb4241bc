"""The tokens by which clients are known, and what each may do.

*Process*: those of `kamacache.security.check`, and the roles that serve clients. A file of TOML::

    [[token]]
    name = "web"              # for the log: it is no secret
    sha256 = "9f86d0..."      # of the token, in hex; or: secret = "the token itself"
    read = ["scores", "*"]    # groups; "*": all of them
    write = ["scores"]
    stats = false             # numbers and membership, of the node as a whole

*Invariants*: what is kept are digests, so that neither a core dump nor a repr tells a token. A
presented one is compared with all of them, each in constant time: how long it takes says nothing
of how much was right. No message tells a part of the file but names of tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kamacache.errors import ConfigError
from kamacache.limits import (
    SECRET_CHARS_MIN,
    TOKEN_GROUPS_MAX,
    TOKEN_NAME_CHARS_MAX,
    TOKENS_MAX,
)
from kamacache.rundir.live import SecurityFiles
from kamacache.security.files import read_bounded
from kamacache.security.proven import LastProven

ALL: Final = "*"
_FIELDS: Final = ("name", "sha256", "secret", "read", "write", "stats")
_NAME: Final = re.compile(rf"[A-Za-z0-9_.@-]{{1,{TOKEN_NAME_CHARS_MAX}}}")
_SHA256: Final = re.compile(r"[0-9A-Fa-f]{64}")


@dataclass(frozen=True, slots=True)
class Token:
    """One client's rights."""

    name: str
    digest: bytes = field(repr=False)
    read: frozenset[str] = frozenset()
    write: frozenset[str] = frozenset()
    stats: bool = False

    def may_read(self, group: str) -> bool:
        """Tell whether it may get from a group, and so have its getter run."""
        return ALL in self.read or group in self.read

    def may_write(self, group: str) -> bool:
        """Tell whether it may set and delete in a group."""
        return ALL in self.write or group in self.write

    def knows(self, group: str) -> bool:
        """Tell whether it may learn that there is such a group."""
        return self.stats or self.may_read(group) or self.may_write(group)


class Tokens:
    """All tokens of a file."""

    __slots__ = ("_tokens",)

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._tokens: Final = tuple(tokens)

    @classmethod
    def load(cls, path: str) -> Self:
        """Read a file; raises `ConfigError`, which tells no secret."""
        data = read_bounded("tokens", path, secret=True)
        try:
            tables = tomllib.loads(data.decode("utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            where = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise _bad(path, f"it is no TOML ({_place(where)})") from None
        found = tables.get("token")
        if set(tables) - {"token"} or not isinstance(found, list):
            raise _bad(path, "write a table [[token]] for each token, and nothing else")
        if len(found) > TOKENS_MAX:
            raise _bad(path, f"it has {len(found)} tokens; {TOKENS_MAX} at most are allowed")
        tokens = [_token(path, number, table) for number, table in enumerate(found, 1)]
        _refuse_twins(path, tokens)
        return cls(tokens)

    def find(self, presented: str | bytes) -> Token | None:
        """Return the token that was presented, None where it is none of these."""
        data = presented.encode() if isinstance(presented, str) else presented
        digest = hashlib.sha256(data).digest()
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token  # and on to the last
        return found

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"<Tokens {', '.join(token.name for token in self._tokens)}>"


_proven: Final = LastProven(
    "the tokens cannot be used; those of the last check stay in force",
    lambda files: files.tokens,
    lambda files: Tokens.load(str(files.tokens)),
)


def check(files: SecurityFiles) -> None:
    """Raise `ConfigError` unless the file of tokens can be used."""
    if files.tokens:
        _proven.check(files)


def load(files: SecurityFiles) -> Tokens | None:
    """Return the tokens, None where none are wanted. For the roles; see `LastProven.load`."""
    return _proven.load(files) if files.tokens else None


def _token(path: str, number: int, table: Any) -> Token:
    if not isinstance(table, dict):
        raise _bad(path, "write a table [[token]] for each token")
    name = table.get("name")
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise _bad(
            path,
            f"token {number} needs a name of 1 to {TOKEN_NAME_CHARS_MAX} letters, digits and _.@-",
        )
    if set(table) - set(_FIELDS):  # which is not told: it may be a secret that was misplaced
        raise _bad(path, f"token {name!r} has an unknown field; there are {', '.join(_FIELDS)}")
    stats = table.get("stats", False)
    if not isinstance(stats, bool):
        raise _bad(path, f"token {name!r}: stats is true or false")
    return Token(
        name=name,
        digest=_digest(path, name, table),
        read=_groups(path, name, "read", table),
        write=_groups(path, name, "write", table),
        stats=stats,
    )


def _digest(path: str, name: str, table: dict[str, Any]) -> bytes:
    secret, sha256 = table.get("secret"), table.get("sha256")
    if (secret is None) == (sha256 is None):
        raise _bad(path, f"token {name!r} needs one of sha256 and secret")
    if secret is not None:
        # No spaces and no control characters: a header could not carry them as they are.
        if not (isinstance(secret, str) and len(secret) >= SECRET_CHARS_MIN and _is_word(secret)):
            raise _bad(
                path,
                f"token {name!r}: secret needs {SECRET_CHARS_MIN} characters of ASCII or more, "
                "without spaces; make one with: openssl rand -hex 32",
            )
        return hashlib.sha256(secret.encode()).digest()
    if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise _bad(
            path,
            f"token {name!r}: sha256 needs the 64 hex digits that this prints: "
            "printf %s TOKEN | sha256sum",
        )
    return bytes.fromhex(sha256)


def _groups(path: str, name: str, right: str, table: dict[str, Any]) -> frozenset[str]:
    groups = table.get(right, [])
    if not (isinstance(groups, list) and all(isinstance(g, str) and g for g in groups)):
        raise _bad(path, f'token {name!r}: {right} is a list of groups, such as ["scores"]')
    if len(groups) > TOKEN_GROUPS_MAX:
        raise _bad(path, f"token {name!r}: {right} has more than {TOKEN_GROUPS_MAX} groups")
    return frozenset(groups)


def _refuse_twins(path: str, tokens: list[Token]) -> None:
    names: set[str] = set()
    digests: dict[bytes, str] = {}
    for token in tokens:
        if token.name in names:
            raise _bad(path, f"two tokens are called {token.name!r}; give each its own name")
        other = digests.setdefault(token.digest, token.name)
        if other != token.name:
            raise _bad(path, f"{other!r} and {token.name!r} are the same token; write one of them")
        names.add(token.name)


def _is_word(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _place(message: str) -> str:
    """Return where in the file TOML ends; the rest of the message may quote the file."""
    found = re.search(r"at (?:line \d+, column \d+|end of document)", message)
    return found.group() if found else "not UTF-8" if "UTF-8" in message else "somewhere"


def _bad(path: str, what: str) -> ConfigError:
    return ConfigError(f"tokens: {path}: {what}", setting="tokens", value=path)
