"""The search for a task's intrinsic dimension."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafold.errors import LorafoldError
from lorafold.evaluation import evaluate
from lorafold.inspecting.intrinsic import SubspaceRun, base_model_loss, search
from lorafold.models.classifier import load_classifier
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest

pytestmark = pytest.mark.usefixtures("unestimated")

ROWS = [
    {"prompt": f"say {word}", "completion": f" {word} {word}"}
    for word in ("one", "two", "three", "four")
]


@pytest.fixture
def request_(tiny_model_dir: Any, tmp_path: Path) -> RunRequest:
    recipe = Recipe(steps=4, batch=4, lr=3e-2, storage="fp32", max_length=32, warmup=0.0)
    return RunRequest(
        Base(tiny_model_dir("llama")), tmp_path / "search", recipe, ROWS, "test", eval_rows=ROWS
    )


@pytest.mark.slow
def test_the_smallest_power_of_two_that_gets_there(request_: RunRequest) -> None:
    seen: list[SubspaceRun] = []
    found = search(request_, 1, 64, 1e-6, seen.append)
    assert found.full_loss < found.base_loss
    assert [p.dimension for p in found.points] == sorted(p.dimension for p in seen)
    whole = found.base_loss - found.full_loss
    for p in found.points:
        assert p.reached == pytest.approx((found.base_loss - p.loss) / whole)
    there = {p.dimension: p.reached >= 1e-6 for p in found.points}
    assert there[64]
    assert found.dimension is not None
    assert there[found.dimension]
    assert found.dimension == 1 or there.get(found.dimension // 2) is False
    names = {"search.json", "base.json", "full.json", *(f"{d}.json" for d in there)}
    assert {p.name for p in request_.out.iterdir()} == names


def test_it_goes_on_from_what_is_there(request_: RunRequest) -> None:
    before = search(request_, 4, 16, 2.0, lambda p: None)
    assert before.dimension is None
    assert [p.dimension for p in before.points] == [16]
    (request_.out / "16.json").write_text(json.dumps({"loss": before.base_loss}))
    again = search(request_, 4, 16, 2.0, lambda p: None)
    assert (again.points[0].reached, again.full_loss) == (0.0, before.full_loss)
    with pytest.raises(LorafoldError, match="another search with other values of data; choose"):
        search(replace(request_, rows=ROWS[:2]), 4, 16, 2.0, lambda p: None)


def test_a_directory_of_something_else_is_left_alone(request_: RunRequest) -> None:
    request_.out.mkdir()
    (request_.out / "mine.txt").write_text("x")
    with pytest.raises(LorafoldError, match="found files that are not from a search"):
        search(request_, 4, 16, 0.9, lambda p: None)
    assert [p.name for p in request_.out.iterdir()] == ["mine.txt"]


def test_the_base_has_the_loss_of_the_objective(request_: RunRequest) -> None:
    """Before the first step: log 2 of pairs, and of classes that of the head that runs draw."""
    pairs = [row | {"chosen": row["completion"], "rejected": " no"} for row in ROWS]
    pairs = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in pairs]
    recipe = request_.recipe.model_copy(update={"objective": "dpo"})
    found = base_model_loss(replace(request_, rows=pairs, eval_rows=pairs), recipe).loss
    assert found == pytest.approx(math.log(2), abs=1e-6)
    rows = [{"text": row["prompt"], "label": row["completion"][1:]} for row in ROWS]
    recipe = request_.recipe.model_copy(update={"objective": "classify", "seed": 3})
    plain = request_.base.stored("fp32")
    found = base_model_loss(replace(request_, base=plain, rows=rows, eval_rows=rows), recipe).loss
    source, tokenizer = request_.base.source, request_.base.tokenizer()
    classes = tuple(sorted({row["label"] for row in rows}))
    model = load_classifier(source, classes, tokenizer.pad_token_id, torch.float32, seed=3)
    expected = evaluate(model, tokenizer, rows, 32).loss
    assert found == pytest.approx(expected, rel=1e-5)


def test_tokens_that_the_base_does_not_have_are_refused(request_: RunRequest) -> None:
    recipe = request_.recipe.model_copy(update={"new_tokens": ("<a>",)})
    with pytest.raises(LorafoldError, match="recipe: new_tokens: found <a>, expected none"):
        search(replace(request_, recipe=recipe), 4, 16, 0.9, lambda p: None)
