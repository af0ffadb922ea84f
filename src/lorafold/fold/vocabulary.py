"""The vocabulary of a model whose embedding and head have gained rows: what a plain model says of
it, and that it has one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafold.core.anatomy import vocabulary_ends
from lorafold.core.layer import bare
from lorafold.errors import NotMergeable


def grown(model: Any, rows: Mapping[str, int]) -> int | None:
    """The vocabulary of the model once the modules at these paths have that many rows; None where
    it stays what it is.

    A model that does not say where its embeddings are has none to tell. NotMergeable if embedding
    and head would differ.
    """
    ends: dict[str, Any] = {p: bare(model.get_submodule(p)) for p in vocabulary_ends(model)}
    before = {path: len(end.weight) for path, end in ends.items()}
    after = {path: rows.get(path, n) for path, n in before.items()}
    if after == before:
        return None
    if len(set(after.values())) > 1:
        sizes = ", ".join(f"{path} has {n} rows" for path, n in after.items())
        raise NotMergeable(
            f"embedding and head of a plain model have one vocabulary: {sizes}; train the new"
            " tokens' rows in both"
        )
    return max(after.values())


def declare(model: Any, size: int) -> None:
    """Say in the model and its config that the vocabulary has this size."""
    config = model.config.get_text_config()
    for part in model.modules():
        if getattr(part, "vocab_size", None) == config.vocab_size:
            part.vocab_size = size
    config.vocab_size = size


