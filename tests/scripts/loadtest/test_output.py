"""Files that are found out before the test, and are whole or as they were."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.output import (
    Document,
    OutputError,
    check_writable,
    replace_file,
    write_json,
)
from scripts.loadtest.ratios import Ratios, Spread
from scripts.loadtest.results import OpSummary, Summary, UseSummary
from tests.scripts.loadtest.made_results import node_use, op, round_result, whole_test

ROOT = Path(__file__).resolve().parents[3]
LOCAL, REDIS = "local:/run/kamacache", "redis:127.0.0.1:6379"


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    check_writable(kept)
    check_writable(tmp_path / "new.json")
    assert os.listdir(tmp_path) == ["kept.json"]
    assert kept.read_text() == "before"


def refused(path: Path, because: str) -> None:
    with pytest.raises(OutputError, match=f"^{re.escape(str(path))} ?.*{because}"):
        check_writable(path)


def test_what_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory")
    refused(tmp_path / "none" / "a.json", "there is no directory")
    refused(Path("/dev/null"), "is not a regular file")
    refused(tmp_path / ("x" * 300), "File name too long")
    file = tmp_path / "file"
    file.touch()
    refused(file / "a.json", "there is no directory")
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    refused(circle, "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(tmp_path / "a.json", "Permission denied")


def test_a_directory_of_the_kernel_is_refused() -> None:
    refused(Path("/proc/self/a.json"), "cannot be written")


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")

    def half(made: Path) -> None:
        made.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        replace_file(path, half)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "result.json")
    write_json(whole_test(round_result(LOCAL)), link)
    assert link.is_symlink()
    assert json.loads((tmp_path / "real" / "result.json").read_text())["format"] == 1


def test_the_document_has_sums_ratios_and_every_round(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    use = [node_use("worker-0", 11, cpu_s=0.002)]
    write_json(
        whole_test(
            round_result(LOCAL, 1, ops=[op("read", [10.0] * 4)], use=use, hits=3, misses=1),
            round_result(REDIS, 1, ops=[op("read", [20.0] * 2)], errors={"timeout": 2}),
            notes=["a note"],
        ),
        path,
    )
    read = json.loads(path.read_text())
    assert list(read) == [
        "format",
        "began",
        "arguments",
        "machine",
        "versions",
        "notes",
        "targets",
        "ratios",
        "rounds",
    ]
    local, redis = read["targets"]
    assert (local["target"], redis["target"]) == (LOCAL, REDIS)
    assert (local["operations"], local["operations_per_s"], local["hit_ratio"]) == (4, 4.0, 0.75)
    assert local["p50_us"] == pytest.approx(10.0, rel=0.001)
    assert local["use"][0]["cpu_s_per_1000"] == pytest.approx(0.5)
    assert redis["errors"] == {"timeout": 2}
    assert redis["hit_ratio"] is None
    assert read["ratios"][0]["throughput"] == {"median": 0.5, "least": 0.5, "greatest": 0.5}
    # The histograms are HdrHistogram's own format, for its other tools.
    assert Histogram.decode(read["rounds"][1]["ops"][0]["histogram"]).count == 2


@pytest.mark.parametrize(
    "kind",
    [Document, Summary, OpSummary, UseSummary, Ratios, Spread],
    ids=lambda kind: kind.__name__,
)
def test_the_page_names_every_key(kind: type[msgspec.Struct]) -> None:
    page = (ROOT / "docs" / "load-test.md").read_text()
    assert [name for name in kind.__struct_fields__ if f"`{name}`" not in page] == []
