"""Reward functions, and rewards that are resolved to functions.

    fn(prompt, completion, **row) -> number                 called for each completion
    async fn(prompt, completion, **row) -> number           the same, several calls at a time
    fn(prompts, completions, **row) -> a list of numbers    called for a batch; row fields are lists

A function receives only the row fields that its parameters name, or all fields if it has `**`.
Parameters named `tokens`, `ended` and `step` receive what is known about the completion. It returns
None instead of a number if the reward does not apply to the row.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property, partial
from itertools import starmap
from numbers import Real
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from lorafold.errors import truncate

J = TypeVar("J")
T = TypeVar("T")
SINGLE, BATCHED = {"prompt", "completion"}, {"prompts", "completions"}
CLOSING_SECONDS = 1.0  # for coroutines to end when they are cancelled
BACKOFF = 0.25  # seconds before the first retry; twice as many before each further one
SAMPLED = {"tokens", "ended", "step", "messages"}
MAX_LEN = 300  # maximum characters of a message or value
LARGEST = 1e150  # the largest reward: its square, means and intervals must be finite


class Item(NamedTuple):
    """The input of a reward function: the prompt, the completion, the other fields of the row, and
    the completion's number of tokens, its end ("stop" or "length") and its step.
    """

    prompt: str | list[dict[str, Any]]
    completion: str
    row: Mapping[str, Any]
    sampled: Mapping[str, Any]


class Calls(NamedTuple):
    """The time limit per completion in seconds, and for asynchronous functions how many calls run
    at a time and how often one that raises an exception is repeated.
    """

    seconds: float = 30.0
    concurrency: int = 16
    retries: int = 2


DEFAULT_CALLS = Calls()


class Problem(Exception):
    """An error in a function, a row or a result. `at` is the index of the item that caused it, or
    None. If a later call may succeed, `retry_after` is the least time until then, in seconds.
    """

    def __init__(
        self, message: str, at: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.at, self.retry_after = message, at, retry_after

    def of(self, items: Sequence[J]) -> Sequence[J]:
        """The item that caused the error, or all items if `at` is None."""
        return items if self.at is None else items[self.at : self.at + 1]


class EventLoop:
    """An event loop in a thread of its own, from the first coroutine on."""

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        async def contained() -> T:
            try:
                return await coroutine
            except (KeyboardInterrupt, SystemExit) as error:  # which would end the loop
                raise Problem(f"raised {error_text(error, None)}") from None

        return asyncio.run_coroutine_threadsafe(contained(), self._loop)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def close(self) -> None:
        """Cancels what runs, and ends the loop."""
        if (loop := self.__dict__.pop("_loop", None)) is not None:
            with suppress(TimeoutError):  # of code that blocks or ignores its cancellation
                asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result(CLOSING_SECONDS)
            loop.call_soon_threadsafe(loop.stop)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Function:
    item = Item

    def __init__(self, function: Callable[..., Any], file: str | None = None) -> None:
        self._function, self._file = function, file
        self._loop = EventLoop()  # one, because clients stay with their loop
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise Problem("can't inspect the parameters, expected a Python function") from None
        self._params = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        names = self._names = {p.name for p in self._params}
        self.batched = bool(names & BATCHED)
        kind: Any = type(function)  # of an object with an asynchronous __call__
        self.asynchronous = any(map(inspect.iscoroutinefunction, (function, kind.__call__)))
        if self.batched == bool(names & (SINGLE if self.batched else SINGLE | SAMPLED)):
            text = ", ".join(map(str, parameters)) or "none"
            raise Problem(
                f"found the parameters {truncate(text, MAX_LEN)}; expected prompt or completion or"
                " both, or for batches prompts or completions or both"
            )

    def rewards(self, items: Sequence[Item], calls: Calls) -> Iterator[list[float | None]]:
        """Yields lists of rewards, in the order of the items, as soon as they are computed."""
        rows = [
            {**{k: v for k, v in item.sampled.items() if k in self._names}, **item.row}
            for item in items
        ]
        if self.batched:
            yield self._rewards_of_batch(items, rows)
            return
        given = [
            {**row, "prompt": item.prompt, "completion": item.completion}
            for item, row in zip(items, rows, strict=True)
        ]
        if self.asynchronous:
            yield from self._concurrently([*starmap(self._bind, enumerate(given))], calls)
        else:
            for at, one in enumerate(given):
                yield [number(self._call(at, one), at)]

    def _concurrently(
        self, bound: Sequence[Callable[[], Any]], calls: Calls
    ) -> Iterator[list[float | None]]:
        async def reward(at: int) -> float | Problem | None:
            message, wait = "", 0.0
            for attempt in range(calls.retries + 1):
                await asyncio.sleep(min(wait, calls.seconds))
                wait = BACKOFF * 2**attempt
                try:
                    async with free, asyncio.timeout(calls.seconds):
                        return number(await bound[at](), at)
                except Problem as problem:
                    if problem.retry_after is None:
                        return Problem(problem.message, at)
                    message, wait = problem.message, max(wait, problem.retry_after)
                except BaseException as error:  # includes exits
                    if (task := asyncio.current_task()) and task.cancelling():
                        raise
                    message = f"raised {error_text(error, self._file)}"
                    if isinstance(error, TimeoutError) and not str(error):
                        message = f"took more than {calls.seconds:g} s"
            return Problem(f"{message} (tries: {calls.retries + 1})", at)

        free = asyncio.Semaphore(calls.concurrency)
        futures = [self._loop.start(reward(at)) for at in range(len(bound))]
        try:
            for future in futures:
                if isinstance(found := future.result(), Problem):
                    raise found
                yield [found]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Ends the function's event loop, if any."""
        self._loop.close()

    def _rewards_of_batch(
        self, items: Sequence[Item], rows: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        needed = {p.name for p in self._params if p.default is p.empty} - BATCHED
        for at, row in enumerate(rows):
            if missing := sorted(needed - row.keys()):
                raise _missing_fields(missing, row, at)
        fields = dict.fromkeys(name for row in rows for name in row)
        given: dict[str, Any] = {name: [row.get(name) for row in rows] for name in fields}
        prompts, completions = [i.prompt for i in items], [i.completion for i in items]
        given |= {"prompts": prompts, "completions": completions}
        rewards = self._call(None, given, as_list=True)
        if not isinstance(rewards, list):
            raise Problem(f"returned {shown(rewards)}, expected a list of {len(items)} numbers")
        if len(rewards) != len(items):
            raise Problem(
                f"returned {len(rewards)} rewards, expected {len(items)}, one per completion"
            )
        return [number(value, at) for at, value in enumerate(rewards)]

    def _bind(self, at: int | None, given: Mapping[str, Any]) -> Callable[[], Any]:
        missing = [p.name for p in self._params if p.default is p.empty and p.name not in given]
        if missing:
            raise _missing_fields(missing, given.keys() - SINGLE, at)
        first = {p.name: p.default for p in self._params if p.kind == p.POSITIONAL_ONLY}
        names = given.keys() if self._takes_all else self._names
        return partial(
            self._function,
            *(given.get(name, default) for name, default in first.items()),
            **{k: v for k, v in given.items() if k in names and k not in first},
        )

    def _call(self, at: int | None, given: Mapping[str, Any], as_list: bool = False) -> Any:
        call = self._bind(at, given)
        try:
            result = self._loop.start(call()).result() if self.asynchronous else call()
            if inspect.iscoroutine(result):
                result.close()
                raise Problem("returned a coroutine; declare the function with async def")
            plain = isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable)
            return result if plain or not as_list else list(result)
        except KeyboardInterrupt:
            raise
        except Problem as wrong:
            raise Problem(wrong.message, at) from None
        except BaseException as error:  # includes exits, and panics of libraries
            raise Problem(f"raised {error_text(error, self._file)}", at) from None


