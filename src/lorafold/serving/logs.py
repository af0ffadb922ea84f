"""The log: one line per request and per event of the server.

Only the first 200 characters of a client's path are logged. For errors, the type and the stack are
logged, but not the message, which may quote any text. `log_texts` adds texts and messages.
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

from lorafold.errors import truncate
from lorafold.serving.server import RequestRecord

log = logging.getLogger(__name__)
MAX_MESSAGE = 4000  # characters, without `log_texts`
REPEAT_SECONDS = 5.0  # within this time, repeated lines are counted and not logged


class LineFormatter(logging.Formatter):
    def __init__(self, as_json: bool, texts: bool) -> None:
        super().__init__()
        self._json, self._texts = as_json, texts

    def format(self, record: logging.LogRecord) -> str:
        error, stack = record.exc_info[1] if record.exc_info else None, ""
        message = record.getMessage()
        message = message if self._texts else truncate(message, MAX_MESSAGE)
        if error is not None and self._texts:
            stack = "".join(traceback.format_exception(error)).rstrip()
        elif error is not None:
            stack = "\n".join(stack_of(error))
        if not self._json:
            line = f"{self.formatTime(record, '%H:%M:%S')} {message}"
            return f"{line}\n{stack}" if stack else line
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": message,
            **getattr(record, "fields", {}),
            **({"error": stack} if stack else {}),
        }
        return json.dumps(fields, ensure_ascii=False, default=str)


class RepeatFilter(logging.StreamHandler[TextIO]):
    """A handler that counts repetitions within REPEAT_SECONDS instead of logging them, except for
    lines about requests.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._written = dict[object, tuple[logging.LogRecord, int]]()

    def emit(self, record: logging.LogRecord) -> None:
        for key, (first, n) in [*self._written.items()]:
            if abs(record.created - first.created) > REPEAT_SECONDS:
                del self._written[key]
                if n:
                    repeated = f"{first.getMessage()} (repeated {n:,} times)"
                    changes = {"msg": repeated, "args": (), "exc_info": None}
                    super().emit(logging.makeLogRecord(vars(first) | changes))
        key = record.name, record.getMessage(), record.exc_info and record.exc_info[0]
        first, n = self._written.get(key, (record, -1))
        if not hasattr(record, "fields"):
            self._written[key] = first, n + 1
        if n < 0:
            super().emit(record)


def configure(as_json: bool, texts: bool = False) -> None:
    handler = RepeatFilter()
    handler.setFormatter(LineFormatter(as_json, texts))
    for name in ("lorafold", "uvicorn", "asyncio", "sse_starlette"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "lorafold" else logging.WARNING)
    threading.excepthook = _thread_ended
    sys.unraisablehook = _unraisable


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an unhandled error of the event loop, without the objects involved."""
    log.error("event loop error: %s", context["message"], exc_info=context.get("exception"))


def stack_of(error: BaseException) -> list[str]:
    lines = [type(error).__name__]
    lines += [
        f"  {frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    for inner in getattr(error, "exceptions", ()):  # an exception group
        lines += [f"  {line}" for line in stack_of(inner)]
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines if before is None else [*stack_of(before), "and then", *lines]


def _thread_ended(args: threading.ExceptHookArgs) -> None:
    log.error("the thread %s failed", args.thread and args.thread.name, exc_info=args.exc_value)


def _unraisable(args: Any) -> None:
    log.error("an object's cleanup failed", exc_info=args.exc_value)


def log_request(record: RequestRecord) -> None:
    reply = record.reply
    jobs = reply.jobs if reply else []
    fields = {
        "request": record.id,
        "method": record.method,
        "path": record.raw_path[:200],
        "status": record.status,
        "outcome": record.outcome,
        "tenant": record.tenant,
        "adapter": record.version,
        "seconds": round(time.monotonic() - record.started, 4),
    }
    if reply is not None and jobs:
        new = sum(len(job.end.tokens) if job.end else job.tokens for job in jobs)
        fields |= {"prompt_tokens": reply.usage.prompt, "tokens": new}
        if firsts := [job.token_times[0] - job.received_at for job in jobs if job.token_times]:
            fields["first_token"] = round(min(firsts), 4)
        if waits := [job.began - job.received_at for job in jobs if job.began is not None]:
            fields["queue"] = round(max(waits), 4)
        if record.texts:
            fields |= record.texts
            fields["completions"] = [job.end.text for job in jobs if job.end]
    # escaped, so that a client can't inject lines
    line = " ".join(f"{k}={ascii(str(v))[1:-1]}" for k, v in fields.items() if v not in ("", None))
    log.info("%s", line.removeprefix("request="), extra={"fields": fields})
