"""The process of a reward: `python -P -m lorafold.rewards.worker`.

The first message is a JSON object with the reward's `kind` and `text`; the answer contains
`batched` and `asynchronous` of the function. Every other message is a pickled pair of `Calls` and a
list of pickled items. The answers to it are JSON lists of rewards, sent as they are computed, until
each item has a reward. After an error, the last answer is an object with the message `wrong` and
the item's index `at`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

from lorafold.rewards.environments import environment_in_file, tools_in_file
from lorafold.rewards.functions import Problem, function_in_file, pattern, schema, verifier
from lorafold.rewards.judge import judge
from lorafold.runtime.killable_process import framed, read_message

KINDS: Mapping[str, Callable[[str], Any]] = {
    "file": function_in_file, "regex": pattern, "schema": schema, "reasoning-gym": verifier,
    "judge": judge, "environment": environment_in_file, "tools": tools_in_file,
}  # fmt: skip
GRACE_SECONDS = 1.0  # time that a call may take after the parent has ended


def main() -> None:
    """Answers messages until the input ends."""
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # so that functions that read or print don't disturb the messages
    os.dup2(2, 1)
    with suppress(OSError):  # if memory runs out, this process is killed first
        Path("/proc/self/oom_score_adj").write_text("1000")
    inbox = SimpleQueue[bytes | None]()
    Thread(target=_receive, args=(messages, inbox), daemon=True).start()

    def answer(content: Any) -> None:
        answers.write(framed(json.dumps(content).encode()))
        answers.flush()

    opening = json.loads(inbox.get() or sys.exit())
    try:
        function = KINDS[opening["kind"]](opening["text"])
    except Problem as wrong:
        return answer({"wrong": wrong.message, "at": None})
    answer({"batched": function.batched, "asynchronous": function.asynchronous})
    while (message := inbox.get()) is not None:
        for content in _judge(function, message):
            answer(content)


def _receive(messages: BinaryIO, inbox: SimpleQueue[bytes | None]) -> None:
    """Reads messages in a thread, to detect the end of the parent even during a call. Then this
    process and all processes that it started are killed.
    """
    while (message := read_message(messages)) is not None:
        inbox.put(message)
    inbox.put(None)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _judge(function: Any, message: bytes) -> Iterator[Any]:
    items = []
    try:
        calls, contents = pickle.loads(message)
        for at, content in enumerate(contents):
            try:
                items.append(function.item(*pickle.loads(content)))
            except Exception as error:
                raise Problem(f"the row can't be unpickled: {error}", at) from None
        yield from function.rewards(items, calls)
    except Problem as wrong:
        yield {"wrong": wrong.message, "at": wrong.at}


if __name__ == "__main__":
    main()
