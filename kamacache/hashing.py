"""The shard hash: which worker, which slot, which tag. (The ring hash is the cluster's.)

*Process*: all that hold a shard's mapping. xxh3-64 of the key's bytes, seeded at random per node
so that no client can aim at one bucket::

    63            48 47            32 31                              0
    +---------------+----------------+--------------------------------+
    | tag (16)      | worker (16)    | home slot (32)                 |
    +---------------+----------------+--------------------------------+

A field f of b bits selects one of n as ``f * n >> b``, which needs no power of two. The hot paths
of `kamacache.store.reader` spell these expressions out, since a call costs more than the hash.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest


def shard_hash(key: bytes, seed: int) -> int:
    """Return the 64-bit shard hash of a key's bytes."""
    return xxh3_64_intdigest(key, seed)


def worker_of(digest: int, workers: int) -> int:
    """Return the worker, 0 to ``workers - 1``, that owns a key of this hash."""
    return (digest >> 32 & 0xFFFF) * workers >> 16


def home_slot(digest: int, slots: int) -> int:
    """Return the slot where an entry of this hash is looked for first."""
    return (digest & 0xFFFFFFFF) * slots >> 32


def second_slot(digest: int, slots: int) -> int:
    """Return the slot of the second choice: the home's bits, mixed with the tag's.

    Not the worker's bits: those are nearly equal for all keys of one shard. The constant is
    MurmurHash2's multiplier (Austin Appleby), odd and of 31 bits.
    """
    return ((digest ^ (digest >> 48) * 0x5BD1E995) & 0xFFFFFFFF) * slots >> 32
