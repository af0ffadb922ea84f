"""The worker process for untrusted input, which `worker_pool` runs with `python -P -m`.

The process reads length-prefixed JSON messages (`runtime/killable_process.py`). The first describes
the base. Every other message contains `do` (the action), its arguments, and `limits`: the CPU
seconds and additional bytes of memory for each step of the action. The answer contains `found` or
`wrong`, unless the process dies. Opening a tokenizer is a separate step, so that rendering has the
same time limit in a new process. Imports have no limit.
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


def encode_message(message: Any) -> bytes:
    # lone surrogates become question marks
    return framed(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace"))


def main() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment] # transformers works without it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # stdout carries answers, so prints go to stderr
    os.nice(5)
    with suppress(OSError):  # Linux schedules sessions as groups; nice only acts within one
        Path("/proc/self/autogroup").write_text("5")
    messages = os.fdopen(0, "rb")
    if (base := read_message(messages)) is None:
        return
    acts = _steps_by_action(json.loads(base))
    while (message := read_message(messages)) is not None:
        answers.write(encode_message(_answer(acts, json.loads(message))))
        answers.flush()


def _steps_by_action(base: Mapping[str, Any]) -> dict[str, tuple[Callable[..., Any], ...]]:
    if "tokenizer" in base:
        return {"compile": (_grammar_compiler(base["tokenizer"], base["end"]),)}
    if "modules" in base:
        from lorafold.verification.adapter_files import verify_files

        return {"verify": (partial(verify_files, base["modules"]),)}
    from lorafold.verification.tokenizer_files import AdapterTokenizers

    t = AdapterTokenizers(base["vocabulary"], base["allow"])
    return {"open": (t.open,), "render": (t.opened, t.render), "tokens": (t.opened, t.tokens)}


def _grammar_compiler(tokenizer: str, end: int) -> Callable[[str], str]:
    from llguidance import LLMatcher, LLTokenizer

    tokens = LLTokenizer(tokenizer, eos_token=end)

    def compiled(grammar: str) -> str:
        # half of the engine's stack size, because the engine compiles at a greater stack depth
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
            _set_limits(seconds, memory)
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
        _set_limits(0, 0)


def _set_limits(seconds: float, memory: int) -> None:
    """Limits the CPU seconds, after which a signal kills the process, and, on systems with /proc,
    the additional bytes of memory. 0 removes a limit.
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
