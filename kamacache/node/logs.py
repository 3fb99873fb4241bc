"""Logging of a node's processes: one format for structlog's lines and the standard logger's.

*Process*: supervisor and roles. Everything goes to stderr; stdout carries the ready line alone.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure_logs(level: str, form: str, **fields: Any) -> None:
    """Send this process's log to stderr as ``form`` ("console" or "json"), ``fields`` on each line.

    Call again after a fork to change the fields (role, shard, pid).
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _with_fields(fields),
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any]
    if form == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        colors = sys.stderr.isatty()
        last = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *last])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _with_fields(fields: dict[str, Any]) -> Any:
    def add(logger: object, method: str, event: dict[str, Any]) -> dict[str, Any]:
        return {**event, **{name: value for name, value in fields.items() if name not in event}}

    return add
