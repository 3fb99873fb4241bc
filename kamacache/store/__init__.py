"""The shard: a hash index over a segmented log, one writer, many lock-free readers.

Floors, downwards: writer → space → eviction, reader → segments, near → arena → layout. No sockets,
no asyncio; nothing here knows of groups' getters, of a cluster's nodes beyond what is theirs (a
mirror) and what is ours, or of other processes than those that map the files.
"""

from __future__ import annotations

import os

from kamacache.config import GroupSpec
from kamacache.store.arena import (
    Arena,
    ShardIdentity,
    ShardPaths,
    create_files,
    open_for_reading,
    open_for_writing,
    private_arena,
    unlink_files,
    warn_unless_tmpfs,
)
from kamacache.store.entries import Held
from kamacache.store.eviction import touch_of
from kamacache.store.layout import Geometry, geometry
from kamacache.store.near import NearCache
from kamacache.store.reader import NEGATIVE, Answer, GetEnds, Lookup, Negative, make_lookup
from kamacache.store.writer import (
    ShardWriter,
    check_value_size,
    last_maintained_ms,
    published_counters,
)

__all__ = [
    "NEGATIVE",
    "Answer",
    "Arena",
    "Geometry",
    "GetEnds",
    "Held",
    "Lookup",
    "NearCache",
    "Negative",
    "ShardIdentity",
    "ShardPaths",
    "ShardWriter",
    "check_value_size",
    "create_shard",
    "geometry",
    "last_maintained_ms",
    "make_lookup",
    "open_for_reading",
    "open_writer",
    "private_shard",
    "published_counters",
    "required_bytes",
    "touch_of",
    "unlink_files",
    "warn_unless_tmpfs",
]


def required_bytes(spec: GroupSpec, workers: int) -> int:
    """Return the bytes that all shards of a group take in the shared-memory folder."""
    return geometry(spec.cache_bytes // workers, spec.item_bytes_mean).total_bytes * workers


def create_shard(
    shm_dir: str, spec: GroupSpec, shard: int, workers: int, hash_seed: int, boot_id: str
) -> Geometry:
    """Make and reserve a shard's files. Raises `StorageError`; see `arena.create_files`."""
    identity = ShardIdentity(spec, shard, workers, hash_seed, boot_id)
    return create_files(ShardPaths.of(shm_dir, spec.name, shard), identity)


def open_writer(
    shm_dir: str, spec: GroupSpec, shard: int, workers: int, hash_seed: int, boot_id: str
) -> ShardWriter:
    """Become the one writer of a shard. Raises `StorageError`; see `arena.open_for_writing`."""
    identity = ShardIdentity(spec, shard, workers, hash_seed, boot_id)
    arena = open_for_writing(ShardPaths.of(shm_dir, spec.name, shard), identity)
    return ShardWriter(
        arena,
        group=spec.name,
        eviction=spec.eviction,
        hash_seed=hash_seed,
        mirror_share=spec.mirror_share,
    )


def private_shard(
    spec: GroupSpec, *, near: NearCache | None = None, ends: GetEnds | None = None
) -> tuple[ShardWriter, Lookup]:
    """Return a shard in this process's own memory and the lookup over it."""
    seed = int.from_bytes(os.urandom(8), "little")
    arena = private_arena(geometry(spec.cache_bytes, spec.item_bytes_mean))
    writer = ShardWriter(arena, group=spec.name, eviction=spec.eviction, hash_seed=seed)
    lookup = make_lookup(
        (arena,), hash_seed=seed, touch=touch_of(spec.eviction), near=near, ends=ends
    )
    return writer, lookup
