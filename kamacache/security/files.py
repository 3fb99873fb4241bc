"""Reading a file of secrets or certificates: bounded, and not one that every user may read.

*Process*: those of `kamacache.security.check`, and the roles.
"""

from __future__ import annotations

import os
import stat

from kamacache.errors import ConfigError
from kamacache.limits import SECURITY_FILE_BYTES_MAX
from kamacache.rundir.files import open_at_once


def read_bounded(setting: str, path: str, *, secret: bool = False) -> bytes:
    """Return a file's bytes; raises `ConfigError`. A secret one must be closed to other users."""
    try:
        # Without waiting: else a pipe in a file's place would hold the supervisor for ever.
        with open(path, "rb", opener=open_at_once) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ConfigError(f"{setting}: {path} is no file", setting=setting, value=path)
            if secret and about.st_mode & stat.S_IRWXO:
                raise ConfigError(
                    f"{setting}: {path} is open to every user of this host (its mode is "
                    f"{stat.S_IMODE(about.st_mode):04o}); chmod 0600 it, or 0640",
                    setting=setting,
                    value=path,
                )
            if secret and about.st_mode & stat.S_IWGRP:
                raise ConfigError(
                    f"{setting}: {path} may be written to by its group (its mode is "
                    f"{stat.S_IMODE(about.st_mode):04o}); chmod 0600 it, or 0640",
                    setting=setting,
                    value=path,
                )
            data = file.read(SECURITY_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"{setting}: {path} cannot be read: {error.strerror}; it must be there, and readable "
            "for the user that the node runs as",
            setting=setting,
            value=path,
        ) from error
    if len(data) > SECURITY_FILE_BYTES_MAX:
        raise ConfigError(
            f"{setting}: {path} is above {SECURITY_FILE_BYTES_MAX} bytes, more than it may have",
            setting=setting,
            value=path,
        )
    return data
