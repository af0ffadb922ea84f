"""Reward functions: how one is called, and how a reward's name is resolved to one.

    fn(prompt, completion, **row) -> number                 called for each completion
    fn(prompts, completions, **row) -> a list of numbers    called for a batch, fields as lists too

Only the row fields that it names are passed; with `**`, all. None instead of a number means that
the reward does not apply to the row.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lorafold.errors import truncate_end

J = TypeVar("J")
ONE, ALL = {"prompt", "completion"}, {"prompts", "completions"}
SHOWN = 300  # characters of a message or value
LARGEST = 1e150  # of a reward: its square, means and intervals must be finite


class Item(NamedTuple):
    """The input of a function: the prompt, the completion, and the row's other fields."""

    prompt: str | list[dict[str, Any]]
    completion: str
    row: Mapping[str, Any]


class Wrong(Exception):
    """A problem with a function, a row or a result, and the index `at` of the item, if it is about
    one.
    """

    def __init__(self, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.message, self.at = message, at

    def of(self, items: Sequence[J]) -> Sequence[J]:
        """The item that it is about, or all."""
        return items if self.at is None else items[self.at : self.at + 1]


class Function:
    def __init__(self, function: Callable[..., Any], file: str | None = None) -> None:
        self._function, self._file = function, file
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise Wrong("can't inspect the parameters, expected a Python function") from None
        self._named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._every = any(p.kind == p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in self._named}
        self.batched = bool(names & ALL)
        if self.batched == bool(names & ONE):
            given = ", ".join(map(str, parameters)) or "none"
            raise Wrong(
                f"found the parameters {truncate_end(given, SHOWN)}; expected prompt or completion"
                " or both, or for batches prompts or completions or both"
            )

    def rewards(self, items: Sequence[Item]) -> Iterator[list[float | None]]:
        """The rewards in order, as they are computed."""
        if self.batched:
            yield self._of_all(items)
        else:
            for at, item in enumerate(items):
                given = {**item.row, "prompt": item.prompt, "completion": item.completion}
                yield [number(self._called(at, given), at)]

    def _of_all(self, items: Sequence[Item]) -> list[float | None]:
        needed = {p.name for p in self._named if p.default is p.empty} - ALL
        for at, item in enumerate(items):
            if lacking := sorted(needed - item.row.keys()):
                raise _lacks(lacking, item.row, at)
        fields = dict.fromkeys(name for item in items for name in item.row)
        given: dict[str, Any] = {name: [item.row.get(name) for item in items] for name in fields}
        prompts, completions = [i.prompt for i in items], [i.completion for i in items]
        given |= {"prompts": prompts, "completions": completions}
        rewards = self._called(None, given, as_list=True)
        if not isinstance(rewards, list):
            raise Wrong(f"returned {_shown(rewards)}, expected a list of {len(items)} numbers")
        if len(rewards) != len(items):
            raise Wrong(
                f"returned {len(rewards)} rewards, expected {len(items)}, one per completion"
            )
        return [number(value, at) for at, value in enumerate(rewards)]

    def _called(self, at: int | None, given: Mapping[str, Any], as_list: bool = False) -> Any:
        lacking = [p.name for p in self._named if p.default is p.empty and p.name not in given]
        if lacking:
            raise _lacks(lacking, given.keys() - ONE, at)
        first = {p.name: p.default for p in self._named if p.kind == p.POSITIONAL_ONLY}
        names = given.keys() if self._every else {p.name for p in self._named}
        try:
            result = self._function(
                *(given.get(name, default) for name, default in first.items()),
                **{k: v for k, v in given.items() if k in names and k not in first},
            )
            plain = isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable)
            return result if plain or not as_list else list(result)
        except KeyboardInterrupt:
            raise
        except Wrong as wrong:
            raise Wrong(wrong.message, at) from None
        except BaseException as error:  # includes exits, and panics of libraries
            raise Wrong(f"raised {raised(error, self._file)}", at) from None


def number(value: Any, at: int | None) -> float | None:
    """The reward of item `at` as a finite float, at most LARGEST in absolute value, or None."""
    if value is None:
        return None
    item = getattr(value, "item", None)
    plain = item() if callable(item) and getattr(value, "shape", None) == () else value
    try:
        reward = float(plain) if isinstance(plain, Real) else math.nan
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise Wrong(f"returned {_shown(value)}, expected a finite number", at)
    if abs(reward) > LARGEST:
        raise Wrong(f"returned {_shown(value)}, expected at most {LARGEST:g} in magnitude", at)
    return reward


def raised(error: BaseException, file: str | None) -> str:
    """The type, message and line of an error; the line in `file` if it was involved."""
    message = truncate_end(f"{type(error).__name__}: {error}".removesuffix(": "), SHOWN)
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
        name = Path(error.filename or "").name
        return f"SyntaxError: {error.msg} (line {error.lineno} of {name})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if not (own := [f for f in frames if f.filename == file] or frames):
        return message
    last = own[-1]
    line = f": {truncate_end(last.line, SHOWN)}" if last.line else ""
    return f"{message} (line {last.lineno} of {Path(last.filename).name}{line})"


