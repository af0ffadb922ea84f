"""One process that reads what came with adapters, or with requests:
`python -P -m lorafold.verification.worker`.

A message (`runtime/killable_process.py`) is JSON. The first one describes the base, every other one
what to do: `do`, its arguments, and `limits`, the seconds of the processor and the bytes of memory
beyond what the process has, for each step of it. Each is answered by one message, with `found` or
with `wrong`, unless the process dies of it. Opening a tokenizer is a step of its own, so that a
process that just began has as much time for a rendering as one that has the tokenizer open. What is
imported is ours, and has no limit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lorafold.runtime.killable_process import packed, read
from lorafold.runtime.processor import STACK, stacks


def as_message(message: Any) -> bytes:
    """A message as JSON, with its length before it."""
    # half a character is told by a mark: what reads it takes other texts as they are
    return packed(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace"))


def main() -> None:
    """Answer messages until there are none."""
    sys.modules["torch"] = None  # type: ignore[assignment] # transformers then does without
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what prints does not get between the answers
    os.nice(5)
    with suppress(OSError):  # Linux schedules a session as a group: niceness counts inside it only
        Path("/proc/self/autogroup").write_text("5")
    messages = os.fdopen(0, "rb")
    if (base := read(messages)) is None:
        return
    acts = _acts(json.loads(base))
    while (message := read(messages)) is not None:
        answers.write(as_message(_answer(acts, json.loads(message))))
        answers.flush()


def _acts(base: Mapping[str, Any]) -> dict[str, tuple[Callable[..., Any], ...]]:
    """The steps of each act."""
    if "tokenizer" in base:
        return {"compile": (_compiler(base["tokenizer"], base["end"]),)}
    if "modules" in base:
        from lorafold.verification.adapter_files import verified

        return {"verify": (partial(verified, base["modules"]),)}
    from lorafold.verification.tokenizer_files import Templates

    of = Templates(base["vocabulary"], base["allow"])
    return {
        "open": (of.open,), "render": (of.opened, of.render), "tokens": (of.opened, of.tokens),
    }  # fmt: skip


def _compiler(tokenizer: str, end: int) -> Callable[[str], str]:
    from llguidance import LLMatcher, LLTokenizer

    tokens = LLTokenizer(tokenizer, eos_token=end)

    def compiled(grammar: str) -> str:
        # half the stack of the threads that compile it again, whose callers need some of theirs
        with stacks(STACK // 2), ThreadPoolExecutor(1) as pool:
            matcher = pool.submit(LLMatcher, tokens, grammar, log_level=0).result()
            pool.submit(matcher.compute_bitmask).result()
        return matcher.get_error().partition("<state>")[0] if matcher.is_error() else ""

    return compiled


def _answer(
    acts: Mapping[str, tuple[Callable[..., Any], ...]], message: dict[str, Any]
) -> dict[str, Any]:
    do, limits, found, memory = message.pop("do"), message.pop("limits"), None, 0
    try:
        for step, (seconds, memory) in zip(acts[do], limits, strict=True):
            _limit(seconds, memory)
            found = step(**message)
        return {"found": found}
    except MemoryError:
        return {"wrong": f"it needs more than {memory >> 20} MiB of memory"}
    except RecursionError:
        return {"wrong": "it is nested too deeply"}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        told = str(error) or type(error).__name__
        return {"wrong": told, "kind": type(error).__name__}
    finally:
        _limit(0, 0)


def _limit(seconds: float, memory: int) -> None:
    """Let the process die after so many seconds of the processor, and fail to get more memory than
    so many bytes beyond what it has; 0 takes a limit away.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    now = _size() if memory else 0
    resource.setrlimit(resource.RLIMIT_AS, (now + memory if now else hard, hard))


def _size() -> int:
    """The bytes of addresses that the process has, 0 where that can't be told."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main()
