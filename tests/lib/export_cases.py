"""What tests of exports share: adapters whose update is not small, and where engines are."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf

PYTHONS = {"mlx": "LORAFOLD_MLX_PYTHON", "vllm": "LORAFOLD_VLLM_PYTHON"}
MODULES = {"mlx": "mlx_lm", "vllm": "vllm"}


def python_of(engine: str) -> str | None:
    """The Python that has an engine, None for this one; without any the test is skipped."""
    if (named := os.environ.get(PYTHONS[engine])) is not None:
        return named
    if find_spec(MODULES[engine]) is None:
        pytest.skip(f"{MODULES[engine]} is not installed, and {PYTHONS[engine]} names no Python")
    return None


def noisy(model: Any, spec: Any, path: Path, std: float = 0.3, **beside: Any) -> Path:
    """Save an adapter of the model, with noise on all that it trains."""
    made = lf.attach(model, spec, name="one", **beside)
    torch.manual_seed(0)
    for p in made.parameters():
        p.data += std * torch.randn_like(p)
    saved: Path = made.save(path)
    return saved


def proof_of(done: Any, share: float | None = 1e-4) -> Any:
    """The proof of an export, of which at most a share differs."""
    assert done.proof is not None
    assert done.proof.share is not None
    assert share is None or done.proof.share < share
    return done.proof


def with_tokenizer(model: Any, tokenizer: Any, path: Path) -> Path:
    """Write a model and a tokenizer as a directory."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    return load_file(path)


def changes(model: Any, merged: Any, sites: list[str]) -> dict[str, torch.Tensor]:
    """What merging changed at each site, which may be a parameter of experts."""
    before, after = dict(model.named_parameters()), dict(merged.named_parameters())

    def at(found: dict[str, Any], site: str) -> torch.Tensor:
        return found[site] if site in found else found[f"{site}.weight"]

    return {site: (at(after, site) - at(before, site)).detach() for site in sites}
