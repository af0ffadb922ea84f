"""Rows of one small task, short questions about who keeps how much, in the forms that tools read.

`write(folder)` writes for each of FORMS the rows to train on, `FORM/train.jsonl`, and the held-out
ones, `FORM/valid.jsonl`, and LLaMA-Factory's `dataset_info.json` beside them.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Farid", "Greta", "Hassan", "Ines", "Jonas")
PLACES = ("attic", "barn", "cellar", "garage", "garden", "kitchen", "office", "shed")
THINGS = ("apples", "books", "candles", "drums", "eggs", "lamps", "nails", "pens", "ropes")
TRAINED, HELD_OUT = 64, 16
SYSTEM = "Be brief."
# The form of Stanford's Alpaca, without an input
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{}\n\n### Response:\n{}"
)
END = "<|im_end|>"


class Fact(NamedTuple):
    """A question, its answer, and a worse one."""

    question: str
    answer: str
    worse: str


def facts(count: int) -> list[Fact]:
    """Distinct facts, always the same; the answer follows from the names in the question."""
    draw = random.Random(1)
    found: dict[tuple[str, str, str], Fact] = {}
    while len(found) < count:
        name, thing, place = draw.choice(NAMES), draw.choice(THINGS), draw.choice(PLACES)
        kept = len(name) + len(place)
        found[name, thing, place] = Fact(
            f"How many {thing} does {name} keep in the {place}?",
            f"{name} keeps {kept} {thing} in the {place}.",
            f"There are {kept + draw.randint(1, 5)} of them, I guess.",
        )
    return list(found.values())


def _turns(fact: Fact) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": fact.question}]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _asked(fact: Fact) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": fact.question}], "system": SYSTEM}


def _shared(fact: Fact) -> dict[str, Any]:
    turns = [*_asked(fact)["conversations"], {"from": "gpt", "value": fact.answer}]
    return {"conversations": turns, "system": SYSTEM}


def _ranked(fact: Fact) -> dict[str, Any]:
    judged = {"chosen": fact.answer, "rejected": fact.worse}
    return _asked(fact) | {k: {"from": "gpt", "value": v} for k, v in judged.items()}


FORMS: dict[str, Callable[[Fact], dict[str, Any]]] = {
    "messages": lambda f: {"messages": [*_turns(f), *_said(f.answer)]},
    "turns": lambda f: {"prompt": _turns(f), "completion": _said(f.answer)},
    "strings": lambda f: {"prompt": f.question, "completion": f" {f.answer}"},
    "text": lambda f: {"text": f"{f.question} {f.answer}"},
    "pairs": lambda f: {
        "prompt": _turns(f), "chosen": _said(f.answer), "rejected": _said(f.worse)
    },
    "alpaca": lambda f: {"instruction": f.question, "input": "", "output": f.answer},
    "alpaca_text": lambda f: {"text": ALPACA.format(f.question, f.answer) + END},
    "shared": _shared,
    "ranked": _ranked,
}  # fmt: skip
SHAREGPT = {"messages": "conversations", "system": "system"}
INFO = {
    "alpaca": {"file_name": "alpaca/train.jsonl"},
    "shared": {
        "file_name": "shared/train.jsonl", "formatting": "sharegpt", "columns": SHAREGPT,
    },
    "ranked": {
        "file_name": "ranked/train.jsonl", "formatting": "sharegpt", "ranking": True,
        "columns": SHAREGPT | {"chosen": "chosen", "rejected": "rejected"},
    },
}  # fmt: skip


def write(folder: Path) -> None:
    """Write all forms, and LLaMA-Factory's names of them."""
    found = facts(TRAINED + HELD_OUT)
    for name, form in FORMS.items():
        (folder / name).mkdir(parents=True)
        for split, part in (("train", found[:TRAINED]), ("valid", found[TRAINED:])):
            lines = (json.dumps(form(fact)) for fact in part)
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "dataset_info.json").write_text(json.dumps(INFO))
