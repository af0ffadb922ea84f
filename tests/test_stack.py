"""A stack of adapters is an artefact: what one is trained over stands in its record, is never
moved, and is asked for again when it is loaded.
"""

from itertools import product
from pathlib import Path

import pytest
import torch

import lorafold as lf
from lorafold.core.attach import selection_of
from lorafold.files.record import read_record
from lorafold.models.loading import load_model
from lorafold.step.recipe import Recipe
from lorafold.training import run, setup
from lorafold.training.request import Request
from test_train import ROWS, quiet

IDS = torch.arange(5, 29).view(2, 12)
TRAINED = {"steps": 4, "batch": 4, "base": "fp32", "lr": 1e-2}


def request(model: Path, out: Path, over: tuple[Path, ...] = (), **fields) -> Request:
    extra = {
        k: fields.pop(k) for k in ("resume", "overwrite", "init_adapter") if k in fields
    }
    recipe = Recipe(**TRAINED | fields)
    return Request(str(model), out, recipe, ROWS, "rows", device="cpu", over=over, **extra)


def trained(model: Path, out: Path, over: tuple[Path, ...] = (), **fields) -> Path:
    run.train(request(model, out, over, **fields), quiet())
    return out


def stacked(model: Path, *adapters: Path):
    loaded = load_model(model, torch.float32)
    for n, path in enumerate(adapters):
        lf.load(loaded, path, f"a{n}")
    return loaded


@torch.no_grad()
def logits(model) -> torch.Tensor:  # (2, 12, vocabulary)
    return model(input_ids=IDS).logits


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.fixture(scope="module")
def base(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def sft(base: Path, tmp_path_factory) -> Path:
    return trained(base, tmp_path_factory.mktemp("stack") / "sft")


@pytest.fixture(scope="module")
def dpo(base: Path, sft: Path) -> Path:
    """An adapter over `sft`."""
    return trained(base, sft.with_name("dpo"), (sft,), seed=1)


METHODS = ("lora", "dora", "ia3", "loha")


def test_what_it_lies_over_stands_in_its_record_and_is_not_moved(
    base: Path, sft: Path, tmp_path: Path
) -> None:
    before = files(sft)
    dpo = trained(base, tmp_path / "dpo", (sft,))
    assert files(sft) == before
    [below] = read_record(dpo)["over"]
    assert below["adapter"] == str(sft)
    assert len(below["sha256"]) == 64
    assert "over" not in read_record(sft)


def test_the_model_that_is_trained_asks_for_the_ones_below_by_name(
    base: Path, sft: Path, tmp_path: Path
) -> None:
    asked = setup.set_up(request(base, tmp_path / "dpo", (sft,)), quiet())
    model, adapter, _, _ = setup.adapted_model(asked, quiet())
    assert asked.request.below == ("over1",)
    assert selection_of(model).names == ("over1", "default")
    with lf.only(model, *asked.request.below):
        assert torch.equal(logits(model), logits(stacked(base, sft)))
    assert f"over: {sft} (" in repr(adapter)
    trains = {id(p) for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trains


@pytest.mark.parametrize(("below", "above"), list(product(METHODS, METHODS)))
def test_folding_a_stack_equals_calling_it(
    below: str, above: str, base: Path, tmp_path: Path
) -> None:
    first = trained(base, tmp_path / "first", method=below)
    second = trained(base, tmp_path / "second", (first,), method=above)
    model = stacked(base, first, second)
    called = logits(model)
    with lf.only(model, "a0"):
        assert not torch.allclose(called, logits(model), atol=1e-5)
    merged = tmp_path / "merged"
    lf.merge(base, [first, second], merged)
    torch.testing.assert_close(logits(load_model(merged, torch.float32)), called)
