"""Files written by PEFT and read by it, and how far apart two logits are."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import lorafold as lf
from lorafold.core.spec import Spec

CLOSE = 1e-5
# our spec, and PEFT's config of the same
PAIRS: dict[str, tuple[Spec, peft.PeftConfig]] = {
    "dora": (
        lf.DoRA(lf.LoRA(rank=4, alpha=6)),
        peft.LoraConfig(r=4, lora_alpha=6, use_dora=True),
    ),
    "adalora": (
        lf.AdaLoRA(rank=3, init_rank=4, alpha=6),
        peft.AdaLoraConfig(target_r=3, init_r=4, lora_alpha=6, total_step=10),
    ),
    "loha": (lf.LoHa(rank=3, alpha=5), peft.LoHaConfig(r=3, alpha=5)),
    "lokr-both": (
        lf.LoKr(rank=1, decompose_both=True, decompose_factor=8),
        peft.LoKrConfig(r=1, alpha=1, decompose_both=True, decompose_factor=8),
    ),
    "lokr-whole": (lf.LoKr(rank=8, alpha=3), peft.LoKrConfig(r=8, alpha=3)),
}


def ids() -> torch.Tensor:
    return torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=ids()).logits.float()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def noise(a: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error, relative: in half precision the largest error of a few thousand
    logits is a matter of luck.
    """
    return ((a - exact).square().mean() / exact.square().mean()).sqrt().item()


def move(parameters: Any) -> None:
    """A random step from the start, so that B is not zero and every trained tensor matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p))


def made_by_peft(model: Any, config: peft.PeftConfig) -> Any:
    """PEFT's adapter on a model, moved from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    move(p for p in wrapped.parameters() if p.requires_grad)
    return wrapped


def moved(model: Any, spec: Any, targets: Any = None, **options: Any) -> lf.Adapter:
    """An adapter of ours on a model, moved from its start."""
    adapter = lf.attach(model, spec, targets, **options)
    move(adapter.parameters())
    return adapter


def save_theirs(wrapped: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the embeddings too
        wrapped.save_pretrained(path)


def load_theirs(model: Any, path: Path, *expected: str) -> Any:
    """PEFT's reading, in which a warning of missing or unexpected keys or unknown config fields is
    an error, unless it has one of the expected texts.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = ("is_gradient_checkpointing", "tie_word_embeddings", "fan_in_fan_out")
        for text in (*usual, *expected):
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        return peft.PeftModel.from_pretrained(model, path)
