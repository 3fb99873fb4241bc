"""Hit counters of all attached processes, summed without a lock or a message.

*Process*: every attached process writes its own slots, the supervisor folds those of the dead,
anyone reads totals. A file of slots of 16 u64 words::

    slot 0             header: magic, format, groups, slots, fold sequence (odd: folding)
    slot 1..G          totals of group 0..G-1: what dead processes counted
    slot G+1..G+S      one per (process, group): [0] group index + 1, [1..15] COUNTER_NAMES

*Invariants*: a slot has one writer, the process that holds the POSIX lock on the byte of its
number; the kernel frees it at death, and then the supervisor folds the slot into the totals under
the same lock. Words are stored whole (aligned, cast "Q"); a counter never goes down.

POSIX locks vanish when the process closes *any* descriptor of the file, and are not inherited by
fork. So there is one `Counters` per file and process (`open_counters`), its descriptor stays open,
and a forked child claims slots of its own.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from operator import add
from typing import Final

from kamacache.errors import NodeUnavailableError
from kamacache.limits import COUNTER_SLOTS, GROUPS_MAX

COUNTER_NAMES: Final = (
    "gets",
    "near_hits",
    "memory_hits",
    "negative_hits",
    "socket_gets",
    "sets",
    "deletes",
    "fallback_loads",
    "peer_hits",
)
SLOT_WORDS: Final = 16
COUNTERS_MAGIC: Final = int.from_bytes(b"KamaCnts", "little")
COUNTERS_FORMAT: Final = 2
FOLD_RETRIES_MAX: Final = 1000

_HEADER_GROUPS: Final = 2
_HEADER_SLOTS: Final = 3
_HEADER_FOLD: Final = 4
_WORD_MASK: Final = (1 << 64) - 1

logger = logging.getLogger("kamacache.rundir")


def counters_bytes(groups: int, slots: int = COUNTER_SLOTS) -> int:
    """Return the size of a counters file."""
    return (1 + groups + slots) * SLOT_WORDS * 8


def create_counters(
    path: str | os.PathLike[str], groups: int, *, slots: int = COUNTER_SLOTS, mode: int = 0o600
) -> None:
    """Make and reserve a counters file; raises OSError. For the supervisor."""
    size = counters_bytes(groups, slots)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.posix_fallocate(fd, 0, size)
        with mmap.mmap(fd, size) as mapped, memoryview(mapped).cast("Q") as words:
            words[_HEADER_GROUPS] = groups
            words[_HEADER_SLOTS] = slots
            words[1] = COUNTERS_FORMAT
            words[0] = COUNTERS_MAGIC  # last: a file with the magic is complete
    finally:
        os.close(fd)


class CounterSlot:
    """This process's counters of one group. Not safe for threads: one flusher at a time."""

    __slots__ = ("_base", "_counters", "_pid", "group_index")

    def __init__(self, counters: Counters, group_index: int, base: int) -> None:
        self._counters = counters
        self._base = base  # first word of the slot; 0: no slot was free, nothing is counted
        self._pid = os.getpid()
        self.group_index = group_index

    def add(self, increments: Sequence[int]) -> None:
        """Add to the counters, in the order of `COUNTER_NAMES`; trailing ones may be left out.

        In a forked child the first call claims a slot of the child's own.
        """
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._base = self._counters.claim_base(self.group_index)
        base = self._base
        if not base:
            return
        words = self._counters.words
        # Readers may sum meanwhile: each word is stored whole and only grows.
        for place, increment in enumerate(increments, base + 1):
            if increment:
                words[place] = words[place] + increment & _WORD_MASK


