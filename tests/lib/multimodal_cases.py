"""Directories of tiny models that take images or sounds beside text."""

from __future__ import annotations

from pathlib import Path

import torch

from architectures import ARCHITECTURES
from conftest import make_tokenizer


def write(name: str, path: Path, **text: int) -> Path:
    """Write the model of that name, with a tokenizer, whose ids are below those of images."""
    row, tokenizer = ARCHITECTURES[name], make_tokenizer()
    config = row.config()
    own = config.get_text_config()
    for field, value in text.items():
        setattr(own, field, value)
    own.vocab_size = len(tokenizer) + 8
    own.bos_token_id, own.eos_token_id = None, tokenizer.eos_token_id
    own.pad_token_id = tokenizer.pad_token_id
    for field in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index"):
        if hasattr(config, field):
            setattr(config, field, len(tokenizer) + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        row.cls(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
