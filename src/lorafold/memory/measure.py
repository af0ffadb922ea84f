"""Measures the memory of a model and a step on a device, to check an estimate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.data.classification import LabelledExample
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.preference_examples import BranchedRow
from lorafold.memory.trace import Ledger, MemorySetting, attach_below, distinct_bytes
from lorafold.ops.arithmetic import override_widening
from lorafold.recipe.recipe import Recipe
from lorafold.training_step.classification_loss import Classification
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from lorafold.training_step.losses import CompletionLoss, Loss
from lorafold.training_step.optimizers import make_optimizer
from lorafold.training_step.packed_attention import packed
from lorafold.training_step.param_groups import sum_in_fp32
from lorafold.training_step.preference_algorithms import BradleyTerry
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(
    load: Callable[[], PreTrainedModel], setting: MemorySetting, device: torch.device
) -> int:
    """The peak bytes of the second of two training steps, or of inference, including the model."""
    # keeps existing tensors alive, because freeing them would change the difference
    existing, start = _live_tensors(), allocated(device)
    model = load()
    run = inference if setting.spec is None else training
    with override_widening(widened=setting.widened), run(model, setting) as step:
        peak = peak_of(step, device) - start
    del existing
    return peak


@contextmanager
def training(model: PreTrainedModel, setting: MemorySetting) -> Iterator[Callable[[], Any]]:
    """Yields a training step with every feature of a run, after one step that creates the optimizer
    state.
    """
    attach_below(model, setting)
    setting.attach(model)
    sum_in_fp32(model)
    if setting.checkpointing:
        enable_gradient_checkpointing(model)
    optimizer = make_optimizer(
        setting.optimizer,
        [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0}],
        Recipe(),
    )
    with fused(model), loss_of(model, setting) as loss:
        inputs = loss.collate(examples(model, setting), model.device)
        loss.train()

        def step() -> None:
            for _ in range(1 + setting.accumulating):
                loss(**inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        yield step


@contextmanager
def inference(model: PreTrainedModel, setting: MemorySetting) -> Iterator[Callable[[], Any]]:
    prompt, token = (
        torch.ones(setting.batch, n, dtype=torch.long, device=model.device)
        for n in (setting.length - 1, 1)
    )

    @torch.no_grad()
    def generate() -> None:
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).cache
        model(input_ids=token, cache=cache, use_cache=True)

    yield generate


@contextmanager
def loss_of(model: PreTrainedModel, setting: MemorySetting) -> Iterator[Loss]:
    if not setting.packed:
        yield Classification(model, 0) if setting.classes else CompletionLoss(model, False, 0)
    elif setting.classes:
        with sharing_prefixes(model) as support:
            yield Preferences(model, BradleyTerry(), support, 0)
    else:
        with packed(model) as packs:
            yield CompletionLoss(model, packs, 0)


def examples(model: PreTrainedModel, setting: MemorySetting) -> list[Any]:
    """Examples of random tokens with the setting's lengths. The last tokens of each are labelled.
    """
    vocabulary = model.config.get_text_config().vocab_size
    rows = [tuple(torch.randint(1, vocabulary, (n,)).tolist()) for n in setting.rows]
    if setting.classes and setting.packed:  # pairs of documents without a shared prefix
        whole = [Example(row, row) for row in rows]
        return [BranchedRow((), pair) for pair in zip(whole[::2], whole[1::2], strict=True)]
    if setting.classes:
        return [LabelledExample(row, 0) for row in rows]
    num_labelled, found = sum(setting.rows) if setting.labelled is None else setting.labelled, []
    for i, row in enumerate(rows):
        n = min(len(row) - 1, -(-num_labelled // (len(rows) - i)))
        found.append(Example(row, (NO_LOSS,) * (len(row) - n) + row[len(row) - n :]))
        num_labelled -= n
    return found


def allocated(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    tensors = (t for t in _live_tensors() if t.device.type == device.type)
    return distinct_bytes(t for t in tensors if t.layout is torch.strided)


def _live_tensors() -> list[Tensor]:
    aside = gc.get_freeze_count()
    gc.unfreeze()  # frozen objects (`runtime.process_tuning`) would not be listed
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    if aside:
        gc.freeze()
    return tensors


def peak_of(step: Callable[[], Any], device: torch.device) -> int:
    """Runs the step, and returns the peak bytes of all tensors, including those that existed
    before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    before = allocated(device)
    with Ledger() as ledger:
        step()
    return before + ledger.peak
