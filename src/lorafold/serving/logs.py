"""The log: one line for each request, and one for each thing that happens to the server.

A request's id is the server's own; what a client calls it is never taken over. No line has a prompt
or a completion, unless the settings ask for texts.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

from lorafold.serving.server import Record

log = logging.getLogger(__name__)


class Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        found = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["error"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


def set_up(as_json: bool) -> None:
    """Write the log to stderr.

    Args:
        as_json: one JSON object a line, instead of text for people.
    """
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.setFormatter(Json() if as_json else plain)
    for name, level in (("lorafold", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    threading.excepthook = _ended


def _ended(dead: threading.ExceptHookArgs) -> None:
    """Log the error that ended a thread."""
    error = dead.exc_value
    log.error("the thread %s ended", dead.thread and dead.thread.name, exc_info=error)


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
        new = sum(len(job.end.tokens) if job.end else job.passed_on for job in jobs)
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
