"""What ``kamacache doctor`` looks at: the host, the node, and its cluster.

*Process*: the command's own. Each module yields `Finding`\\ s; nothing here changes anything.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["ok", "warning", "failed"]


class Finding(msgspec.Struct, kw_only=True):
    """What one check found."""

    check: str  # its name, stable: scripts may look for it
    status: Status
    detail: str
    remedy: str | None = None  # None: nothing is to be done


def ok(check: str, detail: str) -> Finding:
    """Return that nothing is wrong."""
    return Finding(check=check, status="ok", detail=detail)


def warning(check: str, detail: str, remedy: str) -> Finding:
    """Return what works, and may not for long, or not as well as it could."""
    return Finding(check=check, status="warning", detail=detail, remedy=remedy)


def failed(check: str, detail: str, remedy: str) -> Finding:
    """Return what does not work."""
    return Finding(check=check, status="failed", detail=detail, remedy=remedy)