def number(value: Any, at: int | None) -> float | None:
    """The reward of item `at` as a float, or None. It must be finite and at most LARGEST in
    magnitude.
    """
    if value is None:
        return None
    item = getattr(value, "item", None)
    scalar = item() if callable(item) and getattr(value, "shape", None) == () else value
    try:
        reward = float(scalar) if isinstance(scalar, Real) else math.nan
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise Problem(f"returned {shown(value)}, expected a finite number", at)
    if abs(reward) > LARGEST:
        raise Problem(f"returned {shown(value)}, expected at most {LARGEST:g} in magnitude", at)
    return reward


def error_text(error: BaseException, file: str | None) -> str:
    """The type, message and line of an error; if possible, the line is in `file`."""
    message = truncate(f"{type(error).__name__}: {error}".removesuffix(": "), MAX_LEN)
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
        name = Path(error.filename or "").name
        return f"SyntaxError: {error.msg} (line {error.lineno} of {name})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if not (own := [f for f in frames if f.filename == file] or frames):
        return message
    last = own[-1]
    line = f": {truncate(last.line, MAX_LEN)}" if last.line else ""
    return f"{message} (line {last.lineno} of {Path(last.filename).name}{line})"


def _missing_fields(names: Sequence[str], fields: Iterable[str], at: int | None) -> Problem:
    known = truncate(", ".join(sorted(fields)) or "none", MAX_LEN)
    return Problem(f"needs the fields {', '.join(names)}; the row has {known}", at)


