"""A reward from its name.

FILE.py:fn             a Python function
regex:PATTERN          1 where the whole completion matches
schema:FILE.json       1 where the completion is JSON that fits
reasoning-gym:TASK     the verifier of a task
adapter:DIR            the score of a reward model: `lorafold.evaluation.reward_adapter`, which has
                       the model that it needs
0.5*FILE.py:fn         any of them with a weight
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from lorafold.errors import LorafoldError
from lorafold.files.paths import beside
from lorafold.rewards.calling import Wrong
from lorafold.rewards.judged import Reward
from lorafold.rewards.kinds import pattern
from lorafold.rewards.separate import SeparateReward

NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf|nan)"
FORMS = "FILE.py:fn, regex:PATTERN, schema:FILE.json, reasoning-gym:TASK or adapter:DIR"
ADAPTER = "adapter:"
REWARDS = "rewards"  # in the identity of a run: the digests of its rewards' files, by their names


def parted(text: str) -> tuple[float, str]:
    """The weight that a reward's name begins with, 1 where it begins with none, and the name.
    Raises LorafoldError for a weight that is not finite.
    """
    found = re.match(rf"\s*({NUMBER})\s*\*\s*", text, re.IGNORECASE)
    weight, name = (float(found[1]), text[found.end() :]) if found else (1.0, text)
    if not math.isfinite(weight):
        raise LorafoldError(f"reward {text}: found weight {weight}, expected a finite number")
    return weight, name


def adapter_in(text: str) -> str:
    """The directory of the adapter that a reward's name stands for; empty if it stands for none."""
    name = parted(text)[1]
    return name.removeprefix(ADAPTER) if name.startswith(ADAPTER) else ""


def kind_of(text: str) -> tuple[str, str]:
    """The kind of `kinds.KINDS` that a reward's name, without a weight, is of, and what of it.
    Raises LorafoldError for a name of no known form.
    """
    name = parted(text)[1]
    kind, colon, rest = name.partition(":")
    if colon and rest and kind in ("regex", "reasoning-gym"):
        return kind, rest
    if colon and rest and kind == "schema":
        return kind, _whole(rest)
    file, colon, function = name.rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return "file", f"{_whole(file)}:{function}"
    raise LorafoldError(f"reward {text!r}: expected {FORMS}, with a weight as in 0.5* or without")


def check_there(texts: Iterable[str]) -> None:
    """Raise LorafoldError for names of no known form, of files that are not there, and for patterns
    that are none: what can be known without running anything. Adapters are left out.
    """
    for text in texts:
        kind, what = ("", "") if adapter_in(text) else kind_of(text)
        file = Path(what.rpartition(":")[0] if kind == "file" else what)
        if kind in ("file", "schema") and not file.is_file():
            raise LorafoldError(f"reward {text}: found no file {file}, expected one{beside(file)}")
        if kind == "regex":
            try:
                pattern(what)
            except Wrong as error:
                raise LorafoldError(f"reward {text}: {error}") from None


def reward_of(text: str) -> Reward:
    """The reward that a name stands for, which may begin with a weight: `0.5*`. It runs in a
    process of its own from now on, until it is closed.

    Raises LorafoldError for a name of no known form, for what can't judge, and for an adapter,
    which needs a model.
    """
    weight, name = parted(text)
    if adapter_in(name):
        raise LorafoldError(
            f"reward {text}: it scores with a base in memory, expected in a run that trains a"
            " policy; lorafold score has the scores of rows"
        )
    return SeparateReward(name, *kind_of(text), weight)


def check_judges(texts: Iterable[str]) -> None:
    """Start what these names stand for, and end it again; adapters are left out. Raises
    LorafoldError for what can't judge.
    """
    for text in texts:
        if not adapter_in(text):
            reward_of(text).close()


def digest_of(text: str) -> str:
    """The SHA-256 of the file that a name stands for; empty where it stands for none."""
    _, name = parted(text)
    kind, _, rest = name.partition(":")
    if kind in ("regex", "reasoning-gym"):
        return ""
    path = Path(rest if kind == "schema" else name.rpartition(":")[0]).expanduser()
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _whole(path: str) -> str:
    """A path that stays the same when the process goes to another directory."""
    return str(Path(path).expanduser().absolute())
