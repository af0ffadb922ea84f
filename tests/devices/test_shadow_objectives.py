"""The losses of objectives compute on a GPU what they compute on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

from device_cases import Case, apart, llama
from lorafold.data.classification import LabelledExample
from lorafold.data.examples import Example
from lorafold.data.preference_examples import BranchedRow
from lorafold.training_step.classification_loss import Classification
from lorafold.training_step.preference_algorithms import (
    BradleyTerry,
    Dpo,
    Hinge,
    Ipo,
    Kto,
    Orpo,
    Simpo,
)
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes

LORA = {"dropout": 0.0}


def pairs() -> list[BranchedRow]:
    """Three rows of two completions, of different lengths."""
    g = torch.Generator().manual_seed(4)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (n,), generator=g).tolist())

    def branch(n: int) -> Example:
        found = ids(n)
        return Example(found, (-100, *found[1:]))

    sizes = ((9, 6, 4), (5, 3, 7), (12, 5, 5))
    return [BranchedRow(ids(s), (branch(a), branch(b))) for s, a, b in sizes]


def by_law(law: Any, across: bool = True, padded: bool = False) -> Any:
    @contextmanager
    def loss(model: Any, packed: bool) -> Iterator[Any]:
        if padded:
            yield Preferences(model, law, None, 0)
            return
        with sharing_prefixes(model, across=across) as how:
            assert how.packs
            yield Preferences(model, law, how, 0)

    return loss


PAIRS = [Dpo(), Ipo(), Hinge(), Orpo(), Simpo()]


@pytest.mark.parametrize("law", PAIRS, ids=lambda law: type(law).__name__)
def test_pairs(law: Any) -> None:
    case = Case("lora", LORA, "fp32", objective=by_law(law), examples=pairs())
    found, expected = case.both()
    assert apart(found, expected) <= 1e-5
    assert found.count.synchronizations.total() <= 2, found.count.told()


@pytest.mark.parametrize("padded", [False, True], ids=["apart", "padded"])
def test_pairs_in_other_layouts(padded: bool) -> None:
    objective = by_law(Dpo(), across=False, padded=padded)
    case = Case("dora", LORA, "fp32", objective=objective, examples=pairs(), checkpointing=True)
    assert apart(*case.both()) <= 1e-5


def test_judged_completions() -> None:
    rows = [replace(r, desirable=i != 1) for i, r in enumerate(pairs())]
    case = Case("lora", LORA, "fp32", objective=by_law(Kto()), examples=rows)
    assert apart(*case.both()) <= 1e-5


def test_classes() -> None:
    @contextmanager
    def loss(model: Any, packed: bool) -> Iterator[Any]:
        with sharing_prefixes(model, across=True) as how:
            yield Classification(model, 0, how)

    branches = [branch for row in pairs() for branch in row.branches]
    texts = [LabelledExample(branch.ids, i % 3) for i, branch in enumerate(branches)]
    cls, config = tf.AutoModelForSequenceClassification, llama(num_labels=3)
    case = Case("lora", LORA, "fp32", config, objective=loss, examples=texts, cls=cls)
    case.beside = {"modules_to_save": ["score"]}
    found, expected = case.both()
    assert apart(found, expected) <= 1e-5


def test_rewards() -> None:
    cls, config = tf.AutoModelForSequenceClassification, llama(num_labels=1)
    case = Case(
        "lora", LORA, "fp32", config, objective=by_law(BradleyTerry()), examples=pairs(), cls=cls
    )
    case.beside = {"modules_to_save": ["score"]}
    assert apart(*case.both()) <= 1e-5
