"""/metrics: the node's numbers for Prometheus, in its text format or in OpenMetrics.

*Process*: http, on its loop. One custom collector over one snapshot, never prometheus-client's
multi-process mode: what the processes of a node count lies in shared memory already.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Iterator
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from kamacache.errors import KamaCacheError
from kamacache.http.answers import answer_error, answer_failure
from kamacache.http.measures import MEASURES, Measure
from kamacache.http.routes import Page
from kamacache.limits import METRICS_GZIP_BYTES
from kamacache.local.observing import Observer
from kamacache.local.snapshot import Histogram, NodeSnapshot

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class SnapshotCollector:
    """The metrics of one snapshot, as prometheus-client asks for them."""

    def __init__(self, told: NodeSnapshot) -> None:
        self._told = told

    def collect(self) -> Iterator[Any]:
        """Yield each metric, also one that has no series now."""
        from prometheus_client import core

        families: dict[str, Callable[..., Any]] = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
        }
        for measure in MEASURES:
            family = families[measure.kind](measure.name, measure.meaning, labels=measure.labels)
            _fill(family, measure, self._told)
            yield family


def _fill(family: Any, measure: Measure, told: NodeSnapshot) -> None:
    for labels, value in measure.read(told):
        if isinstance(value, Histogram):
            buckets, below = [], 0
            for bound_s, count in zip((*value.bounds_s, "+Inf"), value.counts, strict=True):
                below += count
                buckets.append((str(bound_s), below))
            family.add_metric(labels, buckets, value.sum_s)
        elif value is not None:
            family.add_metric(labels, value)


def encoded(told: NodeSnapshot, *, open_metrics: bool) -> bytes:
    """Return a snapshot as the text that Prometheus reads."""
    from prometheus_client import exposition
    from prometheus_client.openmetrics import exposition as open_exposition

    module: Any = open_exposition if open_metrics else exposition
    text: bytes = module.generate_latest(SnapshotCollector(told))
    return text


def accepts_gzip(header: str) -> bool:
    """Tell whether a client takes gzip."""
    for part in header.split(","):
        name, _, quality = part.partition(";")
        if name.strip().lower() in ("gzip", "*"):
            return quality.replace(" ", "").lower() not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def metrics_page(observer: Observer) -> Page:
    """Return the page."""

    async def handle(request: Request) -> Response:
        try:
            import prometheus_client  # noqa: F401
        except ImportError:
            return answer_failure(
                501,
                "NotInstalled",
                "metrics need prometheus-client: pip install 'kamacache[metrics]'",
            )
        try:
            told = await observer.snapshot()
        except KamaCacheError as error:
            return answer_error(error)
        open_metrics = "application/openmetrics-text" in request.headers.get("accept", "")
        headers = {
            "content-type": OPEN_METRICS if open_metrics else TEXT,
            "cache-control": "no-store",
            "vary": "accept, accept-encoding",
        }
        # In a thread: of a large node it takes tens of milliseconds, in which others are answered.
        body = await asyncio.to_thread(encoded, told, open_metrics=open_metrics)
        gzipped = accepts_gzip(request.headers.get("accept-encoding", ""))
        if gzipped and len(body) >= METRICS_GZIP_BYTES:
            headers["content-encoding"] = "gzip"
            body = await asyncio.to_thread(gzip.compress, body, 3)
        return Response(body, headers=headers)

    return Page(path="/metrics", handle=handle, name="metrics", always=True)
