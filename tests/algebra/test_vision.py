"""A vision transformer: its input embedding is patches, which are no vocabulary."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import lorafold as lf
from lorafold.core.anatomy import Anatomy

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 2])


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**size, **shape)).eval()


def logits(model: ViTForImageClassification) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=IMAGES).logits


@pytest.mark.parametrize("saved", [(), ("classifier",)])
@pytest.mark.parametrize("spec", [lf.LoRA(rank=2), lf.DoRA(), lf.LoHa()], ids=repr)
def test_it_trains_saves_loads_and_merges(spec, saved: tuple[str, ...], tmp_path: Path) -> None:
    model = vit()
    bare = logits(model)
    adapter = lf.attach(model, spec, modules_to_save=saved)
    assert not Anatomy.of(model).vocabulary_ends
    assert torch.allclose(logits(model), bare, atol=1e-6)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(pixel_values=IMAGES, labels=LABELS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    y = logits(model)
    adapter.save(tmp_path / "adapter")
    other = vit()
    again = lf.load(other, tmp_path / "adapter")
    assert torch.equal(logits(other), y)
    again.merge()
    assert (logits(other) - y).norm() <= 1e-5 * y.norm()
    with lf.only(model):
        assert torch.equal(logits(model), bare)


def test_ids_of_tokens_are_refused_by_what_has_no_vocabulary() -> None:
    with pytest.raises(lf.LorafoldError, match="does not say which module its embedding is"):
        lf.attach(vit(), lf.LoRA(rank=2), tokens=(1, 2))
