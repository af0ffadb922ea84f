"""The log: one line for each request, and one for each thing that happens to the server.

A request's id is the server's own; what a client calls it is never taken over. Of what a client
sends a line has the path, as it was sent and at most 200 characters of it, and nothing else: of an
error that was raised for a request it has the type and the places, and not the message, in which a
library may quote anything. All of it is there if the settings ask for texts. A line that repeats
one within a few seconds is counted and not written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
import traceback
from typing import Any, TextIO

from lorafold.errors import cut
from lorafold.serving.server import Record

log = logging.getLogger(__name__)
MOST = 4000  # characters of a line, but for texts
EACH = 5.0  # seconds in which a line is written once


class Lines(logging.Formatter):
    """Lines for people, or one JSON object a line."""

    def __init__(self, as_json: bool, texts: bool) -> None:
        super().__init__()
        self._json, self._texts = as_json, texts

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, and of the error that it is about, where that was raised."""
        told, error = record.getMessage(), record.exc_info[1] if record.exc_info else None
        told, where = told if self._texts else cut(told, MOST), ""
        if error is not None and self._texts:
            where = "".join(traceback.format_exception(error)).rstrip()
        elif error is not None:
            where = "\n".join(places(error))
        if not self._json:
            line = f"{self.formatTime(record, '%H:%M:%S')} {told}"
            return f"{line}\n{where}" if where else line
        found = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": told,
            **getattr(record, "fields", {}),
        }
        error_of = {"error": where} if where else {}
        return json.dumps(found | error_of, ensure_ascii=False, default=str)


class RepeatFilter(logging.StreamHandler[TextIO]):
    """Writes a line once in EACH seconds; how often it was repeated meanwhile is written with
    whatever is logged next. A request's line is always written.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._written = dict[object, tuple[logging.LogRecord, int]]()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        for key, (first, n) in [*self._written.items()]:
            if abs(record.created - first.created) > EACH:
                del self._written[key]
                told = {"msg": f"{first.getMessage()} (repeated {n:,} times)", "args": ()}
                if n:
                    super().emit(logging.makeLogRecord(vars(first) | told | {"exc_info": None}))
        key = record.name, record.getMessage(), record.exc_info and record.exc_info[0]
        first, n = self._written.get(key, (record, -1))
        if not hasattr(record, "fields"):
            self._written[key] = first, n + 1
        if n < 0:
            super().emit(record)


def set_up(as_json: bool, texts: bool = False) -> None:
    """Write the log to stderr: the server's, and warnings of the libraries that it uses."""
    handler = RepeatFilter()
    handler.setFormatter(Lines(as_json, texts))
    for name in ("lorafold", "uvicorn", "asyncio", "sse_starlette"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "lorafold" else logging.WARNING)
    threading.excepthook = _ended
    sys.unraisablehook = _unraisable


def unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nothing on the event loop waits for, without the objects that took part."""
    log.error("on the event loop: %s", context["message"], exc_info=context.get("exception"))


def places(error: BaseException) -> list[str]:
    """A line for the type of an error, and one for each place that it came through; what it follows
    from stands before it.
    """
    lines = [type(error).__name__]
    lines += [
        f"  {frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    for inner in getattr(error, "exceptions", ()):  # of a group
        lines += [f"  {line}" for line in places(inner)]
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines if before is None else [*places(before), "and then", *lines]


def _ended(dead: threading.ExceptHookArgs) -> None:
    """Log the error that ended a thread."""
    error = dead.exc_value
    log.error("the thread %s ended", dead.thread and dead.thread.name, exc_info=error)


def _unraisable(about: Any) -> None:
    """Log an error that nobody could be told of."""
    log.error("an object could not be cleared away", exc_info=about.exc_value)


def write(record: Record) -> None:
    """Log a request that has ended."""
    reply = record.reply
    jobs = reply.jobs if reply else []
    fields: dict[str, Any] = {
        "request": record.id,
        "method": record.method,
        "path": record.sent[:200],
        "status": record.status,
        "outcome": record.outcome,
        "tenant": record.tenant,
        "adapter": record.version,
        "seconds": round(time.monotonic() - record.started, 4),
    }
    if reply is not None and jobs:
        new = sum(len(job.end.tokens) if job.end else job.tokens for job in jobs)
        fields |= {"prompt_tokens": reply.usage["prompt_tokens"], "tokens": new}
        firsts = [job.times[0] - job.asked for job in jobs if job.times]
        waits = [job.began - job.asked for job in jobs if job.began is not None]
        fields |= {"first_token": round(min(firsts), 4)} if firsts else {}
        fields |= {"queue": round(max(waits), 4)} if waits else {}
        if record.texts:
            fields |= record.texts
            fields["completions"] = [job.end.text for job in jobs if job.end]
    # a client's characters make no line of their own
    shown = " ".join(f"{k}={ascii(str(v))[1:-1]}" for k, v in fields.items() if v not in ("", None))
    log.info("%s", shown.removeprefix("request="), extra={"fields": fields})
