"""The shard hash: which worker, which slot, which tag. (The ring hash is the cluster's.)

*Process*: all that hold a shard's mapping. xxh3-64 of the key's bytes, seeded at random per node
so that no client can aim at one bucket::

    63                48 47                          30 29             0
    +-------------------+-----------------------------+-----------------+
    | tag (16)          | second slot (18 .. 47)      | home slot (30)  |
    +-------------------+-----------------------------+-----------------+

A field f of b bits selects one of n as ``f * n >> b``, which needs no power of two and is decided
by the field's high bits. So the tag may also choose the worker (of 8 workers each sees 13 bits of
tag that differ), and the second slot's low bits, which only tables of more than 262,144 slots look
at, may be the home slot's high ones. All fields are at most 30 bits: CPython calculates with those
at half the cost of larger numbers. The hot paths of `kamacache.store` spell these expressions
out, since a call costs more than the hash.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest


def shard_hash(key: bytes, seed: int) -> int:
    """Return the 64-bit shard hash of a key's bytes."""
    return xxh3_64_intdigest(key, seed)


def worker_of(digest: int, workers: int) -> int:
    """Return the worker, 0 to ``workers - 1``, that owns a key of this hash."""
    return (digest >> 48) * workers >> 16


def home_slot(digest: int, slots: int) -> int:
    """Return the slot where an entry of this hash is looked for first."""
    return (digest & 0x3FFFFFFF) * slots >> 30


def second_slot(digest: int, slots: int) -> int:
    """Return the slot of the second choice."""
    return (digest >> 18 & 0x3FFFFFFF) * slots >> 30
