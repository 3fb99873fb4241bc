"""What of /proc/PID/smaps counts as a worker's own memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import memory

SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Private_Clean:         4 kB
Private_Dirty:       100 kB
VmFlags: rd wr mr mw me ac sd
7f0000400000-7f0000800000 rw-s 00000000 00:1a 77  /dev/shm/kamacache-0-12/memory-0.data
Private_Clean:         0 kB
Private_Dirty:      4096 kB
7f0000800000-7f0000900000 r-xp 00000000 fd:00 99   /usr/lib/x86_64-linux-gnu/libc.so.6
Private_Clean:         8 kB
Private_Dirty:         0 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0    [stack]
Private_Dirty:        16 kB
"""


def test_shards_are_not_counted_and_all_else_private_is() -> None:
    assert memory.private_bytes(SMAPS.splitlines()) == (4 + 100 + 8 + 16) << 10


def test_pages_a_process_writes_are_seen() -> None:
    def look() -> int:
        with Path("/proc/self/smaps").open() as smaps:
            return memory.private_bytes(smaps)

    before = look()
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(bytes(16 << 20))
        assert look() - before >= 15 << 20
