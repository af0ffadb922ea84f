"""What lorafold does with a family of models, measured on its tiny one, step by step: attach,
train, save, load, merge, and read the files again in transformers and in PEFT.

    measured("zamba2", folder)      the line of the family in the lists of docs/models.md
    PYTHONPATH=tests python tests/lib/matrix.py [FAMILY ...]      writes the lines to the page

A step that fails raises, but for reading in PEFT, whose answer is a note: PEFT may refuse a module
that is adapted, or compute something else.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

import lorafold as lf
from architectures import Architecture, near, run
from conftest import make_tokenizer, unestimating
from lorafold.core.expert_matrices import Matrices, module_at
from more_architectures import FAMILIES
from peft_cases import load_theirs, move

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- measured -->\n\n", "\n<!-- end of what is measured -->\n"
PROMPTS = [{"prompt": f"{n} cats", "completion": f"{n + 1} cats sat"} for n in range(2)]
TEXTS = [{"text": f"{n} cats sat", "label": f"LABEL_{n}"} for n in range(3)]
RECIPE: dict[str, Any] = {
    "batch": 3, "storage": "fp32", "lr": 1e-2, "rank": 4, "dropout": 0.0,
}  # fmt: skip
State = dict[str, Tensor]
LISTS = {  # the headings of the page, by how its families are trained
    "text": "Trained on text by `lf.train`, merged by `lf.merge`",
    "classes": "Trained on classes by `lf.train`, merged by `adapter.merge()`",
    "loop": "Trained in your own loop, merged by `adapter.merge()`",
}


@dataclass(frozen=True)
class Measured:
    """A line of the page, in the list that `trained` names."""

    family: str
    model: str
    trained: str
    note: str

    def __str__(self) -> str:
        return f"- {self.family} `{self.model}`" + f": {self.note}" * bool(self.note)


def measured(name: str, folder: Path) -> Measured:
    """The line of a family; an error if a step fails. The directory is empty."""
    row = FAMILIES[name]
    base, adapter, merged = (folder / part for part in ("base", "adapter", "merged"))
    row.model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    inputs = row.inputs()
    bare = outputs(opened(row, base), inputs)
    trained = train(row, base, adapter)

    model = opened(row, base)
    attached = lf.load(model, adapter)
    expected = outputs(model, inputs)
    assert (expected - bare).norm() > 1e-3 * bare.norm(), "the adapter changes nothing"
    with told() as lines:
        attached.save(folder / "again")
    again = opened(row, base)
    lf.load(again, folder / "again")
    assert torch.equal(outputs(again, inputs), expected)

    merge(row, base, adapter, merged)
    read, info = named(merged).from_pretrained(merged, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    assert near(outputs(read.eval(), inputs), expected, row.within)

    why = peft_reads(row, base, adapter, expected)
    unsupported = any("does not support the targets" in line for line in lines)
    assert unsupported == any("refuses" in said for said in why)
    differs = any("computes something else" in said for said in why)
    assert not differs or any("PEFT silently ignores" in line for line in lines)
    notes = [
        "experts" * has_experts(attached),
        f"as `{type(model).__name__}`" * (type(model) is not row.cls),
        frozen(attached),
        row.idle[1] and f"without a gradient: {row.idle[1]}",
        *why,
    ]
    return Measured(name, row.cls.__name__, trained, "; ".join(filter(None, notes)))


def named(path: Path) -> Any:
    """The class that config.json names."""
    return getattr(tf, json.loads((path / "config.json").read_text())["architectures"][0])


def is_language_model(row: Architecture) -> bool:
    """Is it trained on text by `lf.train`?"""
    return row.trains is None and (
        row.cls in auto.MODEL_FOR_CAUSAL_LM_MAPPING.values()
        or row.cls in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING.values()
    )


def is_classifier(row: Architecture) -> bool:
    """Is it trained on labelled texts by `lf.train`?"""
    classes = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values()
    return row.cls in classes and "input_ids" in row.inputs()


def opened(row: Architecture, path: Path) -> Any:
    """The model as lorafold opens it, or as transformers does, where no command trains it."""
    if is_language_model(row):
        return lf.load_model(path, storage="fp32")
    return named(path).from_pretrained(path).eval()


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return run(model, inputs)


@contextmanager
def told() -> Iterator[list[str]]:
    """What lorafold logs inside."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lorafold")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def train(row: Architecture, base: Path, out: Path) -> str:
    """Train an adapter on the default targets, and say how. Each of its tensors moves in the later
    steps, in which all have a gradient, but for those of modules that are known to be idle.
    """
    if is_language_model(row) or is_classifier(row):
        before, after, way = by_command(row, base, out)
    else:
        before, after, way = by_loop(row, base, out)
    still = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    idle = {name for name in before if re.fullmatch(rf"{row.idle[0]}\.lora_[AB]\.weight", name)}
    assert still <= idle
    assert bool(still) == bool(row.idle[0])
    return way


