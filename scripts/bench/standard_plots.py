"""The plots of the standard set's page, from the same JSON: small PNG files.

*Process*: `standard.py`. matplotlib draws into files alone (Agg); no display is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import standard_page
from PIL import Image

mpl.use("Agg")

import matplotlib.pyplot as plt

DPI = 80
MET, MISSED, LINE = "#4878a8", "#b8433a", "#444444"
NAME_CHARS_MAX = 70
COLOURS = 48


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw what the results allow into ``folder``; return the files by name."""
    drawn = {"targets": _targets(results, folder), "cores": _cores(results, folder)}
    return {name: path for name, path in drawn.items() if path is not None}


def shrink(source: Path, target: Path) -> None:
    """Copy a PNG with few colours: lines and letters need no more, and it is a third as large."""
    with Image.open(source) as image:
        image.convert("RGB").quantize(COLOURS).save(target, optimize=True)


def distance(target: Mapping[str, Any]) -> float | None:
    """Return the measured value over the asked one, so that below 1 is met in either direction."""
    words = target["target"].split()
    try:
        asked = float(words[-1])
    except ValueError:
        return None
    if not asked or not target["median"]:
        return None
    over: float = target["median"] / asked
    return over if words[:2] == ["at", "most"] else 1 / over


def _targets(results: Mapping[str, Any], folder: Path) -> Path | None:
    found = [
        (distance(target), f"{name}: {target['name']}", target["met"])
        for name, target in standard_page.targets_of(results)
        if target["met"] is not None and name != "instructions"
    ]
    bars = sorted((far, name, met) for far, name, met in found if far is not None)
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(10, 1 + 0.22 * len(bars)))
    axes.barh(
        [_short(name) for _, name, _ in bars],
        [far for far, _, _ in bars],
        color=[MET if met else MISSED for _, _, met in bars],
    )
    axes.axvline(1, color=LINE, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.get_xaxis().set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("measured, over what the target asks (below 1: met)")
    axes.tick_params(axis="y", labelsize=7)
    return _save(figure, folder / "targets.png")


def _cores(results: Mapping[str, Any], folder: Path) -> Path | None:
    measured = results.get("benchmarks", {}).get("many_cores", {}).get("measured", {})
    rows = measured.get("model")
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for workload in dict.fromkeys(each["workload"] for each in rows):
        points = [each for each in rows if each["workload"] == workload]
        cores = [each["cores"] for each in points]
        axes.plot(cores, [each["requests_per_s"] for each in points], marker="o", label=workload)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({each["cores"] for each in rows}), None)
    axes.get_xaxis().set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.set_xlabel("cores (8 workers, 4 fronts)")
    axes.set_ylabel("requests a second, modelled")
    axes.legend(fontsize=7)
    axes.grid(visible=True, alpha=0.3)
    return _save(figure, folder / "cores.png")


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARS_MAX else name[: NAME_CHARS_MAX - 3] + "..."


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
