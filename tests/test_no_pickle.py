"""No bytes that come over a network or a socket are ever unpickled.

The codec "pickle" is an application's own choice, by name, and runs in processes that hold the
group; what nodes, workers, fronts and the HTTP role pass on are bytes to them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kamacache
from tests.test_architecture import loaded_after

PACKAGE = Path(kamacache.__file__).parent
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}
ALLOWED = {("codecs.py", "pickle")}  # the codec, where it is asked for by name


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in EVALUATORS:
                yield called.id
            if isinstance(called, ast.Attribute) and called.attr == "import_module":
                yield from (str(part.value) for part in node.args if isinstance(part, ast.Constant))


def test_no_module_but_the_codecs_can_unpickle_or_evaluate() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if "v1" not in path.parts]
    assert len(modules) > 100
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in modules
        for name in imports(ast.parse(path.read_text()))
        if name in PICKLERS | EVALUATORS
    }
    assert found == ALLOWED


def test_the_search_would_find_it() -> None:
    source = "import pickle\nfrom marshal import loads\neval('1')\nimport_module('dill')\n"
    assert set(imports(ast.parse(source))) >= {"pickle", "marshal", "eval"}


@pytest.mark.parametrize(
    "module", ["worker.main", "front.main", "front.server", "front.peers", "http.api", "agent.main"]
)
def test_no_role_of_a_node_reads_values_through_a_codec(module: str) -> None:
    roles = ("kamacache.worker", "kamacache.front", "kamacache.http", "kamacache.wire")
    name = f"kamacache.{module}"
    assert name.startswith((*roles, "kamacache.agent"))
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    assert "codecs" not in path.read_text()
    assert name in loaded_after(f"import {name}")


def test_a_frame_of_a_pickle_is_a_frame_error_or_plain_data() -> None:
    program = """
import os, pickle, sys
class Boom:
    def __reduce__(self):
        return os._exit, (3,)
sting = pickle.dumps(Boom())
from kamacache.wire.messages import DecodeError, Set, encode
from kamacache.wire.messages import decode_any, decode_reply, decode_request
from kamacache.cluster.status import _decode
for decode in (decode_request, decode_reply, decode_any, _decode):
    try:
        decode(sting)
    except DecodeError:
        pass
kept = decode_request(encode(Set(group="g", key=b"k", value=sting)))
assert kept.value == sting  # bytes, as they were
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert done.returncode == 0