def by_command(row: Architecture, base: Path, out: Path) -> tuple[State, State, str]:
    """The tensors of an adapter after one step and after three of `lf.train`, and its list.
    A run that leaves modules without a gradient says so.
    """
    task, rows = ({"objective": "classify"}, TEXTS) if is_classifier(row) else ({}, PROMPTS)
    states = []
    for steps in (1, 3):
        at = out.with_name(f"{out.name}{steps}")
        with unestimating(), told() as lines:
            lf.train(lf.Recipe(steps=steps, **RECIPE | task), model=base, data=rows, out=at)
        assert any("no gradient in the first step" in line for line in lines) == bool(row.idle[0])
        states.append(load_file(at / "adapter_model.safetensors"))
    at.rename(out)
    return *states, "classes" if is_classifier(row) else "text"


def by_loop(row: Architecture, base: Path, out: Path) -> tuple[State, State, str]:
    """The tensors of a fresh adapter, and after three steps of a loop of the user's own."""
    model = opened(row, base).train()
    torch.manual_seed(0)
    adapter = lf.attach(model, lf.LoRA(rank=4, dropout=0.0))
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, row).backward()
        optimizer.step()
    adapter.save(out)
    return before, dict(adapter.named_parameters()), "loop"


def loss_of(model: nn.Module, row: Architecture) -> Tensor:
    """The model's own loss, or a random projection where it has none."""
    if row.trains is not None:
        return model(**row.inputs() | row.trains()).loss  # type: ignore[no-any-return]
    y = run(model, row.inputs())
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum()


def merge(row: Architecture, base: Path, adapter: Path, out: Path) -> None:
    """Fold a saved adapter, and write a plain model."""
    if is_language_model(row):
        lf.merge(base, adapter, out, storage="fp32", certificate=False)
        return
    model = opened(row, base)
    lf.load(model, adapter).merge()
    model.save_pretrained(out)


def peft_reads(row: Architecture, base: Path, adapter: Path, expected: Tensor) -> list[str]:
    """What PEFT does, on the class that config.json names, with the modules without which it
    computes the same.
    """
    model = opened(row, base)
    attached = lf.load(model, adapter)
    ends = {path: path.rpartition(".")[2] for path in attached.sites}
    attached.detach()
    left_out, notes = set[str](), list[str]()
    while found := in_peft(row, base, adapter, expected):
        what, names = found
        more = (names or set(row.not_in_peft) & set(ends.values())) - left_out
        assert more, what
        notes.append(f"PEFT {what} {code(more)}")
        left_out |= more
        rest = [path for path, end in ends.items() if end not in left_out]
        others = lf.attach(model, lf.LoRA(rank=4, dropout=0.0), rest)
        move(others.parameters())
        adapter, expected = adapter.with_name(f"part{len(notes)}"), outputs(model, row.inputs())
        others.save(adapter)
        others.detach()
    return notes


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def in_peft(
    row: Architecture, base: Path, adapter: Path, expected: Tensor
) -> tuple[str, set[str]] | None:
    """None if PEFT computes what is expected; else what it does, and with which modules."""
    theirs = named(base).from_pretrained(base)
    try:
        wrapped = load_theirs(theirs, adapter).eval()
    except ValueError as error:
        if refused := re.search(r"Module '(\w+)' is incompatible", str(error)):
            return "refuses", {refused[1]}
        raise
    except KeyError as error:
        if str(error).startswith("'LORAFOLD_"):  # a type of our own
            return "has no form for", set()
        raise
    same = near(outputs(wrapped, row.inputs()), expected, row.within)
    return None if same else ("computes something else with", set())


def has_experts(adapter: lf.Adapter) -> bool:
    return any(isinstance(module_at(adapter.model, p), Matrices) for p in adapter.sites)


def frozen(adapter: lf.Adapter) -> str:
    """What of the model the default targets leave out, but for what they leave out everywhere, for
    biases of experts, and for less than a hundredth of the blocks in other parameters.
    """
    left = adapter.unreached
    small = {kind for kind, share in left.as_json()["blocks"].items() if share < 0.01}
    unsaid = {"norms", "router", "embeddings"} | ({"experts"} if has_experts(adapter) else set())
    unsaid |= small & {"other"}
    kinds = [kind for kind in left.blocks if kind not in unsaid] + [*left.beside]
    return f"frozen: {', '.join(kinds)}" if kinds else ""


def on_page() -> dict[str, tuple[str, str]]:
    """The list that has a family, and its line."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return {
        found.split()[1]: (kind, found)
        for kind, heading in LISTS.items()
        for found in text.partition(f"### {heading}\n")[2].partition("###")[0].splitlines()
        if found.startswith("- ")
    }


def main(*families: str) -> None:
    """Measure families, or all, and write their lines to the page."""
    lines = {name: found for name, found in on_page().items() if name in FAMILIES}
    for name in families or FAMILIES:
        with TemporaryDirectory() as folder:
            found = measured(name, Path(folder))
        lines[name] = found.trained, str(found)
    text = "\n".join(
        "\n".join([
            f'### {heading}\n\n<div class="families" markdown>\n',
            *(line for _, (of, line) in sorted(lines.items()) if of == kind),
            "\n</div>\n",
        ])
        for kind, heading in LISTS.items()
    )  # fmt: skip
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
