"""A process that reads untrusted input: `python -P -m lorafold.verification.worker`.

A message (`runtime/killable_process.py`) is JSON. The first describes the base; every other one has
`do`, its arguments, and `limits`: CPU seconds and bytes of additional memory for each step. The
answer has `found` or `wrong`, unless the process dies. Opening a tokenizer is a step of its own, so
that a new process has as much time for rendering as one that has the tokenizer open. Imports have
no limit.
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

from lorafold.runtime.killable_process import framed, read_message
from lorafold.runtime.processor import STACK_BYTES, stack_size


def as_message(message: Any) -> bytes:
    """A message as JSON, prefixed with its length."""
    # lone surrogates become question marks
    return framed(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace"))


def main() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment] # transformers then does without
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that prints don't get between the answers
    os.nice(5)
    with suppress(OSError):  # Linux schedules a session as a group; niceness only counts inside
        Path("/proc/self/autogroup").write_text("5")
    messages = os.fdopen(0, "rb")
    if (base := read_message(messages)) is None:
        return
    acts = _acts(json.loads(base))
    while (message := read_message(messages)) is not None:
        answers.write(as_message(_answer(acts, json.loads(message))))
        answers.flush()


def _acts(base: Mapping[str, Any]) -> dict[str, tuple[Callable[..., Any], ...]]:
    if "tokenizer" in base:
        return {"compile": (_compiler(base["tokenizer"], base["end"]),)}
    if "modules" in base:
        from lorafold.verification.adapter_files import verified

        return {"verify": (partial(verified, base["modules"]),)}
    from lorafold.verification.tokenizer_files import AdapterTokenizers

    t = AdapterTokenizers(base["vocabulary"], base["allow"])
    return {"open": (t.open,), "render": (t.opened, t.render), "tokens": (t.opened, t.tokens)}


def _compiler(tokenizer: str, end: int) -> Callable[[str], str]:
    from llguidance import LLMatcher, LLTokenizer

    tokens = LLTokenizer(tokenizer, eos_token=end)

    def compiled(grammar: str) -> str:
        # half of the engine's stack, because it compiles the grammar again deeper in the stack
        with stack_size(STACK_BYTES // 2), ThreadPoolExecutor(1) as pool:
            matcher = pool.submit(LLMatcher, tokens, grammar, log_level=0).result()
            pool.submit(matcher.compute_bitmask).result()
        return matcher.get_error().partition("<state>")[0] if matcher.is_error() else ""

    return compiled


def _answer(
    acts: Mapping[str, tuple[Callable[..., Any], ...]], message: dict[str, Any]
) -> dict[str, Any]:
    do, limits, result, memory = message.pop("do"), message.pop("limits"), None, 0
    try:
        for step, (seconds, memory) in zip(acts[do], limits, strict=True):
            _limit(seconds, memory)
            result = step(**message)
        return {"found": result}
    except MemoryError:
        return {"wrong": f"memory limit of {memory >> 20} MiB exceeded"}
    except RecursionError:
        return {"wrong": "nested too deeply"}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        kind = type(error).__name__
        return {"wrong": str(error) or kind, "kind": kind}
    finally:
        _limit(0, 0)


def _limit(seconds: float, memory: int) -> None:
    """Limit CPU seconds, after which the process dies, and additional bytes of memory, if the
    system reports memory use; 0 removes a limit.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    hard = soft = resource.getrlimit(resource.RLIMIT_AS)[1]
    if memory:
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            soft = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()
