"""What exports for servers of PEFT's adapters have in common: the canonical files, and what is told
about the base and the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lorafold.bases import layer_of
from lorafold.core.matrices import module_at
from lorafold.exporting.canonical import FILES, write_canonical
from lorafold.exporting.elsewhere import TEMPLATE, Elsewhere, elsewhere, write_template
from lorafold.exporting.target import Subject
from lorafold.exporting.update import Factors

ADAPTER = "adapter"
FORM = "a server's plain LoRA"
HEADS = ("embed_tokens", "lm_head")


def tied_heads(subject: Subject) -> list[str]:
    """The sites at an embedding and a head that share one weight, which servers treat as one."""
    if not getattr(subject.config.get_text_config(), "tie_word_embeddings", False):
        return []
    return [path for path in subject.update.factors if last(path) in HEADS]


def last(path: str) -> str:
    """The last part of a module path."""
    return path.rsplit(".", 1)[-1]


def write_files(
    subject: Subject, factors: Mapping[str, Factors], directory: Path
) -> tuple[Elsewhere, tuple[str, ...], tuple[str, ...]]:
    """Write the canonical adapter and, where it is another than the base's, the chat template.

    Returns the base as a server finds it, the files, and the arguments of both for its command.
    """
    write_canonical(subject.base, factors, directory / ADAPTER)
    base, template = elsewhere(subject.base), write_template(subject, directory)
    files = (*(f"{ADAPTER}/{name}" for name in FILES), *[TEMPLATE] * template)
    options = ["--revision", base.revision] if base.revision else []
    options += ["--chat-template", f"{{out}}/{TEMPLATE}"] * template
    return base, files, tuple(options)


def zeros(subject: Subject, path: str) -> Factors:
    """The factors, of rank 1, of no change at a site."""
    layer = layer_of(module_at(subject.model, path))
    outputs, inputs = layer.shape
    return torch.zeros(*layer.matrices, outputs, 1), torch.zeros(*layer.matrices, 1, inputs)
