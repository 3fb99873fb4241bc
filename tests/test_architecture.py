"""The architecture as tests: who imports whom, the public names, what an import loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kamacache

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = {
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
}
GRPC = ("grpc", "grpc_health", "grpc_reflection", "google.protobuf")


def loaded_after(program: str) -> set[str]:
    """Return the modules that an interpreter of its own has loaded after ``program``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys, json; print(json.dumps([*sys.modules]))"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KAMACACHE_RUN_DIR": ""},
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def belongs_to(modules: set[str], packages: tuple[str, ...]) -> set[str]:
    """Return those of ``modules`` that are one of ``packages`` or lie inside one."""
    return {m for m in modules for p in packages if m == p or m.startswith(p + ".")}


def test_the_search_for_grpc_would_find_it() -> None:
    assert belongs_to(loaded_after("import grpc"), GRPC)


def test_imports_go_down_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(lint), "--no-cache"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def test_public_names_are_these_and_each_can_be_used() -> None:
    assert set(kamacache.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(kamacache, name) is not None
    assert set(dir(kamacache)) >= PUBLIC


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kamacache.nothing  # noqa: B018


def test_no_public_name_is_hidden_by_a_submodule() -> None:
    modules = {path.stem for path in (ROOT / "kamacache").iterdir() if path.name[0] != "_"}
    assert not modules & PUBLIC


def test_the_package_says_the_version_that_the_changelog_says() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert kamacache.__version__ == released[0]


def test_importing_the_package_loads_next_to_nothing() -> None:
    bare = loaded_after("")
    added = loaded_after("import kamacache") - bare
    heavy = ("asyncio", "msgspec", "uvloop", "socket", "ssl", "multiprocessing", "logging", *GRPC)
    assert not belongs_to(added, heavy)
    assert len(added) < 30, sorted(added)


def test_a_group_in_one_process_loads_neither_grpc_nor_the_node() -> None:
    program = (
        "import kamacache\n"
        "g = kamacache.Group('g', cache_bytes='1MiB', getter=lambda key: key.encode() * 2)\n"
        "assert g.get('ab') == b'abab'\n"
        "g.set('x', b'1'); assert g.get('x') == b'1'\n"
        "assert g.delete('x')\n"
    )
    modules = loaded_after(program)
    above = ("kamacache.node", "kamacache.worker", "kamacache.front", "kamacache.cli", "uvloop")
    assert not belongs_to(modules, GRPC + above)


def test_attaching_to_no_node_does_not_load_grpc() -> None:
    modules = loaded_after("import kamacache; kamacache.attach; import kamacache.groups")
    assert not belongs_to(modules, GRPC)


def test_the_supervisor_does_not_load_grpc() -> None:
    modules = loaded_after("import kamacache; kamacache.Node; import kamacache.cli.node")
    assert not belongs_to(modules, GRPC)


def test_a_client_loads_grpc_with_its_first_call_and_not_before() -> None:
    program = (
        "import kamacache\nc = kamacache.Client(['127.0.0.1:1'])\nc.group('g', codec='json')\n"
    )
    assert not belongs_to(loaded_after(program), GRPC)
    assert belongs_to(loaded_after(program + "try: c.get('g', 'k')\nexcept Exception: pass"), GRPC)
