"""The score of each document from a head on top of the decoder, for reward models.

    r_i = head(h_e),      e the last position of document i that is not a padding token

transformers' classifiers read the same position, so they give the same scores, packed or padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafold.data.examples import NO_LOSS
from lorafold.errors import LorafoldError
from lorafold.models.classifier import head_paths


class HeadTensors(NamedTuple):
    """The input (B, T, d) and the output (B, T, c) of a model's head at every position."""

    hidden: Tensor
    output: Tensor


def run_to_head(model: Any, inputs: Mapping[str, Tensor]) -> HeadTensors:
    """Runs the model on inputs (B, T), and returns the input and the output of its head."""
    paths, shape = head_paths(model), inputs["input_ids"].shape
    head = model.get_submodule(paths[0])
    captured = []

    def capture(module: nn.Module, args: Any, output: Tensor) -> None:
        captured.append(HeadTensors(args[0], output))

    with head.register_forward_hook(capture):
        model(**inputs, use_cache=False)
    if len(paths) > 1 or [one.hidden.shape[:2] for one in captured] != [shape]:
        raise LorafoldError(
            f"{type(model).__name__}: found the heads {', '.join(paths)}, expected one that is"
            " computed at every position"
        )
    return captured[0]


def document_scores(
    model: Any, labels: Tensor, inputs: Mapping[str, Tensor], document: Tensor, n: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """The fp32 score of each of n documents, (n,), and its number of labelled positions, (n,).
    labels, inputs and document are (B, T).
    """
    of, ids = document.flatten(), inputs["input_ids"].flatten()
    counts = of.new_zeros(n).index_add(0, of, (labels.flatten() != NO_LOSS).to(of.dtype))
    if "position_ids" not in inputs:  # padded: the model finds the positions itself
        return model(**inputs, use_cache=False).logits[:, 0].float(), counts
    at = torch.arange(len(of), device=of.device)
    first = at.new_full((n,), len(at)).scatter_reduce(0, of, at, "amin")
    last = first.scatter_reduce(0, of, at.where(ids != pad_id, 0), "amax")
    return run_to_head(model, inputs).output.flatten(0, 1)[last, 0].float(), counts
