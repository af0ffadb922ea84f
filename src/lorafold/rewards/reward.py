"""Rewards and their weighted sums. Rewards given by name, except reward models, run in separate
processes; rewards given as functions run in this process.

    FILE.py:fn             a Python function            reasoning-gym:TASK   a task's verifier
    regex:PATTERN          1 for a whole match          adapter:DIR          a reward model's score
    schema:FILE.json       1 for JSON that fits         judge:FILE.yaml      a judge's score

A weight may stand before each of them, as in 0.5*FILE.py:fn.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from lorafold.data.formats import Conversation
from lorafold.errors import LorafoldError, RewardFailed, escape_unprintable
from lorafold.files.paths import nearest_name
from lorafold.rewards.environments import (
    NOUN,
    Environment,
    EnvironmentInput,
    Environments,
    single_turn,
)
from lorafold.rewards.functions import (
    DEFAULT_CALLS,
    LARGEST,
    Calls,
    Function,
    Problem,
    number,
    pattern,
)
from lorafold.runtime.killable_process import Exited, KillableProcess, TimedOut, framed

LOADING_SECONDS = 120.0  # time limit for loading a reward and its imports
# sets have the same order in each run, so that a resumed run gives the same rewards
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf|nan)"
WEIGHTED = re.compile(rf"(?:\s*({NUMBER})\s*\*\s*)?(.*)", re.IGNORECASE | re.DOTALL)
FORMS = (
    "FILE.py:fn, regex:PATTERN, schema:FILE.json, judge:FILE.yaml, reasoning-gym:TASK or"
    " adapter:DIR"
)
ADAPTER = "adapter:"
TOOLS = "tools"
REWARDS = "rewards"  # in the identity of a run: the digests of its rewards' files, by their names


@dataclass(frozen=True)
class Judged:
    """One completion to judge.

    Attributes:
        prompt: the prompt in the row, which is a text or messages.
        completion: the generated text.
        row: the other fields of the row.
        where: the location that messages show, for example "rows.jsonl row 7, completion 3".
        conversation: the conversation used for generation, for rewards that render it; None if only
            the prompt was used.
        sampled: its number of `tokens`, whether it `ended` with "stop" or "length", the `messages`
            of its conversation, and the `step` of training, from 0 on, or None in evaluations.
        given: numbers that its environment gave, by name.
        refused: why it has no reward, or empty.
    """

    prompt: str | list[dict[str, Any]]
    completion: str
    row: Mapping[str, Any]
    where: str
    conversation: Conversation | None = None
    sampled: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, float | None] = field(default_factory=dict)
    refused: str = ""

    @property
    def content(self) -> tuple[Any, ...]:
        return self.prompt, self.completion, dict(self.row), dict(self.sampled)


Scored = Judged | EnvironmentInput


@runtime_checkable
class Reward(Protocol):
    """A reward, which assigns a number to each completion.

    Attributes:
        name: the reward's name in all output.
        weight: the reward's weight in a weighted sum.
    """

    name: str
    weight: float

    def __call__(self, judged: Sequence[Judged]) -> Sequence[float | None]:
        """A finite number for each completion, or None if the reward does not apply to it."""

    def close(self) -> None:
        """Ends the reward's processes; a later call starts them again."""


def failure(
    name: str, message: str, judged: Sequence[Scored] = (), noun: str = "reward"
) -> RewardFailed:
    ends = list(dict.fromkeys(one.where for one in (*judged[:1], *judged[-1:])))
    where = f"{' to '.join(ends)}: " if ends else ""
    return RewardFailed(escape_unprintable(f"{noun} {name}: {where}{message}"))


class CodeReward:
    """A reward or an environment (`noun`) that is Python code."""

    calls = DEFAULT_CALLS

    def __init__(self, name: str, weight: float, noun: str) -> None:
        self.name, self.weight, self.noun = name, weight, noun

    def failure(self, message: str, judged: Sequence[Scored] = ()) -> RewardFailed:
        return failure(self.name, message, judged, self.noun)


