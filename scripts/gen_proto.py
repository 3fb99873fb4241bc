#!/usr/bin/env python3
"""Generate kamacache/v1/ from proto/, or check that what is checked in is what proto/ makes.

The text depends on the version of grpcio-tools, so one version is pinned (here, and under the
`dev` extra in pyproject.toml); any other is refused rather than giving a diff that means nothing.

    scripts/gen_proto.py            write the generated modules
    scripts/gen_proto.py --check    exit 1, with the diff, when they are stale
"""

from __future__ import annotations

import argparse
import difflib
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

GRPCIO_TOOLS = "1.85.1"
ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGES = ("kamacache/v1",)  # folders under proto/, and of the generated packages under ROOT
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate() -> dict[str, str]:
    """Return the text of every generated module by its path relative to the repository."""
    try:
        found = version("grpcio-tools")
    except PackageNotFoundError:
        found = "not installed"
    if found != GRPCIO_TOOLS:
        sys.exit(f"gen_proto: needs grpcio-tools {GRPCIO_TOOLS}, found {found}")
    from grpc_tools import protoc

    protos = sorted(path for package in PACKAGES for path in (PROTO / package).glob("*.proto"))
    with tempfile.TemporaryDirectory() as out:
        code = protoc.main(
            [
                "protoc",
                f"-I{PROTO}",
                f"-I{files('grpc_tools') / '_proto'}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                *(str(path) for path in protos),
            ]
        )
        if code:
            sys.exit(f"gen_proto: protoc ended with {code}")
        made = sorted(path for path in Path(out).rglob("*") if path.is_file())
        return {str(path.relative_to(out)): path.read_text() for path in made}


def checked_in() -> dict[str, str]:
    """Return the generated modules as they are in the tree."""
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).iterdir())
        if path.name.endswith(SUFFIXES)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    args = parser.parse_args()
    fresh, old = generate(), checked_in()
    stale = sorted(name for name in fresh.keys() | old.keys() if fresh.get(name) != old.get(name))
    if args.check:
        for name in stale:
            before = old.get(name, "").splitlines(keepends=True)
            after = fresh.get(name, "").splitlines(keepends=True)
            sys.stderr.writelines(difflib.unified_diff(before, after, name, f"{name} (fresh)"))
        if stale:
            sys.exit(f"gen_proto: stale: {', '.join(stale)}; run scripts/gen_proto.py")
        print(f"{len(fresh)} generated modules are fresh")
        return
    for name in stale:
        if name in fresh:
            (ROOT / name).write_text(fresh[name])
        else:
            (ROOT / name).unlink()
        print(("wrote " if name in fresh else "removed ") + name)


if __name__ == "__main__":
    main()
