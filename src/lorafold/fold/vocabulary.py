"""The size of a model's vocabulary after new tokens have grown its embedding and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafold.core.anatomy import Anatomy
from lorafold.core.layer import bare
from lorafold.errors import NotMergeable


def grown(model: Any, rows: Mapping[str, int]) -> int | None:
    """The size of the vocabulary once the weights of the modules at these paths have that many
    rows; None if it does not change, or if the model does not say which modules its embeddings are.

    Raises NotMergeable if embedding and head would have different sizes.
    """
    paths = Anatomy.of(model).vocabulary_ends
    ends: dict[str, Any] = {path: bare(model.get_submodule(path)) for path in paths}
    before = {path: len(end.weight) for path, end in ends.items()}
    after = {path: rows.get(path, n) for path, n in before.items()}
    if after == before:
        return None
    if len(set(after.values())) > 1:
        sizes = ", ".join(f"{path} with {n} tokens" for path, n in after.items())
        raise NotMergeable(
            f"found {sizes}, expected one vocabulary for embedding and head; train the new tokens'"
            " rows in both"
        )
    return max(after.values())


def declare(model: Any, size: int) -> None:
    """Set the size of the vocabulary in the model and in its config."""
    config = model.config.get_text_config()
    for part in model.modules():
        if getattr(part, "vocab_size", None) == config.vocab_size:
            part.vocab_size = size
    config.vocab_size = size


