"""What judges, opened in the process that runs it: a function for each kind of name.

Patterns and schemas are here too, since a pattern may backtrack for longer than anyone waits.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorafold.errors import cut
from lorafold.rewards.calling import SHOWN, Function, Wrong, raised


def in_file(text: str) -> Function:
    """A function of a Python file: `/path/FILE.py:fn`. Modules beside the file can be imported, as
    a script's can.
    """
    path, _, name = text.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise Wrong(f"found no file {path}, expected one")
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # as dataclasses and pickles expect it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # also an exit
        raise Wrong(f"{file.name} can't be run: {raised(error, str(file))}") from None
    function = getattr(module, name, None)
    if not callable(function):
        found = f"a {type(function).__name__}" if hasattr(module, name) else "none"
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == file.stem]
        there = f"; there are {', '.join(own)}" if own else ""
        raise Wrong(f"expected a function {name} in {file.name}, found {found}{there}")
    return Function(function, str(file))


def pattern(text: str) -> Function:
    """1 for a completion that a regular expression matches from its start to its end; `.` matches
    newlines too.
    """
    try:
        compiled = re.compile(text, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise Wrong(f"it is no regular expression: {error}") from None
    return Function(lambda completion: compiled.fullmatch(completion) is not None)


def schema(text: str) -> Function:
    """1 for a completion that is JSON of a schema, as llguidance reads both; space around it is
    left out.
    """
    try:
        from llguidance import LLMatcher, LLTokenizer
    except ImportError:
        raise Wrong("found no llguidance, expected it; install lorafold[rl]") from None
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise Wrong(f"it can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Wrong(f"it is no JSON: {error}") from None
    try:
        grammar = LLMatcher.grammar_from_json_schema(content)
        fresh = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    except BaseException as error:  # a panic in a library is no Exception
        raise Wrong(f"it can't be used as a schema: {cut(str(error), SHOWN)}") from None
    if fresh.is_error():
        told = " ".join(fresh.get_error().partition("<state>")[0].split())
        raise Wrong(f"it can't be used as a schema: {cut(told, SHOWN)}")

    def fits(completion: str) -> bool:
        matcher, tokens = fresh.deep_copy(), list(completion.strip().encode("utf-8", "replace"))
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    return Function(fits)


def task(text: str) -> Function:
    """The verifier of a task of reasoning-gym. The entry is the row's field `entry`, or its fields
    `answer` and `metadata`, of which tasks with many right answers have no `answer`; the answer is
    what the completion has in its last <answer>, and all of it where it has none.
    """
    try:
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise Wrong(f"reasoning-gym can't be imported ({error}); install lorafold[rl]") from None
    if text not in DATASETS:
        near = difflib.get_close_matches(text, DATASETS) or sorted(DATASETS)[:5]
        raise Wrong(f"found no task {text!r}, expected one as {', '.join(near)}")
    try:
        own, config = DATASETS[text]
        made: Any = own(config())
        needed = {"metadata"} if made[0]["answer"] is None else {"answer", "metadata"}
    except Exception as error:  # as for a task that is made of others
        raise Wrong(f"its verifier can't be made: {raised(error, None)}") from None

    def score(prompt: Any, completion: str, **row: Any) -> float:
        answer = extract_answer(completion)
        said = completion.strip() if answer is None else answer
        return float(made.score_answer(said, entry(prompt, row)))

    def entry(prompt: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        found = as_object("entry", row["entry"]) if row.get("entry") is not None else dict(row)
        if lacking := needed - {k for k, v in found.items() if v is not None}:
            missing = " and ".join(sorted(lacking))
            raise Wrong(f"found no {missing} in its row, expected entry, or answer and metadata")
        found["metadata"] = as_object("metadata", found["metadata"])
        of = found["metadata"].get("source_dataset", text)
        if of != text:
            raise Wrong(f"found an entry of the task {of}, expected one of {text}")
        return {"question": prompt, "answer": None, **found}

    return Function(score)


def as_object(name: str, value: Any) -> dict[str, Any]:
    """A field of a row that is an object, or the JSON text of one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = value
    if not isinstance(found, Mapping):
        raise Wrong(f"{name}: found {cut(repr(value), 80)}, expected an object or its JSON text")
    return dict(found)


KINDS: Mapping[str, Callable[[str], Function]] = {
    "file": in_file, "regex": pattern, "schema": schema, "reasoning-gym": task,
}  # fmt: skip
