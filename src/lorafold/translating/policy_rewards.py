"""Readers of TRL's reward functions, which axolotl's `trl` block names too: `module.function`, from
where the run starts, becomes the reward `module.py:function`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import names, number
from lorafold.translating.rules import Outcome, Settings, left, taken

PLACE = "FILE.py:FUNCTION"
INSTALLED = ("trl", "axolotl")  # packages whose modules are no files of the user
TEXTS = (
    "TRL gives completions of prompts that are messages as lists of messages; here they are texts,"
    " and so completion[0]['content'] is completion"
)


def weights_of(settings: Settings, n: int) -> Sequence[float]:
    """The weights of n reward functions, 1 without `reward_weights`. LorafoldError for others than
    n.
    """
    given = settings["reward_weights"]
    if given is None:
        return [1.0] * n
    found = given if isinstance(given, list | tuple) else [given]
    if len(found) != n:
        raise LorafoldError(f"found {n} functions and {len(found)} reward_weights, one for each")
    return [number(one) for one in found]


def reward_funcs(value: Any, settings: Settings) -> Outcome:
    """`reward_funcs` become the rewards; those that are no functions of a file are left.

    LorafoldError for a model that scores.
    """
    found = names(value)
    if not found:
        return left(f"pass what judges completions as --reward {PLACE}", f"--reward {PLACE}")
    if models := [name for name in found if "/" in name]:
        raise LorafoldError(
            f"found {models[0]!r}, a model that scores, but lorafold's rewards are functions,"
            " patterns, schemas and verifiers"
        )
    rewards, others, flags = [], [], []
    for name, weight in zip(found, weights_of(settings, len(found)), strict=True):
        scale = "" if weight == 1 else f"{weight:.12g}*"
        module, _, function = name.rpartition(".")
        if module and module.split(".")[0] not in INSTALLED:
            rewards.append(f"{scale}{module.replace('.', '/')}.py:{function}")
        else:
            others.append(name)
            flags.append(f"--reward {scale}{PLACE}")
    said = [TEXTS]
    if others:
        said.insert(0, f"no file of yours has {', '.join(others)}: write a function")
    fields = {"objective_options": {"rewards": rewards}} if rewards else {}
    return Outcome("changed" if rewards else "left", fields, "; ".join(said), " ".join(flags))


def reward_weights(value: Any, settings: Settings) -> Outcome:
    """`reward_weights` are read with `reward_funcs`, without which they are left."""
    if names(settings["reward_funcs"] or ()):
        return taken("they are part of the rewards")
    return left("write each before its reward, as in --reward 0.5*FILE.py:FUNCTION")


def reward_clip_range(value: Any, settings: Settings) -> Outcome:
    """`reward_clip_range` has no counterpart: LorafoldError, as rewards would be others."""
    raise LorafoldError(f"found {value!r}, but rewards count as they are: clip in the function")
