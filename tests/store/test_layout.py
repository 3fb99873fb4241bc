"""`kamacache.store.layout`: the geometry of a shard, and fields that must not overlap."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamacache.clock import STAMP_SHIFT
from kamacache.errors import ConfigError
from kamacache.limits import KEY_BYTES_MAX
from kamacache.store import layout
from kamacache.store.layout import Geometry, geometry, padded
from tests.store.shards import Shard

LEAST = geometry(1, 128)


@given(
    cache_bytes=st.integers(1, layout.SHARD_BYTES_MAX),
    item_bytes_mean=st.integers(8, 1 << 24),
)
@example(2048, 128)
@example(2048, 1 << 24)
@example(layout.SHARD_BYTES_MAX, 8)
@example(layout.SHARD_BYTES_MAX, 1 << 24)
def test_every_size_gives_files_that_hold_their_parts(
    cache_bytes: int, item_bytes_mean: int
) -> None:
    sizes = geometry(cache_bytes, item_bytes_mean)
    assert sizes.slots % layout.BUCKET_SLOTS == 0
    assert sizes.slots >= 2 * layout.BUCKET_SLOTS
    assert sizes.slots < 1 << 32
    assert sizes.access_bytes == sizes.slots
    assert sizes.data_bytes % 8 == 0
    assert sizes.log_offset % 8 == 0
    assert sizes.log_offset + sizes.log_bytes <= sizes.data_bytes
    assert sizes.data_bytes - sizes.log_offset - sizes.log_bytes < 8 * sizes.segments
    assert layout.SEGMENTS_MIN <= sizes.segments <= layout.SEGMENTS_MAX
    assert sizes.segment_bytes >= layout.SEGMENT_BYTES_MIN
    assert sizes.segment_bytes % 8 == 0
    # Every place has 33 bits, a segment's fill and its live bytes 32 each.
    assert sizes.data_bytes <= 8 << 33
    assert sizes.segment_bytes < 1 << 32
    assert sizes.value_bytes_max > 0
    for key_bytes in (1, 64, 65, KEY_BYTES_MAX):
        record = layout.RECORD_HEADER_BYTES + key_bytes + sizes.value_bytes_beside(key_bytes)
        assert padded(record) <= sizes.segment_bytes
        assert sizes.value_bytes_beside(key_bytes) <= sizes.value_bytes_max


@given(
    cache_bytes=st.integers(LEAST.total_bytes + (1 << 16), 1 << 34),
    item_bytes_mean=st.integers(8, 1 << 16),
)
def test_above_the_least_size_both_files_together_are_what_was_asked_for(
    cache_bytes: int, item_bytes_mean: int
) -> None:
    least = geometry(1, item_bytes_mean).total_bytes
    sizes = geometry(cache_bytes, item_bytes_mean)
    if cache_bytes >= least:
        # The step to the next whole slot may add less than a page at the least size itself.
        assert sizes.total_bytes in range(cache_bytes & ~7, max(cache_bytes, least) + 4096)


def test_a_group_of_2_kib_is_rounded_up_to_64_segments_of_4_kib() -> None:
    assert geometry(2048, 128) == LEAST
    assert LEAST.segments == 64
    assert LEAST.segment_bytes == 4096
    assert LEAST.total_bytes < 320 << 10


def test_equal_settings_give_equal_geometry_and_others_another_one() -> None:
    assert geometry(64 << 20, 128) == geometry(64 << 20, 128)
    assert geometry(64 << 20, 128) != geometry(64 << 20, 256)
    assert isinstance(geometry(64 << 20, 128), Geometry)


def test_more_than_places_can_name_is_a_config_error() -> None:
    geometry(layout.SHARD_BYTES_MAX, 128)
    with pytest.raises(ConfigError, match="use more workers"):
        geometry(layout.SHARD_BYTES_MAX + 8, 128)
    with pytest.raises(ConfigError, match="at least 1"):
        geometry(1 << 20, 0)


def test_the_fields_of_a_word_fill_it_without_overlap() -> None:
    generation = layout.GENERATION_MAX << layout.GENERATION_SHIFT
    assert generation & layout.PLACE_MASK == 0
    assert generation >> layout.TAG_SHIFT == 0
    assert generation | layout.PLACE_MASK | 0xFFFF << layout.TAG_SHIFT == (1 << 64) - 1
    head = (layout.KEY_LENGTH_MASK, layout.FLAG_EXPIRES, layout.FLAG_NEGATIVE)
    assert sum(head) == head[0] | head[1] | head[2] <= layout.PLAIN_MASK
    assert layout.CHECKSUM_MASK == 0xFFFF
    high = layout.EXPIRY_MS_MAX >> layout.EXPIRY_LOW_SHIFT
    assert high == layout.EXPIRY_HIGH_MASK < 1 << STAMP_SHIFT
    assert layout.RECORD_HEADER.size == layout.RECORD_HEADER_BYTES


def test_a_packed_header_reads_back_field_by_field() -> None:
    expiry = (1 << 39) + 12_345
    packed = layout.RECORD_HEADER.pack(
        5 | layout.FLAG_EXPIRES,
        0xBEEF,
        70_000,
        0xFEDC_BA98,
        expiry & 0xFFFFFFFF,
        7 << 8 | expiry >> 32,
    )
    words = memoryview(packed).cast("Q")
    assert words[0] & layout.KEY_LENGTH_MASK == 5
    assert words[0] & layout.FLAG_EXPIRES
    assert words[0] >> 16 & layout.CHECKSUM_MASK == 0xBEEF
    assert words[0] >> layout.VALUE_LENGTH_SHIFT == 70_000
    assert words[1] & layout.SLOT_MASK == 0xFEDC_BA98
    assert layout.expiry_of(words, 0) == expiry
    assert words[2] >> STAMP_SHIFT == 7


def test_a_key_can_be_told_from_an_empty_slot() -> None:
    assert KEY_BYTES_MAX < layout.KEY_LENGTH_MASK


def test_an_empty_slot_names_a_place_where_no_key_matches() -> None:
    assert layout.MAGIC & layout.KEY_LENGTH_MASK > KEY_BYTES_MAX


def test_the_counters_fit_into_the_header() -> None:
    assert layout.H_COUNTERS + len(layout.COUNTERS) <= layout.HEADER_WORDS
    assert layout.H_HEARTBEAT < layout.H_COUNTERS


def test_overhead_is_at_most_48_bytes_an_item_at_the_mean() -> None:
    shard = Shard(cache_bytes=2 << 20)
    value = b"v" * (128 - 8)
    for number in range(2 * shard.geometry.slots):
        shard.writer.put(b"%08d" % number, value)
    assert shard.writer.stats()["evictions"]
    overhead = shard.geometry.total_bytes / shard.writer.items - 128
    assert overhead <= 48
