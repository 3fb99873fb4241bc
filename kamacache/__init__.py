"""KamaCache: groupcache for Python's process model. The public names, imported when first used.

*Process*: all. *Invariant*: importing this package loads nothing but the standard library's
`typing`; a name brings its module on first use, and none of them brings grpc, except the parts
of `Node` that run in the node's own processes, and a `Client` with its first call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kamacache.client import Client
    from kamacache.errors import (
        AccessDeniedError,
        ConfigError,
        DeadlineExceededError,
        GroupNotFoundError,
        KamaCacheError,
        KeyNotFoundError,
        KeyTooLongError,
        LoadError,
        NodeUnavailableError,
        ValueTooLargeError,
    )
    from kamacache.groups import Group, group
    from kamacache.local.attach import attach, detach
    from kamacache.node.embedded import Node

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "Client",
    "ConfigError",
    "DeadlineExceededError",
    "Group",
    "GroupNotFoundError",
    "KamaCacheError",
    "KeyNotFoundError",
    "KeyTooLongError",
    "LoadError",
    "Node",
    "NodeUnavailableError",
    "ValueTooLargeError",
    "__version__",
    "attach",
    "detach",
    "group",
]

# No name here is also a submodule: importing kamacache.x sets the attribute x of this package,
# and would hide the public name. Hence kamacache.groups, with an s.
_HOMES: Final = {
    "Client": "kamacache.client",
    "Group": "kamacache.groups",
    "group": "kamacache.groups",
    "attach": "kamacache.local.attach",
    "detach": "kamacache.local.attach",
    "Node": "kamacache.node.embedded",
}


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "kamacache.errors")), name)
    globals()[name] = value  # the next use is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