class Counters:
    """This process's mapping of a counters file. Get it from `open_counters`."""

    def __init__(self, path: str) -> None:
        self._reset_lock()
        self._claimed: set[int] = set()
        self._pid = os.getpid()
        self._warned = False
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            # Closed with the last slot: a process outlives many nodes. Not at exit, where threads
            # may still count; the kernel closes it then.
            self._closing = weakref.finalize(self, os.close, self._fd)
            self._closing.atexit = False
            size = os.fstat(self._fd).st_size
            if size < SLOT_WORDS * 8:
                raise NodeUnavailableError(f"{path} is not a counters file: it is too short")
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            raise NodeUnavailableError(
                f"the node's counters file {path} cannot be opened: {error.strerror}"
            ) from error
        self.words = words = memoryview(self._map).cast("Q")
        self.groups, self.slots = words[_HEADER_GROUPS], words[_HEADER_SLOTS]
        if (
            words[0] != COUNTERS_MAGIC
            or words[1] != COUNTERS_FORMAT
            or not 0 < self.groups <= GROUPS_MAX
            or counters_bytes(self.groups, self.slots) > size
        ):
            raise NodeUnavailableError(f"{path} is not a counters file of this version")

    def claim(self, group_index: int) -> CounterSlot:
        """Return a slot for this process and group; one that counts nothing when all are taken."""
        if not 0 <= group_index < self.groups:
            raise IndexError(f"group index {group_index} of {self.groups}")
        return CounterSlot(self, group_index, self.claim_base(group_index))

    def claim_base(self, group_index: int) -> int:
        """Claim a slot and return its first word's place, or 0 when none is free."""
        with self._claiming:
            if self._pid != os.getpid():  # forked: the parent's locks are not ours
                self._pid = os.getpid()
                self._claimed.clear()
            first = 1 + self.groups
            for slot in range(first, first + self.slots):
                if slot in self._claimed:
                    continue
                base = slot * SLOT_WORDS
                owner = self.words[base]
                # A dead process's slot of the same group goes on counting from where it stood.
                if owner not in (0, group_index + 1) or not self._lock(slot):
                    continue
                if self.words[base] not in (0, group_index + 1):  # claimed and left meanwhile
                    self._unlock(slot)
                    continue
                self.words[base] = group_index + 1
                self._claimed.add(slot)
                return base
        if not self._warned:
            self._warned = True
            logger.warning(
                "no counter slot is free, hits of this process are not counted",
                extra={"slots": self.slots, "pid": os.getpid()},
            )
        return 0

    def totals(self, group_index: int) -> dict[str, int]:
        """Return the sums over all processes, living and dead, of one group."""
        words, first = self.words, 1 + self.groups
        for _ in range(FOLD_RETRIES_MAX):
            sequence = words[_HEADER_FOLD]
            if sequence & 1:  # a fold moves counts from a slot to the totals: neither sum is right
                os.sched_yield()
                continue
            base = (1 + group_index) * SLOT_WORDS
            sums = [words[base + 1 + place] for place in range(len(COUNTER_NAMES))]
            for slot in range(first, first + self.slots):
                base = slot * SLOT_WORDS
                if words[base] == group_index + 1:
                    for place in range(len(COUNTER_NAMES)):
                        sums[place] += words[base + 1 + place]
            if words[_HEADER_FOLD] == sequence:
                return dict(zip(COUNTER_NAMES, sums, strict=True))
        raise NodeUnavailableError("the counters are being folded without end; is the node dead?")

    def all_totals(self) -> list[dict[str, int]]:
        """Return `totals` of each group, in one pass over the slots."""
        words, first, names = self.words, 1 + self.groups, len(COUNTER_NAMES)
        for _ in range(FOLD_RETRIES_MAX):
            sequence = words[_HEADER_FOLD]
            if not sequence & 1:
                sums = [
                    words[base + 1 : base + 1 + names].tolist()
                    for base in range(SLOT_WORDS, first * SLOT_WORDS, SLOT_WORDS)
                ]
                owners = words[first * SLOT_WORDS : (first + self.slots) * SLOT_WORDS : SLOT_WORDS]
                for slot, owner in enumerate(owners.tolist(), first):
                    if owner:
                        base = slot * SLOT_WORDS + 1
                        counts = words[base : base + names].tolist()
                        sums[owner - 1] = list(map(add, sums[owner - 1], counts))
                if words[_HEADER_FOLD] == sequence:
                    return [dict(zip(COUNTER_NAMES, of_group, strict=True)) for of_group in sums]
            os.sched_yield()
        raise NodeUnavailableError("the counters are being folded without end; is the node dead?")

    def fold(self) -> int:
        """Add the slots of dead processes to the totals and free them; return how many.

        For the supervisor alone: it is the only writer of the totals.
        """
        words, first, folded = self.words, 1 + self.groups, 0
        for slot in range(first, first + self.slots):
            base = slot * SLOT_WORDS
            if not words[base] or slot in self._claimed or not self._lock(slot):
                continue
            group = words[base]
            if group:
                words[_HEADER_FOLD] += 1
                total = group * SLOT_WORDS  # slot 1 + (group - 1)
                for place in range(1, SLOT_WORDS):
                    words[total + place] = words[total + place] + words[base + place] & _WORD_MASK
                    words[base + place] = 0
                words[base] = 0
                words[_HEADER_FOLD] += 1
                folded += 1
            self._unlock(slot)
        return folded

    def _lock(self, slot: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
        except OSError:
            return False
        return True

    def _unlock(self, slot: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, slot)

    def close(self) -> None:
        """Unmap and give all slots up; the supervisor folds them."""
        _opened.pop(_identity(os.fstat(self._fd)), None)
        self.words.release()
        self._map.close()
        self._closing()

    @property
    def unlinked(self) -> bool:
        """Whether the file is gone, and with it the node."""
        return os.fstat(self._fd).st_nlink == 0

    def _reset_lock(self) -> None:
        self._claiming = threading.Lock()


_opened: dict[tuple[int, int], Counters] = {}  # by device and inode; why one: see the module
_opening = threading.Lock()
# All that may still count: those of a node that is gone leave `_opened`, and are in use.
_instances: weakref.WeakSet[Counters] = weakref.WeakSet()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def open_counters(path: str | os.PathLike[str]) -> Counters:
    """Return this process's one `Counters` of a file; raises `NodeUnavailableError`."""
    with _opening:
        try:
            identity = _identity(os.stat(path))
        except OSError as error:
            raise NodeUnavailableError(
                f"the node's counters file {path} cannot be opened: {error.strerror}"
            ) from error
        found = _opened.get(identity)
        if found is None:
            for old in [key for key, counters in _opened.items() if counters.unlinked]:
                del _opened[old]
            found = _opened[identity] = Counters(os.fspath(path))
            _instances.add(found)
        return found


def read_totals(path: str | os.PathLike[str], group_index: int) -> dict[str, int]:
    """Return the sums over all processes of one group; raises `NodeUnavailableError`."""
    return open_counters(path).totals(group_index)


def _after_fork_in_child() -> None:
    global _opening
    _opening = threading.Lock()  # another thread may have held it, as each of the others
    for counters in list(_instances):
        counters._reset_lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
