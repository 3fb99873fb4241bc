"""Logging of a node's processes: one format for structlog's lines and the standard logger's.

*Process*: supervisor and roles. Everything goes to stderr; stdout carries the ready line alone.
Each line says from where it comes, whoever logged it::

    node     its name in the cluster, else where it listens, else the name of its run directory
    role     supervisor, worker, front, agent, http
    shard    the worker's shard, or which of the fronts it is; none for the supervisor
    pid      of the process that logs, also where a getter forked it

*Invariants*: a line is one line, whatever is in it, and at most `LOG_LINE_BYTES_MAX` (a traceback
on the console aside, which has several). Both libraries go by the root logger's level, so that a
reload changes one number. A logger's own fields never stand in for these four, nor for level,
event, logger and timestamp.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

from kamacache.limits import LOG_FIELD_CHARS_LEAST, LOG_LINE_BYTES_MAX
from kamacache.node.stderr import Stderr, StderrHandler

Event = MutableMapping[str, Any]

_TAILS: Final = ("exception", "stack")  # of which the end says most
_RENDERED: Final = (*_TAILS, "exc_info")  # on the console with line breaks, as Python does
_OWN: Final = ("node", "role", "shard", "pid")
_FIRST: Final = ("timestamp", "level", "event", "logger", *_OWN)
_STRUCTLOG: Final = ("event", "_record", "_from_structlog")  # there before any field of a caller
_TAKEN: Final = frozenset((*_FIRST, *_STRUCTLOG))
_OF_A_RECORD: Final = frozenset(
    (*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName")
)

log = logging.getLogger("kamacache.node")

_whose: dict[str, Any] = {}
_handlers: list[StderrHandler] = []  # this process's one, which a role has inherited


def node_label(name: str | None, listen: object, run_dir: os.PathLike[str]) -> str:
    """Return what a node is called in its log."""
    return name or str(listen or os.path.basename(run_dir))


def configure_logs(
    level: str, form: str, *, node: str = "", role: str = "supervisor", shard: int | None = None
) -> None:
    """Send this process's log to stderr as ``form`` ("console" or "json").

    Call again after a fork to say whose it is now, and after the user's app was imported: what it
    configured of the root logger's stderr, and of our loggers, is undone. Its other handlers stay.
    """
    _whose.update(node=node, role=role, shard=shard)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _set_aside,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _with_whose,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Any]
    if form == "json":
        last = [structlog.processors.format_exc_info, render_json]
    else:
        plain = structlog.dev.plain_traceback
        console = structlog.dev.ConsoleRenderer(
            colors=os.isatty(2), exception_formatter=plain, pad_event_to=0
        )
        last = [_printable, console]
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[remove, *last]
    )
    root = logging.getLogger()
    if not _handlers:  # those of a program that embeds the node, whose threads are not here
        root.handlers.clear()
        _handlers.append(StderrHandler(Stderr()))
    ours = _handlers[0]
    ours.setFormatter(formatter)
    root.handlers[:] = [ours, *(h for h in root.handlers if h is not ours and not _to_stderr(h))]
    root.setLevel(level.upper())
    _free_our_loggers()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    logging.captureWarnings(True)
    sys.excepthook = _on_uncaught
    sys.unraisablehook = _on_unraisable
    threading.excepthook = _on_thread_failed


def _to_stderr(handler: logging.Handler) -> bool:
    """Whether a handler would write our lines to stderr a second time."""
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams


def _free_our_loggers() -> None:
    """Undo what an app's configuration did to them: disabled, a level or handlers of their own."""
    for name, logger in logging.root.manager.loggerDict.items():
        if (name == "kamacache" or name.startswith("kamacache.")) and isinstance(
            logger, logging.Logger
        ):
            logger.disabled, logger.propagate = False, True
            logger.handlers.clear()
            logger.setLevel(logging.NOTSET)


def relabel_logs(node: str) -> None:
    """Call the node so from now on: its port is known."""
    _whose["node"] = node


def _set_aside(logger: object, method: str, event: Event) -> Event:
    """Give another name to what the caller calls like a field of ours, and add a record's extra.

    Not structlog's ExtraAdder: a field called "event" or "_record" there takes the place of ours.
    """
    record = event.get("_record")
    if not isinstance(record, logging.LogRecord):  # a line of structlog's
        record = None
    ours = {name: event[name] for name in (_STRUCTLOG if record else ("event",)) if name in event}
    theirs = {name: value for name, value in event.items() if name not in ours}
    if record:
        theirs |= {k: v for k, v in record.__dict__.items() if k not in _OF_A_RECORD}
    return {**{f"{k}_" if k in _TAKEN else k: v for k, v in theirs.items()}, **ours}


def _with_whose(logger: object, method: str, event: Event) -> Event:
    return {**event, **_whose, "pid": os.getpid()}


# -- rendering -----------------------------------------------------------------------------


def render_json(logger: object, method: str, event: Event) -> str:
    """Return an event as one line of JSON in ASCII, cut where it is too long."""
    first = [name for name in _FIRST if name in event]
    told = {str(name): _plain(event[name]) for name in dict.fromkeys([*first, *event])}
    if len(told) > LOG_LINE_BYTES_MAX // LOG_FIELD_CHARS_LEAST:  # to cut each would take long
        told = dict(list(told.items())[: LOG_LINE_BYTES_MAX // LOG_FIELD_CHARS_LEAST])
        told["cut"] = True
    while len(line := json.dumps(told)) >= LOG_LINE_BYTES_MAX:
        told["cut"] = True
        texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in told.items()}
        longest = max(texts, key=lambda name: len(texts[name]))
        text = texts[longest]
        if len(text) <= LOG_FIELD_CHARS_LEAST:  # far too many fields: the first ones
            told = dict(list(told.items())[: len(told) // 2]) | {
                name: told[name] for name in (*_FIRST, "cut") if name in told
            }
        else:
            half = len(text) // 2
            told[longest] = text[-half:] if longest in _TAILS else text[:half]
    return line


def _plain(value: Any) -> Any:
    """Return what JSON has a form for."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value).encode("utf-8", "backslashreplace").decode()
    return value


def _printable(logger: object, method: str, event: Event) -> Event:
    """Escape line breaks and what else a terminal would act upon."""
    return {
        _escaped(name): value if name in _RENDERED else _escaped(value)
        for name, value in event.items()
        if not (name == "shard" and value is None)
    }


def _escaped(value: Any) -> Any:
    text = value if isinstance(value, str) else repr(value)  # a table's repr has several lines
    if text.isprintable():
        return value
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# -- what Python would print itself --------------------------------------------------------


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    log.error("the process failed", exc_info=(kind, error, trace))


def _on_unraisable(told: Any) -> None:
    error = (told.exc_type, told.exc_value, told.exc_traceback)
    log.error("an error that nobody could be told of", exc_info=error)


def _on_thread_failed(told: threading.ExceptHookArgs) -> None:
    if told.exc_type is SystemExit:
        return
    error = told.exc_value or told.exc_type()
    log.error("a thread failed", exc_info=(told.exc_type, error, told.exc_traceback))