def _lacks(names: Sequence[str], fields: Iterable[str], at: int | None) -> Wrong:
    present = truncate_end(", ".join(sorted(fields)) or "none", SHOWN)
    return Wrong(f"needs the fields {', '.join(names)}; the row has {present}", at)


def _shown(value: Any) -> str:
    try:
        text = truncate_end(repr(value), 80)
    except Exception:  # for example, an integer with too many digits
        return f"a value of type {type(value).__name__}"
    return f"{text} ({type(value).__name__})"


def in_file(text: str) -> Function:
    """A function of `/path/FILE.py:fn`, which can import modules next to the file."""
    path, _, name = text.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise Wrong(f"there is no file {path}")
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pickle need it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # includes exits
        raise Wrong(f"{file.name} can't be run: {raised(error, str(file))}") from None
    function = getattr(module, name, None)
    if not callable(function):
        found = f"a {type(function).__name__}" if hasattr(module, name) else "none"
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == file.stem]
        there = f"; the file has {', '.join(own)}" if own else ""
        raise Wrong(f"expected a function {name} in {file.name}, found {found}{there}")
    return Function(function, str(file))


def pattern(text: str) -> Function:
    """1 if the regular expression matches the whole completion; `.` matches newlines."""
    try:
        compiled = re.compile(text, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise Wrong(f"not a regular expression: {error}") from None
    return Function(lambda completion: compiled.fullmatch(completion) is not None)


def schema(text: str) -> Function:
    """1 if the completion is JSON that fits the schema, according to llguidance."""
    try:
        from llguidance import LLMatcher, LLTokenizer
    except ImportError:
        raise Wrong("schema rewards need llguidance; install lorafold[rl]") from None
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise Wrong(f"the file can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Wrong(f"the file is not JSON: {error}") from None
    try:
        fresh = LLMatcher(
            LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(content), log_level=0
        )
    except BaseException as error:  # a library's panic is not an Exception
        message = truncate_end(str(error), SHOWN)
        raise Wrong(f"the file is not a supported JSON schema: {message}") from None
    if fresh.is_error():
        message = " ".join(fresh.get_error().partition("<state>")[0].split())
        raise Wrong(f"the file is not a supported JSON schema: {truncate_end(message, SHOWN)}")

    def fits(completion: str) -> bool:
        matcher, tokens = fresh.deep_copy(), list(completion.strip().encode("utf-8", "replace"))
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    return Function(fits)


def task(text: str) -> Function:
    """The verifier of a reasoning-gym task. The entry is the row's field `entry`, or its fields
    `answer` and `metadata`; the answer is the completion's last <answer>, or all of it.
    """
    try:
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise Wrong(f"reasoning-gym can't be imported ({error}); install lorafold[rl]") from None
    if text not in DATASETS:
        near = difflib.get_close_matches(text, DATASETS) or sorted(DATASETS)[:5]
        raise Wrong(f"unknown task {text!r}, expected for example {', '.join(near)}")
    try:
        own, config = DATASETS[text]
        made = own(config())
        needed = {"metadata"} if made[0]["answer"] is None else {"answer", "metadata"}
    except Exception as error:  # for example, a task composed of others
        raise Wrong(f"the task's verifier can't be created: {raised(error, None)}") from None

    def score(prompt: Any, completion: str, **row: Any) -> float:
        answer = extract_answer(completion)
        said = completion.strip() if answer is None else answer
        return float(made.score_answer(said, entry(prompt, row)))

    def entry(prompt: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        fields = as_object("entry", row["entry"]) if row.get("entry") is not None else dict(row)
        if lacking := needed - {k for k, v in fields.items() if v is not None}:
            missing = " and ".join(sorted(lacking))
            raise Wrong(f"found no {missing} in the row, expected entry, or answer and metadata")
        fields["metadata"] = as_object("metadata", fields["metadata"])
        of = fields["metadata"].get("source_dataset", text)
        if of != text:
            raise Wrong(f"found an entry of the task {of}, expected the task {text}")
        return {"question": prompt, "answer": None, **fields}

    return Function(score)


def as_object(name: str, value: Any) -> dict[str, Any]:
    """A row's field that is an object, or the JSON text of one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = value
    if not isinstance(found, Mapping):
        shown = truncate_end(repr(value), 80)
        raise Wrong(f"{name}: found {shown}, expected an object or its JSON text")
    return dict(found)


KINDS: Mapping[str, Callable[[str], Function]] = {
    "file": in_file, "regex": pattern, "schema": schema, "reasoning-gym": task,
}  # fmt: skip
