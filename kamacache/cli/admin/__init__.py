"""The commands for who runs a node: ``kamacache stats | ring | peers | drain | flush | doctor``.

*Process*: the command's own. One module a command, imported when it is called; each reads what the
node publishes (run directory, shared memory, one question to each worker) or asks over gRPC, and
nothing here is needed by a node. docs/command.md has the JSON of each.
"""

from __future__ import annotations

from typing import Final

_NAMES: Final = ("stats", "ring", "peers", "drain", "flush", "doctor")
COMMANDS: Final = {name: f"kamacache.cli.admin.{name}" for name in _NAMES}
"""The modules, each with a click command named ``command``."""