class SeparateReward(CodeReward):
    """A reward in a separate process, of a kind in `worker.KINDS`. Only one thread may call it at a
    time.
    """

    def __init__(
        self, name: str, kind: str, text: str, weight: float = 1.0, noun: str = "reward"
    ) -> None:
        super().__init__(name, weight, noun)
        self._first_message = json.dumps({"kind": kind, "text": text}).encode()
        self._process = self._start()

    def __call__(self, judged: Sequence[Scored]) -> list[Any]:
        if not judged:
            return []
        items = [self._serialize(one) for one in judged]
        message = framed(pickle.dumps((self.calls, items)))
        if not self._process.is_alive:
            self.close()
            self._process = self._start()
        rewards: list[Any] = []
        calls, n = self.calls, len(judged)
        if not self._batched and self._asynchronous:  # each try waits for its turn
            n = 2 * (calls.retries + 1) * math.ceil(n / calls.concurrency)
        limit = calls.seconds * (n if self._batched or self._asynchronous else 1)
        try:
            self._process.write(message, time.monotonic() + limit)
            while len(rewards) < len(judged):
                answer = json.loads(self._process.read(time.monotonic() + limit))
                if isinstance(answer, dict):
                    wrong = Problem(answer["wrong"], answer["at"])
                    raise self.failure(wrong.message, wrong.of(judged))
                rewards += answer
        except (TimedOut, Exited, KeyboardInterrupt) as error:
            self.close()
            if isinstance(error, KeyboardInterrupt):
                raise
            at_work = judged if self._batched else judged[len(rewards) : len(rewards) + 1]
            if isinstance(error, Exited):
                raise self.failure(_exit_message(error.code), at_work) from None
            done = "" if self._batched else f"{len(rewards)} done of "
            why = (
                f"took more than {limit:g} s ({done}{len(judged)} completions); make it"
                " faster, or set a longer time limit (reward_seconds)"
            )
            raise self.failure(why, at_work) from None
        return rewards

    def close(self) -> None:
        self._process.kill()

    def _start(self) -> KillableProcess:
        process = KillableProcess("lorafold.rewards.worker", ENVIRONMENT)
        until = time.monotonic() + LOADING_SECONDS
        try:
            process.write(framed(self._first_message), until)
            answer = json.loads(process.read(until))
            if "wrong" in answer:
                raise self.failure(answer["wrong"])
        except BaseException as error:
            process.kill()
            if isinstance(error, TimedOut):
                raise self.failure(f"loading took more than {LOADING_SECONDS:g} s") from None
            if isinstance(error, Exited):
                raise self.failure(f"while loading, {_exit_message(error.code)}") from None
            raise
        self._batched, self._asynchronous = answer["batched"], answer["asynchronous"]
        return process

    def _serialize(self, one: Scored) -> bytes:
        try:
            return pickle.dumps(one.content)
        except Exception as error:  # pickling a field may raise anything
            why = f"the row can't be pickled for its process: {error}"
            raise self.failure(why, [one]) from None


