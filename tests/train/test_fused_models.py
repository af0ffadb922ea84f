"""Whole models while they are fused, and that they are themselves again afterwards."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lorafold as lf
from fused_cases import adapted, assert_same_step, model_of, seeded_step, together
from lorafold.data.batches import collate
from lorafold.methods import METHODS, make_spec
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.training_step.fused_modules import ROTARY, fused
from lorafold.training_step.gradient_checkpointing import recompute
from lorafold.training_step.packed_attention import packed
from sequence_cases import VOCAB, loss_and_gradients, rows

ALL = ("MLP", "norms", "rotary embedding")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "gpt2"]
LACKING: dict[str, tuple[str, ...]] = {"phi3": ("MLP",), "gpt2": ALL}


def apart() -> list[dict[str, Tensor]]:
    return [collate([row], packed=False, pad_id=0) for row in rows()]


def state(model: nn.Module) -> dict[str, Any]:
    """What `with fused` may not leave a trace in."""
    own = {name: (sorted(vars(m)), m.training, type(m)) for name, m in model.named_modules()}
    files = {type(m).__module__ for m in model.modules()}
    return own | {file: getattr(sys.modules[file], ROTARY, None) for file in files}


@contextmanager
def both(model: tf.PreTrainedModel) -> Iterator[None]:
    with fused(model), packed(model) as isolated:
        assert isolated
        yield


# --- what is fused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_and_the_model_before_and_after(name: str) -> None:
    model = model_of(name)
    adapted(model)
    # one block's mode is its own
    model.get_submodule(next(n for n, m in model.named_modules() if n.endswith(".0"))).eval()
    before, random = state(model), torch.get_rng_state()
    flags = [m.training for m in model.modules()]
    with fused(model) as found:
        lacking = LACKING.get(name, ())
        assert (found.fast, found.blocks, found.plain) == (0 if lacking else 2, 2, lacking)
        assert [m.training for m in model.modules()] == flags
        assert state(model) != before
        own = [path for path, module in model.named_modules() if "forward" in vars(module)]
        assert (own == ["lm_head"]) is (name == "gpt2")
    assert torch.equal(torch.get_rng_state(), random)
    assert state(model) == before
    words = f"; not fused: {', '.join(found.plain)}" if found.plain else ""
    assert str(found) == f"fast path: {found.fast} of 2 blocks{words}"


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = model_of("llama").requires_grad_(False)
    before = state(model)
    with pytest.raises(RuntimeError, match="in the middle"), fused(model):
        raise RuntimeError("in the middle")
    assert state(model) == before


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.few(5)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_each_document_alone(name: str) -> None:
    """Sequences are longer than the window of models that have one."""
    model = model_of(name)
    adapted(model, lf.LoRA(rank=4, dropout=0.0))
    expected = loss_and_gradients(model, apart())
    with both(model):
        assert_same_step(loss_and_gradients(model, together()), expected)
    assert_same_step(loss_and_gradients(model, apart()), expected)


# those are dense, and have a preparation
@pytest.mark.few(7)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lt-sft", "fish")])
def test_every_method_lies_over_it(method: str) -> None:
    """With the dropout that it has: fusing draws no random numbers of its own."""
    model = model_of("llama")
    adapted(model, make_spec(method))
    with packed(model) as isolated:
        assert isolated
        expected = seeded_step(model, together())
        with fused(model):
            assert_same_step(seeded_step(model, together()), expected)


@pytest.mark.few(7)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_in_bf16_it_errs_no_more_than_the_models_own_code(name: str) -> None:
    model = model_of(name).bfloat16().eval()
    exact = copy.deepcopy(model).double()
    errors: dict[str, list[float]] = {"own": [], "fused": []}
    with torch.no_grad():
        for seed in range(6):
            ids = torch.randint(1, VOCAB, (4, 24), generator=torch.Generator().manual_seed(seed))
            true = exact(input_ids=ids, use_cache=False).logits
            for form in errors:
                with ExitStack() as stack:
                    if form == "fused":
                        stack.enter_context(fused(model))
                    logits = model(input_ids=ids, use_cache=False).logits
                errors[form].append(((logits.double() - true).norm() / true.norm()).item())
    assert 1e-4 < sum(errors["fused"]) <= 1.05 * sum(errors["own"])


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_inside_is_bit_equal(dtype: torch.dtype) -> None:
    found = []
    for checkpointed in (False, True):
        model = model_of("llama").to(dtype)
        adapted(model)
        if checkpointed:
            recompute(model)
        with both(model):
            found.append(seeded_step(model, together()))
    (loss, grads), (again, replayed) = found
    assert torch.equal(loss, again)
    assert grads.keys() == replayed.keys()
    assert all(torch.equal(g, replayed[name]) for name, g in grads.items())


# --- several models, packed bases, no blocks -----------------------------------------------------


@pytest.mark.parametrize("other", ["llama", "gemma"])
def test_two_models_nest(other: str) -> None:
    models = [model_of("llama"), model_of(other)]
    for model in models:
        adapted(model)
    before = [state(model) for model in models]
    expected = [seeded_step(model, together()) for model in models]
    with fused(models[0]) as outer:
        with fused(models[1]) as inner:
            assert outer.fast == inner.fast == 2
            for model, step in zip(models, expected, strict=True):
                assert_same_step(seeded_step(model, together()), step)
        assert_same_step(seeded_step(models[0], together()), expected[0])
        assert ("forward" in vars(models[1].model.layers[0].mlp)) is False
    assert [state(model) for model in models] == before


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_base(kind: str, targets: str, tiny_model_dir: Any) -> None:
    """Its MLPs hold no floating-point parameter where no delta lies on them."""
    model = load_model(tiny_model_dir("llama-wide"), Storage(torch.bfloat16, kind)).train()
    adapted(model, lf.LoRA(rank=4), targets=targets)
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        own = model.eval()(input_ids=ids, use_cache=False).logits
        with fused(model) as found:
            logits = model(input_ids=ids, use_cache=False).logits
    assert (found.fast, found.blocks) == (2, 2)
    assert (logits - own).float().norm() <= 0.02 * own.float().norm()


def test_a_model_without_blocks_is_no_error() -> None:
    with fused(nn.Sequential(nn.Linear(4, 4))) as found:
        assert (found.fast, found.blocks) == (0, 0)
