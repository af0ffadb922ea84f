"""Where each tensor of an adapter lies: in the model and in PEFT's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lorafold.bases import layer_class
from lorafold.core.delta import Delta
from lorafold.models.weights import Weights
from lorafold.peft.format import Entry, Site
from lorafold.peft.table import entries_of

Parts = Mapping[str, Sequence[Delta]]  # module path -> the deltas laid there


@dataclass(frozen=True)
class Place:
    """One tensor of an adapter: where it lies in the model and in the file."""

    site: Site
    entry: Entry

    @property
    def own(self) -> Tensor:
        path, _, name = self.entry.attribute.rpartition(".")
        tensor: Tensor = getattr(self.site.delta.get_submodule(path), name)
        return tensor

    def encoded(self) -> Tensor:
        tensor = self.entry.to_file(self.own.detach(), self.site)
        return tensor.float() if tensor.is_floating_point() else tensor

    def assign(self, tensor: Tensor) -> None:
        own = self.own
        value = tensor.to("cpu" if own.is_meta else own.device, own.dtype, copy=True)
        path, _, name = self.entry.attribute.rpartition(".")
        module = self.site.delta.get_submodule(path)
        setattr(
            module,
            name,
            nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value,
        )


def places(
    model: nn.Module, parts: Parts, targets: Sequence[str], base: Weights
) -> dict[str, Place]:
    """Every tensor of the adapter by its key in the file. A tensor that deltas share has one
    key.
    """
    return {
        entry.key(site): Place(site, entry)
        for site in sites(model, parts, targets, base)
        for entry in entries_of(site)
    }


def sites(model: nn.Module, parts: Parts, targets: Sequence[str], base: Weights) -> list[Site]:
    layers, aimed = {path: layer_class(model.get_submodule(path)) for path in parts}, set(targets)
    return [
        Site(path, delta, layers[path], path in aimed, base)
        for path, deltas in parts.items()
        for delta in deltas
    ]