def _exit_message(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    known = {int(number): number.name for number in signal.Signals}
    memory = ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
    return f"its process was killed by {known.get(-code, f'signal {-code}')}{memory}"


class RewardName(NamedTuple):
    """The parts of a reward's name: the weight, the name without the weight, the kind (`adapter`,
    or a key of `worker.KINDS`), and the text after the kind, in which paths are absolute except
    for adapters.
    """

    weight: float
    name: str
    kind: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses a name such as `0.5*FILE.py:fn`; without a number, the weight is 1."""
        number, name = WEIGHTED.findall(text)[0]
        weight = float(number or 1)
        if not math.isfinite(weight):
            raise LorafoldError(f"reward {text}: found weight {weight}, expected a finite number")
        kind, _, rest = name.partition(":")
        file, _, function = name.rpartition(":")
        if rest and kind in ("regex", "reasoning-gym", "adapter"):
            return cls(weight, name, kind, rest)
        if rest and kind in ("schema", "judge", TOOLS):
            return cls(weight, name, kind, str(Path(rest).expanduser().absolute()))
        if file.endswith(".py") and function.isidentifier():
            return cls(weight, name, "file", f"{Path(file).expanduser().absolute()}:{function}")
        expected = f"expected {FORMS}, optionally with a weight such as 0.5*"
        raise LorafoldError(f"reward {text!r}: {expected}")

    @property
    def is_adapter(self) -> bool:
        """Whether the reward is a reward model, which is an adapter on the run's base."""
        return self.kind == "adapter"

    @property
    def file(self) -> Path | None:
        file = self.text.rpartition(":")[0] if self.kind == "file" else self.text
        return Path(file) if self.kind in ("file", "schema", "judge", TOOLS) else None

    @property
    def digest(self) -> str:
        """The SHA-256 of the reward's file; empty if there is no file."""
        file = self.file
        return sha256(file.read_bytes()).hexdigest() if file and file.is_file() else ""


def check_names(texts: Iterable[str], noun: str = "reward") -> None:
    """Checks reward names, their files and patterns without running anything."""
    for text in texts:
        parsed = RewardName.parse(text)
        if (file := parsed.file) and not file.is_file():
            near = nearest_name(file)
            raise LorafoldError(f"{noun} {text}: there is no file {file}{near}")
        if parsed.kind == "regex":
            try:
                pattern(parsed.text)
            except Problem as error:
                raise LorafoldError(f"reward {text}: {error}") from None


def reward_of(text: str) -> Reward:
    """The reward with this name, which may begin with a weight (`0.5*`). The reward runs in a
    separate process until it is closed.
    """
    parsed = RewardName.parse(text)
    if parsed.kind == TOOLS:
        raise LorafoldError(f"reward {text}: tools give no reward; pass them as the environment")
    if parsed.is_adapter:
        raise LorafoldError(
            f"reward {text}: a reward model needs the base in memory, as in policy training and"
            " evaluation; to score rows, run lorafold lab score"
        )
    return SeparateReward(parsed.name, parsed.kind, parsed.text, parsed.weight)


def check_starts(texts: Iterable[str]) -> None:
    """Checks that each of these rewards, except adapters, can be started."""
    for text in texts:
        if not RewardName.parse(text).is_adapter:
            reward_of(text).close()


def qualname(function: Any) -> str:
    """The name of a function, or of an object's class, that is the same in every process."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


class DirectReward(CodeReward):
    """A reward that calls a function in this process (see `functions.py`)."""

    def __init__(
        self,
        function: Any,
        weight: float = 1.0,
        kind: Callable[..., Any] = Function,
        noun: str = "reward",
    ) -> None:
        name = str(getattr(function, "__name__", type(function).__name__))
        super().__init__(TOOLS if isinstance(function, list | tuple) else name, weight, noun)
        self.qualname = qualname(function)
        code = getattr(function, "__code__", None)
        if not math.isfinite(weight):
            raise self.failure(f"found weight {weight}, expected a finite number")
        try:
            self._function = kind(function, code and code.co_filename)
        except Problem as wrong:
            raise self.failure(wrong.message) from None

    def __call__(self, judged: Sequence[Scored]) -> list[Any]:
        if not judged:
            return []
        items = [self._function.item(*one.content) for one in judged]

        try:
            parts = self._function.rewards(items, self.calls)
            return [reward for part in parts for reward in part]
        except Problem as wrong:
            raise self.failure(wrong.message, wrong.of(judged)) from None

    def close(self) -> None:
        self._function.close()


@contextmanager
def environment_of(given: Any, calls: Calls) -> Iterator[Environment]:
    """Yields the environment with this name, in a separate process, or of a Python object (see
    `environments.py`); if there is none, that of a single turn.
    """
    if not given:
        yield single_turn
        return
    if isinstance(given, str):
        known = re.fullmatch(r"tools:.+\.py|.+\.py:\w+", given)
        parsed = RewardName.parse(given) if known else None
        if parsed is None or parsed.kind not in ("file", TOOLS) or parsed.weight != 1:
            raise LorafoldError(f"environment {given!r}: expected FILE.py:NAME or tools:FILE.py")
        check_names([given], NOUN)
        kind = TOOLS if parsed.kind == TOOLS else NOUN
        environment: Any = SeparateReward(given, kind, parsed.text, noun=NOUN)
    else:
        environment = DirectReward(given, kind=Environments.of, noun=NOUN)
    environment.calls = calls
    with closing(environment):
        yield environment


def weighted(reward: Any) -> Any:
    """The reward of a pair of a weight and a name or function; anything else is returned as it is.
    """
    match reward:
        case (int() | float() as weight, str() as name):
            return f"{weight}*{name}"
        case (int() | float() as weight, function) if callable(function):
            return DirectReward(function, weight)
    return reward


class Rewards(AbstractContextManager["Rewards"]):
    """The rewards of one run, as a context manager that closes them.

    Args:
        rewards: rewards with different names.
        calls: the time limit per completion, and concurrency and retries of asynchronous functions.
    """

    def __init__(self, rewards: Sequence[Reward], calls: Calls = DEFAULT_CALLS) -> None:
        limit = calls.seconds
        names = [reward.name for reward in rewards]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise LorafoldError(f"rewards: found {', '.join(repeated)} more than once")
        if not isinstance(limit, int | float) or isinstance(limit, bool):
            raise LorafoldError(f"rewards: found a time limit of {limit!r}, expected a number")
        if not 0 < limit < math.inf:
            raise LorafoldError(
                f"rewards: found a time limit of {limit} s, expected a finite number above 0"
            )
        self._rewards = tuple(rewards)
        for reward in self._rewards:
            if isinstance(reward, CodeReward):
                reward.calls = calls

    @classmethod
    def of(cls, *given: Any, calls: Calls = DEFAULT_CALLS) -> Self:
        """Creates `Rewards` from names (see `reward_of`), functions, rewards, and pairs of a weight
        and a name or function. Functions run in this process, without a time limit unless they are
        asynchronous; functions with the same name are numbered.
        """
        rewards = []
        names = Counter[str]()
        try:
            for one in map(weighted, given):
                reward = reward_of(one) if isinstance(one, str) else one
                reward = reward if isinstance(reward, Reward) else DirectReward(reward)
                rewards.append(reward)
                names[reward.name] += 1
                if isinstance(reward, DirectReward) and names[reward.name] > 1:
                    reward.name += f" {names[reward.name]}"  # two lambdas have the same name
            return cls(rewards, calls)
        except BaseException:
            for reward in rewards:
                reward.close()
            raise

    @property
    def weights(self) -> dict[str, float]:
        return {reward.name: reward.weight for reward in self._rewards}

    def __call__(
        self, judged: Sequence[Judged]
    ) -> tuple[list[float | None], dict[str, list[float | None]]]:
        """The weighted sum for each completion, and the numbers of each reward by name. A number is
        None if the reward does not apply to the completion; a sum is None if no reward applies.
        """
        each = {reward.name: _judge(reward, judged) for reward in self._rewards}
        names = [name for one in judged for name, x in one.given.items() if x is not None]
        if both := each.keys() & names:
            raise failure(min(both), "the environment gives a reward of the same name")
        each |= {name: [one.given.get(name) for one in judged] for name in dict.fromkeys(names)}
        weights, sums = [self.weights.get(name, 1.0) for name in each], []
        for at, one in enumerate(judged):
            numbers = [(w, x[at]) for w, x in zip(weights, each.values(), strict=True)]
            applied = [w * x for w, x in numbers if x is not None]
            sums.append(sum(applied) if applied and not one.refused else None)
        for one, total in zip(judged, sums, strict=True):
            if total is not None and not abs(total) <= LARGEST:
                why = f"the weighted sum is {total:g}, expected at most {LARGEST:g} in magnitude"
                raise failure(" + ".join(each), why, [one])
        return sums, each

    def close(self) -> None:
        for reward in self._rewards:
            reward.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def _judge(reward: Reward, judged: Sequence[Judged]) -> list[float | None]:
    rewards = reward(judged)
    if len(rewards) != len(judged):
        why = f"returned {len(rewards)} rewards, expected {len(judged)}, one per completion"
        raise failure(reward.name, why, judged)
    try:
        return [number(value, at) for at, value in enumerate(rewards)]
    except Problem as wrong:
        raise failure(reward.name, wrong.message, wrong.of(judged)) from None
