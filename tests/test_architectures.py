"""Every architecture of the table, adapted: the bare base stays what it is, every part of the
adapter matters, merging equals calling, and PEFT computes the same from the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorafold as lf
from architectures import ARCHITECTURES, ENCODERS, MIXTURES, MULTIMODAL, RECURRENT, TEXT, run
from lorafold.core.anatomy import bare_modules, blocks
from lorafold.core.towers import aside, language_model, towers
from lorafold.step.documents import isolates

NAMES = list(ARCHITECTURES)


def moved(model: nn.Module, **options: Any) -> lf.Adapter:
    """An adapter of the default targets, with every parameter drawn."""
    adapter = lf.attach(model, lf.LoRA(rank=4, dropout=0.0), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_changes_nothing_and_the_base_stays_bit_for_bit(name: str) -> None:
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    with torch.no_grad():
        bare = run(model, inputs)
        assert bare.std() > 0.01
        adapter = lf.attach(model, lf.LoRA(rank=4))
        assert near(run(model, inputs), bare)
        adapter.detach()
        moved(model)
        assert (run(model, inputs) - bare).norm() > 1e-2 * bare.norm()
        with lf.only(model):
            assert torch.equal(run(model, inputs), bare)


@pytest.mark.parametrize("name", NAMES)
def test_every_adapted_module_has_its_gradient(name: str) -> None:
    """A module whose forward the model bypasses would have none."""
    row = ARCHITECTURES[name]
    model = row.model()
    adapter = moved(model)
    y = run(model, row.inputs())
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    lost = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert lost == []


@pytest.mark.parametrize("name", NAMES)
def test_merging_equals_calling(name: str) -> None:
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    adapter = moved(model)
    with torch.no_grad():
        y = run(model, inputs)
        adapter.merge()
        assert near(run(model, inputs), y)
    assert not [n for n, _ in model.named_parameters() if "deltas" in n]


def peft_has(name: str, model: nn.Module) -> list[str]:
    """The default targets, without those that PEFT does not adapt in this model."""
    adapter = lf.attach(model, lf.LoRA(rank=1))
    sites = sorted(adapter.sites)
    adapter.detach()
    return [p for p in sites if p.rsplit(".", 1)[-1] not in ARCHITECTURES[name].not_in_peft]


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_same_from_our_file(name: str, tmp_path: Path) -> None:
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    adapter = moved(model, targets=peft_has(name, model))
    with torch.no_grad():
        y = run(model, inputs)
        adapter.save(tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(row.model(), tmp_path / "ours").eval()
        assert near(run(theirs, inputs), y)


@pytest.mark.parametrize("name", NAMES)
def test_we_compute_the_same_from_peft_s_file(name: str, tmp_path: Path) -> None:
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    targets = peft_has(name, model)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(row.model(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    lf.load(model, tmp_path / "theirs")
    with torch.no_grad():
        assert near(run(model, inputs), run(theirs, inputs))
