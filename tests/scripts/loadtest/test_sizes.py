"""Sizes of values: what is asked for is what is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kamacache.limits import VALUE_BYTES_CEILING
from scripts.loadtest.sizes import Values, parse_sizes


def drawn(text: str, count: int = 20_000) -> list[int]:
    return parse_sizes(text).draw(count, np.random.default_rng(1))


def test_fixed_size() -> None:
    assert set(drawn("7")) == {7}
    values = Values(parse_sizes("7"), np.random.default_rng(1))
    assert [len(values.next()) for _ in range(3)] == [7, 7, 7]
    assert Values(parse_sizes("0"), np.random.default_rng(1)).next() == b""


def test_lognormal_has_the_mean_that_was_asked_for() -> None:
    sizes = drawn("lognormal:500:0.8")
    assert np.mean(sizes) == pytest.approx(500, rel=0.03)
    assert np.std(np.log(sizes)) == pytest.approx(0.8, rel=0.03)
    assert parse_sizes("lognormal:500:0.8").mean_bytes == pytest.approx(500)


def test_lognormal_stays_within_the_largest_value() -> None:
    sizes = drawn("lognormal:1000000:4")
    assert max(sizes) <= VALUE_BYTES_CEILING
    assert min(sizes) >= 1


def test_list_is_drawn_from(tmp_path: Path) -> None:
    path = tmp_path / "sizes"
    path.write_text("10\n\n 20 \n70000\n")
    sizes = drawn(f"list:{path}")
    assert {size: sizes.count(size) for size in set(sizes)} == pytest.approx(
        {10: 6667, 20: 6667, 70000: 6667}, rel=0.05
    )
    values = Values(parse_sizes(f"list:{path}"), np.random.default_rng(1))
    lengths = {len(values.next()) for _ in range(100)}
    assert lengths == {10, 20, 70000}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no size"),
        ("-1", "is no size"),
        ("1.5", "is no size"),
        ("99999999", "the limit is"),
        ("lognormal:5", "is no size"),
        ("lognormal:0:1", "MEAN"),
        ("lognormal:5:9", "SIGMA"),
        ("lognormal:inf:1", "MEAN"),
        ("list:", "is no size"),
        ("list:/no/such/file", "No such file"),
    ],
)
def test_mistakes_name_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("content", "says"), [("\n", "no sizes"), ("5\nten\n", "line 2"), ("99999999\n", "line 1")]
)
def test_mistakes_in_a_list_name_the_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "sizes"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        parse_sizes(f"list:{path}")
