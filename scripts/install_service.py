"""``make install-service``: put the units, their user and an example of the settings in place.

As root, or with ``--destdir`` (packagers), it does so; else it says what it would do. It starts and
enables nothing, and leaves settings that are there as they are. Python 3.11 alone is needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
PREFIX: Final = "/opt/kamacache"
CONFIG: Final = "etc/kamacache/node.toml"


@dataclass(frozen=True, slots=True)
class File:
    """One file to install, by its path below the root."""

    source: str
    target: str
    mode: int = 0o644
    keeps: bool = False  # one that is there is the administrator's


FILES: Final = (
    File("kamacache-node.service", "etc/systemd/system/kamacache-node.service"),
    File("kamacache-node.socket", "etc/systemd/system/kamacache-node.socket"),
    File("kamacache.sysusers", "etc/sysusers.d/kamacache.conf"),
    File("node.toml", CONFIG, 0o640, keeps=True),
)


def plan(root: Path) -> list[tuple[File, str]]:
    """Return each file with what is to be done: install, replace, or nothing but keep."""
    found = []
    for file in FILES:
        there = _is_there(root / file.target)
        found.append((file, "keep" if there and file.keeps else "replace" if there else "install"))
    return found


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # the folder of the settings is not for everybody
        return True


def install(root: Path, prefix: str) -> None:
    """Write the files below ``root``."""
    for file, what in plan(root):
        if what == "keep":
            continue
        target = root / file.target
        # The folder of the settings holds keys and tokens, too.
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o750 if file.keeps else 0o755)
        text = (HERE / file.source).read_text(encoding="utf-8").replace(PREFIX, prefix)
        fresh = target.with_name(target.name + ".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.chmod(file.mode)
        fresh.replace(target)


def settle(root: Path) -> None:
    """Make the user, let it read its settings, tell systemd; on the host itself."""
    run("systemd-sysusers", str(root / "etc/sysusers.d/kamacache.conf"))
    for path in (root / CONFIG, (root / CONFIG).parent):
        run("chgrp", "kamacache", str(path))
    if Path("/run/systemd/system").is_dir():
        run("systemctl", "daemon-reload")


def run(*command: str) -> None:
    print(f"  {' '.join(command)}")
    subprocess.run(command, check=True)


def next_steps(prefix: str) -> str:
    """Return what is left for the administrator."""
    steps = [
        f"edit /{CONFIG}",
        "systemctl enable --now kamacache-node.service",
        "or, where a restart is to turn no HTTP client away:",
        "systemctl enable --now kamacache-node.socket kamacache-node.service",
    ]
    if not os.access(f"{prefix}/bin/kamacache-node", os.X_OK):
        # Not `pip install -e`, and no interpreter below /home or /root: the unit hides those.
        clone = HERE.parent
        steps[:0] = [
            f"/usr/bin/python3 -m venv {prefix}   # 3.11 or newer, not one below /home or /root",
            f"{prefix}/bin/pip install '{clone}[http,metrics]'   # and what your app needs",
        ]
    return "\n".join(("Then:", *(f"  {step}" for step in steps)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="make install-service")
    parser.add_argument("--destdir", default="", help="install below this folder, for a package")
    parser.add_argument("--prefix", default=PREFIX, help="the virtual environment of the node")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    options = parser.parse_args(arguments)
    root = Path(options.destdir or "/")
    may = bool(options.destdir) or os.geteuid() == 0
    does = may and not options.dry_run
    print("Installing:" if does else "Would install:")
    for file, what in plan(root):
        print(f"  {what:8}{root / file.target}  ({file.mode:04o}, from scripts/{file.source})")
    if does:
        install(root, options.prefix.rstrip("/"))
        if not options.destdir:
            settle(root)
        print(next_steps(options.prefix.rstrip("/")))
    else:
        print("and then: systemd-sysusers, systemctl daemon-reload")
        if not may:
            print("Nothing was done: run it as root (sudo make install-service).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