def shown(value: Any) -> str:
    try:
        text = truncate(repr(value), 80)
    except Exception:  # for example, an integer with too many digits
        return f"a value of type {type(value).__name__}"
    return f"{text} ({type(value).__name__})"


def load_module(file: Path) -> ModuleType:
    """Runs a Python file, which can import modules next to it."""
    if not file.is_file():
        raise Problem(f"there is no file {file}")
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pickle need it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # includes exits
        raise Problem(f"{file.name} can't be run: {error_text(error, str(file))}") from None
    return module


def load_object(text: str) -> tuple[Any, str]:
    """The function or class with the name `/path/FILE.py:NAME`, and its file."""
    path, _, name = text.rpartition(":")
    file = Path(path)
    module = load_module(file)
    if not callable(found := getattr(module, name, None)):
        what = f"a {type(found).__name__}" if hasattr(module, name) else "none"
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == file.stem]
        there = f"; the file has {', '.join(own)}" if own else ""
        raise Problem(f"expected a function {name} in {file.name}, found {what}{there}")
    return found, path


def function_in_file(text: str) -> Function:
    return Function(*load_object(text))


def pattern(text: str) -> Function:
    """A function that returns whether a regular expression matches the whole completion; `.`
    matches newlines.
    """
    try:
        compiled = re.compile(text, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise Problem(f"not a regular expression: {error}") from None
    return Function(lambda completion: compiled.fullmatch(completion) is not None)


def schema(text: str) -> Function:
    """A function that returns whether the completion is JSON that fits a schema, according to
    llguidance.
    """
    try:
        from llguidance import LLMatcher, LLTokenizer
    except ImportError:
        raise Problem("schema rewards need llguidance; install lorafold[rl]") from None
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"the file can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Problem(f"the file is not JSON: {error}") from None
    try:
        compiled = LLMatcher(
            LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(content), log_level=0
        )
    except BaseException as e:  # a library's panic is not an Exception
        reason = truncate(str(e), MAX_LEN)
        raise Problem(f"the file is not a supported JSON schema: {reason}") from None
    if compiled.is_error():
        message = " ".join(compiled.get_error().partition("<state>")[0].split())
        raise Problem(f"the file is not a supported JSON schema: {truncate(message, MAX_LEN)}")

    def fits(completion: str) -> bool:
        matcher, tokens = compiled.deep_copy(), list(completion.strip().encode("utf-8", "replace"))
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    return Function(fits)


def verifier(text: str) -> Function:
    """The verifier of a reasoning-gym task. It reads the task's entry from the row's field `entry`,
    or from `answer` and `metadata`, and takes the completion's last <answer>, or the whole
    completion, as the answer.
    """
    try:
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise Problem(f"reasoning-gym can't be imported ({error}); install lorafold[rl]") from None
    if text not in DATASETS:
        near = difflib.get_close_matches(text, DATASETS) or sorted(DATASETS)[:5]
        raise Problem(f"unknown task {text!r}, expected for example {', '.join(near)}")
    try:
        task_class, config = DATASETS[text]
        dataset = task_class(config())
        needed = {"metadata"} if dataset[0]["answer"] is None else {"answer", "metadata"}
    except Exception as error:  # for example, a task composed of others
        raise Problem(f"the task's verifier can't be created: {error_text(error, None)}") from None

    def score(prompt: Any, completion: str, **row: Any) -> float:
        answer = completion.strip() if (last := extract_answer(completion)) is None else last
        return float(dataset.score_answer(answer, entry(prompt, row)))

    def entry(prompt: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        fields = as_object("entry", row["entry"]) if row.get("entry") is not None else dict(row)
        if absent := needed - {k for k, v in fields.items() if v is not None}:
            missing = " and ".join(sorted(absent))
            raise Problem(f"found no {missing} in the row, expected entry, or answer and metadata")
        fields["metadata"] = as_object("metadata", fields["metadata"])
        source = fields["metadata"].get("source_dataset", text)
        if source != text:
            raise Problem(f"found an entry of the task {source}, expected the task {text}")
        return {"question": prompt, "answer": None, **fields}

    return Function(score)


def as_object(name: str, value: Any) -> dict[str, Any]:
    """The object in a row's field, which may be JSON text."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = value
    if not isinstance(parsed, Mapping):
        raise Problem(f"{name}: found {shown(value)}, expected an object or its JSON text")
    return dict(parsed)
