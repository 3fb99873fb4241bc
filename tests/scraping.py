"""A scrape of a real node's /metrics, read back by prometheus-client's own parser."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kamacache.http.metrics import encoded
from kamacache.local.observing import observe

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
Labels = frozenset[tuple[str, str]]


@dataclass
class Scrape:
    """One answer."""

    text: str
    headers: Mapping[str, str]
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """Return the sum over all series of a name."""
        found = [value for (sample, _), value in self.samples.items() if sample == name]
        assert found, f"there is no {name}"
        return sum(found)

    def of(self, name: str, **labels: str) -> float:
        """Return the sum over the series of a name with these labels; 0 where there is none."""
        wanted = set(labels.items())
        return sum(v for (n, found), v in self.samples.items() if n == name and wanted <= found)

    def has(self, name: str, **labels: str) -> bool:
        """Tell whether there is a series of a name with these labels."""
        wanted = set(labels.items())
        return any(n == name and wanted <= found for n, found in self.samples)

    @property
    def counters(self) -> dict[tuple[str, Labels], float]:
        """Every series that must never go down: counters, buckets, counts and sums."""
        falling = {name for name, kind in self.types.items() if kind == "gauge"}
        return {key: value for key, value in self.samples.items() if key[0] not in falling}


def scrape(api: str, accept: str = "text/plain", timeout_s: float = 10.0) -> Scrape:
    """Ask a node for its metrics over HTTP; they may be `SNAPSHOT_EVERY_S` old."""
    request = urllib.request.Request(f"http://{api}/metrics", headers={"accept": accept})
    with OPENER.open(request, timeout=timeout_s) as reply:
        return _read(reply.read().decode(), dict(reply.headers.items()), accept == OPEN_METRICS)


def fresh(run_dir: str | os.PathLike[str]) -> Scrape:
    """Return the metrics of a node as they are now, made in this process."""
    return _read(encoded(observe(run_dir), open_metrics=False).decode(), {}, False)


def _read(text: str, headers: Mapping[str, str], opened: bool) -> Scrape:
    found = Scrape(text, headers)
    parse: Callable[[str], Iterable[Any]] = parse_open if opened else parse_text
    for family in parse(text):
        found.types[family.name] = family.type
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found.samples, f"{key} comes twice"
            found.samples[key] = sample.value
    return found
