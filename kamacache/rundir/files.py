"""Files that processes tell each other things by: replaced whole, and opened without a wait.

*Process*: all. *Invariant*: a reader sees what was there before or what is there now, nothing
between. No fsync: none of these files need outlive a power cut.
"""

from __future__ import annotations

import contextlib
import os


def write_whole(path: str | os.PathLike[str], data: bytes, *, gid: int | None = None) -> None:
    """Have a file hold these bytes, for its owner alone or for a group to read; raises OSError.

    One writer at a time: what it has not finished lies beside, as ``PATH.new``.
    """
    fresh = f"{os.fspath(path)}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(fresh, flags, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            if gid is not None:
                os.fchown(fd, -1, gid)
                os.fchmod(fd, 0o640)
            file.write(data)
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def open_at_once(path: str, flags: int) -> int:
    """Be the ``opener`` of a file that may be a pipe, for whose writer nobody must wait."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
