"""The tools whose configurations are translated, and which of them a file is of.

A file is of a tool where it has one of its signs and, of all tools of which that is so, that tool
leaves the fewest of its fields unknown. Where two leave as few, or the best leaves more than a
third, the file is refused, and the user names the tool.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.recipe.recipe import Recipe
from lorafold.translating import (
    axolotl,
    axolotl_policies,
    llamafactory,
    mlx,
    mlx_readers,
    peft_config,
    trl_trainers,
    unsloth,
)
from lorafold.translating.rules import Rule, TranslatedKey, by_rules

AFTER_TURNS = (
    "what the chat template writes after the end of a turn, often a newline, counts in the loss"
    " there and not here"
)
NOTES = {
    "trl-sft": f"{AFTER_TURNS}; a prompt and completion of plain text are joined there as they"
    " stand: for such rows --chat-template none",
    "mlx-lm": f"{AFTER_TURNS}, and so does one token of padding after each row",
}
STRANGERS = {  # keys of files that stand beside configurations, and what such a file is
    "compute_environment": "a file of accelerate's, which says how processes start and not what"
    " they train: torchrun --nproc_per_node 2 -m lorafold train starts two",
    "zero_optimization": "a file of DeepSpeed's, which says how weights are divided:"
    " lorafold train --strategy fsdp divides them among processes",
    "model_class": "a file of LLaMA-Factory's v1, of which nothing is read: expected the form that"
    " has stage and finetuning_type",
    "architectures": "a model's configuration, expected that of a training run",
}
SHOWN = 3  # the most fields that a line names


@dataclass(frozen=True)
class Tool:
    """Another tool: its name, its signs (keys, or key=value, separated by spaces), the function
    that reads its files, the keys that it knows (None: every one), and a note on what such a file
    never says.
    """

    name: str
    signs: str
    entries: Callable[[Mapping[str, Any]], tuple[TranslatedKey, ...]]
    known: frozenset[str] | None
    note: str = ""

    def signs_in(self, config: Mapping[str, Any]) -> int:
        """How many of its signs a file has."""
        return sum(_has(config, *sign.partition("=")) for sign in self.signs.split())

    def unknown_in(self, config: Mapping[str, Any]) -> list[str]:
        """The fields of a file that it does not know."""
        return [] if self.known is None else [key for key in config if key not in self.known]


def _by_rules(
    name: str,
    signs: str,
    rules: Sequence[Rule],
    flat: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    note: str = "",
) -> Tool:
    """A tool with a table of rules; `flat` gives the keys of its blocks as keys of the file."""
    known = frozenset(rule.key for rule in rules)
    return Tool(name, signs, lambda config: by_rules(rules, flat(config)), known, note)


TOOLS: dict[str, Tool] = {
    "axolotl": _by_rules("axolotl", axolotl.SIGNS, axolotl.RULES, axolotl_policies.flat),
    "llamafactory": _by_rules(
        "LLaMA-Factory", llamafactory.SIGNS, llamafactory.RULES, note=AFTER_TURNS
    ),
    **{
        kind: _by_rules(
            trl_trainers.NAMES[kind], trl_trainers.SIGNS[kind], rules, note=NOTES.get(kind, "")
        )
        for kind, rules in trl_trainers.RULES.items()
    },
    "mlx-lm": _by_rules("mlx-lm", mlx.SIGNS, mlx.RULES, mlx_readers.flat, NOTES["mlx-lm"]),
    "unsloth": Tool(
        "Unsloth",
        unsloth.SIGNS,
        unsloth.entries,
        unsloth.KNOWN,
        "a script is read and not executed: what it does with its rows before it trains is not"
        " seen, and is to be done to them before",
    ),
    "peft": Tool(
        "PEFT",
        peft_config.SIGNS,
        peft_config.entries,
        None,
        "such a file says nothing of data, base, rates, batch and length: lorafold's defaults hold",
    ),
}


def kind_of(path: Path, config: Mapping[str, Any]) -> str:
    """The tool that a file is of. LorafoldError where none fits well, or several as well."""
    signs = {kind: tool.signs_in(config) for kind, tool in TOOLS.items()}
    unknown = {kind: tool.unknown_in(config) for kind, tool in TOOLS.items()}
    rank = {kind: (not signs[kind], len(unknown[kind]), -signs[kind]) for kind in TOOLS}
    order = sorted(TOOLS, key=lambda kind: rank[kind])
    best, *others = [kind for kind in order if rank[kind] == rank[order[0]]]
    if signs[best] and not others and 3 * len(unknown[best]) <= len(config):
        return best
    own = [key for key in config if key in Recipe.model_fields]
    if 2 * len(own) > len(config):
        raise LorafoldError(
            f"{path}: found a recipe of lorafold's own ({_some(own)}), expected another tool's"
            f" file; train with: lorafold train --config {path}"
        )
    if stranger := next((told for key, told in STRANGERS.items() if key in config), None):
        raise LorafoldError(f"{path}: found {stranger}")
    # any key may stand in PEFT's, so it is near where its own do
    kinds: Collection[str] = [best, *(kind for kind in others if TOOLS[kind].known is not None)]
    names = _some([TOOLS[kind].name for kind in kinds])
    if len(kinds) > 1:
        told = f"{names} know as many of them"
    elif signs[best]:
        told = f"{names} does not know {_some(unknown[best])}"
    else:
        told, kinds = "they are no tool's own", TOOLS
    raise LorafoldError(
        f"{path}: can't tell which tool's it is by its keys ({_some(list(config)) or 'none'}):"
        f" {told}; expected --kind {', '.join(kinds)}"
    )


def _has(config: Mapping[str, Any], key: str, equals: str, value: str) -> bool:
    found = config.get(key)
    values = found if isinstance(found, list) else [found]
    return key in config and (not equals or value in values)


def _some(keys: Sequence[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
