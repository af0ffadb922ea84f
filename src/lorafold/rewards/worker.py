"""The process of a reward: `python -P -m lorafold.rewards.worker`.

The first message is JSON, the reward's `kind` and `text`; the answer is `batched`, whether it
judges batches. Every other message is a pickled list of pickled items; the answers are JSON lists
of rewards as they are computed, until each item has one, or `wrong` with the index `at`, which ends
them.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

from lorafold.rewards.functions import KINDS, Function, Item, Wrong
from lorafold.runtime.killable_process import framed, read_message

GRACE = 1.0  # seconds that a call may go on after the parent is gone


def main() -> None:
    """Answer messages until there are none."""
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # so that functions that read or print don't disturb the messages
    os.dup2(2, 1)
    with suppress(OSError):  # if memory runs out, this process is killed
        Path("/proc/self/oom_score_adj").write_text("1000")
    inbox = SimpleQueue[bytes | None]()
    Thread(target=_receive, args=(messages, inbox), daemon=True).start()

    def answer(content: Any) -> None:
        answers.write(framed(json.dumps(content).encode()))
        answers.flush()

    opening = json.loads(inbox.get() or sys.exit())
    try:
        function = KINDS[opening["kind"]](opening["text"])
    except Wrong as wrong:
        return answer({"wrong": wrong.message, "at": None})
    answer({"batched": function.batched})
    while (message := inbox.get()) is not None:
        for content in _judge(function, message):
            answer(content)


def _receive(messages: BinaryIO, inbox: SimpleQueue[bytes | None]) -> None:
    """Read messages while the function runs, to notice that the parent is gone: then this process
    and all that it started are killed, even during a call.
    """
    while (message := read_message(messages)) is not None:
        inbox.put(message)
    inbox.put(None)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _judge(function: Function, message: bytes) -> Iterator[Any]:
    items = []
    try:
        for at, content in enumerate(pickle.loads(message)):
            try:
                items.append(Item(*pickle.loads(content)))
            except Exception as error:
                raise Wrong(f"the row can't be unpickled: {error}", at) from None
        yield from function.rewards(items)
    except Wrong as wrong:
        yield {"wrong": wrong.message, "at": wrong.at}


if __name__ == "__main__":
    main()
