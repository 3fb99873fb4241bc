"""Joining a node: `attach` for an application, `attach_role` for the node's own processes.

*Process*: every attached one. *Owns*: the process's `Attachment`. *Invariants*: nothing here
imports grpc; a process whose node is gone looks for it again at most every `REATTACH_EVERY_S`, so
waits never pile up while a cache is down, and finds a node that was started anew at the same run
directory by itself.
"""

from __future__ import annotations

import os
import threading
import time
import weakref

from kamacache.clock import boottime_s
from kamacache.errors import NodeUnavailableError, StorageError
from kamacache.limits import REATTACH_EVERY_S
from kamacache.local import engine as engines
from kamacache.local.attached import AttachedEngine, engines_of
from kamacache.local.engine import EngineUser
from kamacache.local.mapping import NodeMapping
from kamacache.rundir.control import SERVE_UNTIL
from kamacache.rundir.description import NodeDescription, read_description
from kamacache.rundir.layout import RunDir


class Attachment:
    """A run directory, and the node that lives there now, if one does."""

    def __init__(
        self, run_dir: str | os.PathLike[str], *, description: NodeDescription | None = None
    ) -> None:
        """With a description this is one of the node's own processes: it stays with that life.

        Its supervisor's death ends such a process, so it does not look at serve-until.
        """
        self.run_dir = RunDir(run_dir)
        self.in_node = description is not None
        self.closed = False  # given up for another, or for none; its engines lead no group any more
        self._lock = threading.Lock()
        self._next_try_s = 0.0
        self._mapping = None if description is None else NodeMapping(description, in_node=True)
        _instances.add(self)

    def current(self) -> NodeMapping | None:
        """Return the node's mapping, or None where no node serves. Cheap while one does."""
        mapping = self._mapping
        # `mapping.serving`, spelled out.
        if mapping is not None and (
            self.in_node or boottime_s() * 1000 < mapping.control.words[SERVE_UNTIL]
        ):
            return mapping
        return self._renewed()

    def unavailable(self) -> NodeUnavailableError:
        """Return the error for a call that needs a node where none serves."""
        return NodeUnavailableError(
            f"no node serves at {self.run_dir.path}; start kamacache-node with --run-dir "
            f"{self.run_dir.path}",
            run_dir=str(self.run_dir.path),
        )

    def close(self) -> None:
        """Publish the last counts and close idle connections; calls under way end as they can."""
        self.closed = True
        for engine in engines_of(self):
            engine.close()
        if self._mapping is not None:
            self._mapping.close()

    def _renewed(self) -> NodeMapping | None:
        with self._lock:
            mapping = self._mapping
            if mapping is not None and mapping.serving:
                return mapping  # another thread was here first
            now_s = time.monotonic()
            if now_s < self._next_try_s:
                return None
            self._next_try_s = now_s + REATTACH_EVERY_S
            try:
                found = read_description(self.run_dir)
                if mapping is not None and found.epoch == mapping.description.epoch:
                    return None
                fresh = NodeMapping(found)
            except (NodeUnavailableError, StorageError):
                return None
            if not fresh.serving:
                fresh.close()
                return None
            self._mapping = fresh
        if mapping is not None:
            mapping.close()
        return fresh

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._next_try_s = 0.0  # a thread of the parent may be in the middle of the present try
        if self._mapping is not None:
            self._mapping.after_fork()


_attached: Attachment | None = None


def attach(run_dir: str | os.PathLike[str]) -> None:
    """Let every Group of this process, those to come too, be its node's group of that name.

    The node need not run yet, or still: without one a group falls back as its ``fallback`` says,
    and joins when there is one. ``KAMACACHE_RUN_DIR`` in the environment does the same at the
    first use of a group.
    """
    _attach(Attachment(run_dir))


def attach_first(run_dir: str | os.PathLike[str]) -> None:
    """As `attach`, unless this process has attached or detached already, in another thread too.

    A second attachment would close the first, under the calls that wait for its answers.
    """
    with _first:
        if not engines.chosen():
            attach(run_dir)


def detach() -> None:
    """Go back to single-instance mode: groups begin anew, in this process's own memory."""
    global _attached
    was, _attached = _attached, None
    _turn_over(was, None)


def attach_role(run_dir: str | os.PathLike[str], description: NodeDescription) -> None:
    """Attach one of the node's own processes, so that its getters can ask other groups."""
    _attach(Attachment(run_dir, description=description))


def attach_group(run_dir: str | os.PathLike[str], name: str) -> AttachedEngine:
    """Return the engine of one group by name, without a Group; for commands.

    Raises `NodeUnavailableError`, `GroupNotFoundError`.
    """
    attachment = Attachment(run_dir)
    if attachment.current() is None:
        raise attachment.unavailable()
    engine = AttachedEngine(attachment, name)
    weakref.finalize(engine, attachment.close)  # nobody else has this attachment
    return engine


def role_engines(
    run_dir: str | os.PathLike[str], description: NodeDescription
) -> dict[str, AttachedEngine]:
    """Return the engines of all groups, by name, for one of the node's own processes."""
    attachment = Attachment(run_dir, description=description)
    return {spec.name: AttachedEngine(attachment, spec.name) for spec in description.groups}


def _attach(attachment: Attachment) -> None:
    global _attached
    was, _attached = _attached, attachment

    def engine_of(group: EngineUser) -> AttachedEngine:
        return AttachedEngine(attachment, group.spec.name, user=group)

    _turn_over(was, engine_of)


def _turn_over(was: Attachment | None, factory: engines.EngineFactory | None) -> None:
    # Closed first: an engine that rebinds at this moment would else take its group back.
    if was is not None:
        was.closed = True
    engines.use_factory(factory)
    if was is not None:
        was.close()


_instances: weakref.WeakSet[Attachment] = weakref.WeakSet()
_first = threading.Lock()


def _after_fork_in_child() -> None:
    global _first
    _first = threading.Lock()  # another thread may have held it
    for attachment in list(_instances):
        attachment._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
