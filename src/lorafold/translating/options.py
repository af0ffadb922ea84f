"""The options of other tools' command lines, read with the tables that translate their files: what
`lorafold train` has for `--lora-r`, `--learning-rate` or `--load-in-4bit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafold.translating import axolotl, llamafactory, mlx, trl_trainers, unsloth
from lorafold.translating.rules import Outcome, Rule, Settings

# Switches that their tools read with another key, and what that is then
SWITCHES = {
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "use_dora": ("use_peft", "true"),
    "use_rslora": ("use_peft", "true"),
}


def counterpart(key: str, given: Mapping[str, Any]) -> Outcome | None:
    """What becomes of an option of TRL's, PEFT's, Unsloth's, LLaMA-Factory's,
    axolotl's or mlx-lm's.

    Args:
        key: The option's name without dashes in front, as in lora_r.
        given: The values of all options of that kind on the command line, by such names.

    Returns None for what none of them has. LorafoldError for a value that the tool would refuse, or
    that lorafold can't train.
    """
    name, value = SWITCHES.get(key, (key, given[key]))
    for rules in _tables():
        if rule := rules.get(name):
            defaults = {one.key: one.default for one in rules.values()}
            known = {rules[n].key: v for n, v in given.items() if n in rules}
            found = rule.reader(value, Settings({**known, rule.key: value}, defaults))
            # what has no effect among the others means something by itself
            return found or rule.reader(value, Settings({rule.key: value}, defaults))
    return None


def _tables() -> Iterator[Mapping[str, Rule]]:
    """The rules of each tool by the names of options; of several tools the first one counts."""
    yield _by_name(trl_trainers.RULES["trl-sft"])
    yield _by_name(unsloth.OWN, unsloth.LOADED, unsloth.ADAPTED)  # the arguments of PEFT's LoRA too
    yield from (_by_name(rules) for rules in trl_trainers.RULES.values())
    yield _by_name(llamafactory.RULES)
    yield _by_name(axolotl.RULES)
    yield _by_name(mlx.RULES)


def _by_name(rules: Sequence[Rule], *calls: str) -> Mapping[str, Rule]:
    """Rules by their keys, without the function that takes the argument in a script."""
    starts = calls or ("",)
    return {
        rule.key.removeprefix(start): rule
        for rule in rules
        for start in starts
        if rule.key.startswith(start)
    }
