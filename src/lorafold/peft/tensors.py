"""The tensors of an attached adapter, each with its key and form in PEFT's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafold.bases import layer_class
from lorafold.bases.convolution import Convolution
from lorafold.core.delta import Delta
from lorafold.core.matrices import module_at
from lorafold.models.weights import Weights
from lorafold.peft.format import Entry, Site
from lorafold.peft.parameters import turned, wrappers_over
from lorafold.peft.rows_lora import WRAPPED
from lorafold.peft.table import entries_of

Parts = Mapping[str, Sequence[Delta]]  # module path -> the deltas attached there


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a delta, and the entry that describes it in the file."""

    site: Site
    entry: Entry

    @property
    def own(self) -> Tensor:
        """The delta's tensor, of any shape."""
        path, _, name = self.entry.attribute.rpartition(".")
        tensor: Tensor = getattr(self.site.delta.get_submodule(path), name)
        return tensor

    def encoded(self) -> Tensor:
        """Return the tensor, of any shape, as the file stores it: in fp32, or as integers."""
        tensor = self.entry.to_file(self.own.detach(), self.site)
        return tensor.float() if tensor.is_floating_point() else tensor

    def assign(self, tensor: Tensor) -> None:
        """Replace the delta's tensor by a copy of this one, of any shape, in the delta's dtype and
        on its device (the CPU if it is on the meta device).
        """
        own = self.own
        value = tensor.to("cpu" if own.is_meta else own.device, own.dtype, copy=True)
        path, _, name = self.entry.attribute.rpartition(".")
        module = self.site.delta.get_submodule(path)
        setattr(
            module,
            name,
            nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value,
        )


def saved_tensors(
    model: nn.Module, parts: Parts, targets: Sequence[str], base: Weights
) -> dict[str, SavedTensor]:
    """Return every tensor of the adapter by its key in the file; a tensor that deltas share has one
    key.

    Args:
        model, parts, targets, base: As `sites` takes them.
    """
    return {
        entry.key(site): SavedTensor(site, entry)
        for site in sites(model, parts, targets, base)
        for entry in entries_of(site)
    }


def sites(model: nn.Module, parts: Parts, targets: Sequence[str], base: Weights) -> list[Site]:
    """Return every delta of the adapter with its module.

    Args:
        parts: The adapter's deltas by module path.
        targets: The paths of the modules that the method adapts.
    """
    found, aimed, above = [], set(targets), wrappers_over(model, targets)
    for path, deltas in parts.items():
        module: Any = module_at(model, path)
        layer = layer_class(module)
        window = module.kernel_size if issubclass(layer, Convolution) else ()
        for delta in deltas:
            wrappers = above.get(path) if isinstance(delta, WRAPPED) else None
            exchanged = wrappers is not None and turned(module)
            found.append(Site(path, delta, layer, path in aimed, base, wrappers, window, exchanged))
    return found
