"""Exit with 0 while the node of this container serves: the image's HEALTHCHECK.

It asks what the supervisor writes down, not HTTP: TLS, client certificates and tokens change
nothing for it, and a node without HTTP has an answer too. Takes the run directory as an argument,
else KAMACACHE_RUN_DIR.
"""

from __future__ import annotations

import os
import sys

from kamacache.errors import KamaCacheError
from kamacache.rundir.control import ControlReader
from kamacache.rundir.description import read_description
from kamacache.rundir.layout import default_run_dir
from kamacache.rundir.roster import read_roster


def why_not(run_dir: str) -> str | None:
    """Return why the node does not serve, None where it does."""
    try:
        described = read_description(run_dir)
        if not ControlReader(described.control_path).serving:
            return "the supervisor does not answer for the shards any more"
        roster = read_roster(described.sockets_dir)
    except (KamaCacheError, OSError) as error:
        return str(error)
    missing = [f"{role.role} {role.index}" for role in roster.roles if not role.ready]
    if roster.state != "ready" or missing:
        return " ".join((f"the node is {roster.state}", *(f"without {name}" for name in missing)))
    return None


def main() -> int:
    run_dir = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("KAMACACHE_RUN_DIR")
    reason = why_not(run_dir or str(default_run_dir()))
    if reason:
        print(reason)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
