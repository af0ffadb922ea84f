"""What is wrong with the tensors of a file, one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorafold.models import fingerprint
from lorafold.models.weights import Weights
from lorafold.peft.format import ROOT
from lorafold.peft.tensors import SavedTensor
from lorafold.peft.tokens import plain as plainly


def misfit(
    key: str, tensor: Tensor, saved: SavedTensor, file: Mapping[str, Tensor]
) -> str | None:
    """What is wrong with a tensor of the file, of any shape, or None.

    Args:
        key: Its key in the file.
        saved: The adapter's own tensor of this key.
        file: All tensors of the file that belong to the adapter.
    """
    if saved.entry.misfit is not None:
        wrong = saved.entry.misfit(tensor, saved.site, file)
        return not_finite(key, tensor) if wrong is None else f"{key}: {wrong}"
    own = saved.encoded()
    if tensor.shape != own.shape:
        return f"{key}: shape {list(tensor.shape)}, expected {list(own.shape)}"
    if tensor.dtype != own.dtype and not (tensor.is_floating_point() and own.is_floating_point()):
        wanted = "a floating-point dtype" if own.is_floating_point() else own.dtype
        return f"{key}: dtype {tensor.dtype}, expected {wanted}"
    return not_finite(key, tensor)


def not_finite(key: str, tensor: Tensor) -> str | None:
    """What says that a tensor, of any shape, has values that are not finite, or None."""
    if math.isfinite(tensor.detach().sum()):
        return None
    count = tensor.numel() - int(torch.isfinite(tensor).sum())
    return f"{key}: {count} of {tensor.numel()} values are not finite" if count else None


def stray(key: str, stored: Weights, base: Weights) -> str | None:
    """What is wrong with a tensor that belongs to no delta, or None if it is a copy of a base
    weight or of another tensor of the file, as PEFT saves some. What the adapter replaces whole may
    end with other rows than the base's: a vocabulary's new ones begin at random.

    Args:
        key: Its key in the file.
        stored: The tensors of the file.
    """
    tensor, plain = stored.get(key), key.replace(".modules_to_save.", ".")
    if plain != key and plain in stored.names and torch.equal(tensor, stored.get(plain)):
        return None
    own = base.find(plainly(key).removeprefix(f"{ROOT}."))
    if own is None or not tensor.is_floating_point():
        return f"unknown key {key}"
    replaced = key.replace(".original_module.", ".modules_to_save.")
    whole = replaced != key and replaced in stored.names
    rows = base.shape(own)[0]
    if whole and len(tensor) > rows and base.shape(own)[1:] == tuple(tensor.shape[1:]):
        return (
            f"{key}: {len(tensor):,} rows, where this base has {rows:,}: it was trained over a base"
            f" with rows for new tokens, which transformers' resize_token_embeddings({len(tensor)})"
            " and save_pretrained make of this one"
        )
    if base.shape(own) != tuple(tensor.shape):
        return (
            f"{key}: a base weight of shape {list(tensor.shape)}, where this base has"
            f" {list(base.shape(own))}"
        )
    return (
        None
        if fingerprint.same(tensor, base.get(own)) or (whole and _begins(tensor, base.get(own)))
        else f"{key}: a base weight that differs from this base's"
    )


def _begins(tensor: Tensor, own: Tensor) -> bool:  # (rows, columns), both
    """Whether most rows are the same, and those that differ are at the end."""
    differs = (~fingerprint.equal(tensor, own).flatten(1).all(1)).nonzero().flatten().tolist()
    return not differs or 2 * differs[0] > len(own)
