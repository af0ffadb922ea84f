"""Adapters that change a model, saved, and the logits of models with and without them."""

import shutil
from pathlib import Path

import torch

import lorafold as lf
from fresh_models import fresh_model
from lorafold.models.loading import load_model

IDS = torch.arange(3, 43).view(1, -1)


@torch.no_grad()
def logits(model) -> torch.Tensor:  # (T, vocabulary)
    return model(input_ids=IDS, use_cache=False).logits[0].float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def make_adapter(
    model_dir: Path, path: Path, size: float = 0.1, seed: int = 0, spec=None, **options
) -> Path:
    """An adapter whose every parameter is drawn at random, saved."""
    model = fresh_model(model_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = lf.attach(model, spec or lf.LoRA(rank=4), **options)
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.data += size * torch.randn(p.shape, generator=generator)
    adapter.save(path)
    return path


def adapted_logits(model_dir: Path, *adapters: Path) -> torch.Tensor:
    model = fresh_model(model_dir)
    for i, path in enumerate(adapters):
        lf.load(model, path, f"a{i}")
    return logits(model)


def differs(merged: Path, base: Path, *adapters: Path) -> float:
    """How far the model of a directory is from the base with the adapters on it."""
    return relative(logits(load_model(merged, torch.float32)), adapted_logits(base, *adapters))


def resaved(model_dir: Path, path: Path, dtype: torch.dtype = torch.float32, **how) -> Path:
    """The model in another dtype or in shards, beside its tokenizer."""
    shutil.copytree(
        model_dir, path, ignore=lambda _, names: [n for n in names if "safetensors" in n]
    )
    load_model(model_dir, dtype).save_pretrained(path, **how)
    return path
