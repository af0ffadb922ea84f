"""The tensors of an attached adapter by their keys in PEFT's file, and checks of the tensors in a
file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.delta import Delta
from lorafold.core.expert_matrices import module_at
from lorafold.errors import LorafoldError
from lorafold.layers import layer_class
from lorafold.layers.convolution import Convolution
from lorafold.models import fingerprint
from lorafold.models.weights import Weights
from lorafold.peft import derived
from lorafold.peft.form import count_wrappers, exchanges_sides
from lorafold.peft.table import TENSORS
from lorafold.peft.table_lora import PARAMETER_DELTAS
from lorafold.peft.table_types import ROOT, FileTensor, TargetModule, Tensors
from lorafold.peft.tokens import base_key

Parts = Mapping[str, Sequence[Delta]]  # module path -> the deltas attached there


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a delta (any shape) and its entry in the file."""

    site: TargetModule
    entry: FileTensor
    parameter: Tensor

    def encoded(self) -> Tensor:
        """The tensor (any shape) as it is stored in the file: in fp32, or as integers."""
        tensor, to_file = self.parameter.detach(), self.entry.to_file
        tensor = to_file(tensor, self.site) if to_file else tensor
        return tensor.float() if tensor.is_floating_point() else tensor

    def assign(self, tensor: Tensor) -> None:
        """Replaces the delta's tensor by a copy of the file's tensor (any shape), in the delta's
        dtype and on its device (the CPU for meta).
        """
        own, from_file = self.parameter, self.entry.from_file
        tensor = from_file(tensor, self.site) if from_file else tensor
        value = tensor.to("cpu" if own.is_meta else own.device, own.dtype, copy=True)
        if isinstance(own, nn.Parameter):
            value = nn.Parameter(value, own.requires_grad)
        path, _, name = self.entry.attribute.rpartition(".")
        setattr(self.site.delta.get_submodule(path), name, value)

    def problem(self, key: str, tensor: Tensor, file: Tensors) -> str | None:
        """An error message for the file's tensor (any shape), or None."""
        if self.entry.check is not None:
            wrong = self.entry.check(tensor, self.site, file)
            return nonfinite_problem(key, tensor) if wrong is None else f"{key}: {wrong}"
        own = self.encoded()
        floating = tensor.is_floating_point() and own.is_floating_point()
        if tensor.shape != own.shape:
            return f"{key}: shape {list(tensor.shape)}, expected {list(own.shape)}"
        if tensor.dtype != own.dtype and not floating:
            wanted = "a floating-point dtype" if own.is_floating_point() else own.dtype
            return f"{key}: dtype {tensor.dtype}, expected {wanted}"
        return nonfinite_problem(key, tensor)


def saved_tensors(sites: Iterable[TargetModule]) -> dict[str, SavedTensor]:
    """All tensors of the deltas by their keys in the file. Tensors that deltas share have one key.
    """
    tensors = {}
    for site in sites:
        delta, entries = site.delta, TENSORS.get(type(site.delta), derived.derived_tensors)(site)
        stored = {entry.attribute for entry in entries}
        if missing := delta.state_dict().keys() - stored - set(delta.run_names):
            raise LorafoldError(
                f"{site.path}: PEFT's format can't store"
                f" {', '.join(sorted(missing))} of {type(delta).__name__}"
            )
        under = f"{site.at}.base_layer" if site.target else site.at
        for entry in entries:
            key = entry.template.format(at=site.at, under=under)
            tensors[key] = SavedTensor(site, entry, attrgetter(entry.attribute)(delta))
    return tensors


def sites_of(
    model: nn.Module, parts: Parts, targets: Sequence[str], base: Weights
) -> list[TargetModule]:
    """The target modules of an adapter, one for each delta."""
    sites, num_wrappers = [], count_wrappers(model, targets)
    for path, deltas in parts.items():
        module: Any = module_at(model, path)
        layer = layer_class(module)
        window = module.kernel_size if issubclass(layer, Convolution) else ()
        for delta in deltas:
            wrappers = num_wrappers.get(path) if isinstance(delta, PARAMETER_DELTAS) else None
            at, exchanged = f"{ROOT}.{path}", False
            if wrappers is not None:
                at = f"{ROOT}.{path.rpartition('.')[0]}{'.base_layer' * wrappers}"
                exchanged = exchanges_sides(module)
            target = path in targets
            sites.append(
                TargetModule(path, delta, layer, target, base, at, wrappers, window, exchanged)
            )
    return sites


def nonfinite_problem(key: str, tensor: Tensor) -> str | None:
    """An error message if a tensor (any shape) has values that are not finite, or None."""
    if math.isfinite(tensor.detach().sum()):
        return None
    count = tensor.numel() - int(torch.isfinite(tensor).sum())
    return f"{key}: {count} of {tensor.numel()} values are not finite" if count else None


def key_problem(key: str, stored: Weights, base: Weights) -> str | None:
    """An error message for a tensor that belongs to no delta. The result is None if the tensor is a
    copy of a base weight or of another tensor, because PEFT saves some copies. In a copy of a
    replaced module, rows at the end may differ, because PEFT initializes new rows randomly.
    """
    tensor, plain = stored.get(key), key.replace(".modules_to_save.", ".")
    if plain != key and plain in stored.names and torch.equal(tensor, stored.get(plain)):
        return None
    own = base.find(base_key(key).removeprefix(f"{ROOT}."))
    if own is None or not tensor.is_floating_point():
        return f"unknown key {key}"
    replaced = key.replace(".original_module.", ".modules_to_save.")
    whole = replaced != key and replaced in stored.names
    rows = base.shape(own)[0]
    if whole and len(tensor) > rows and base.shape(own)[1:] == tuple(tensor.shape[1:]):
        return (
            f"{key}: {len(tensor):,} rows, but this base has {rows:,}; the adapter was trained on a"
            " base with new tokens, so extend this one with transformers'"
            f" resize_token_embeddings({len(tensor)}) and save_pretrained"
        )
    if base.shape(own) != tuple(tensor.shape):
        return (
            f"{key}: a base weight of shape {list(tensor.shape)}, but this base's has shape"
            f" {list(base.shape(own))}"
        )
    differs = ~fingerprint.elements_equal(tensor, base.get(own)).reshape(rows, -1).all(1)
    first = differs.nonzero().flatten().tolist()[:1]
    # accept rows that differ only at the end
    if not first or (whole and 2 * first[0] > rows):
        return None
    return f"{key}: a base weight that differs from this base's"
