"""Parameters that transformers computes from several tensors, and the reverse conversion.

    experts.0.w1, experts.0.w3, experts.1.w1, ...   ->  experts.gate_up_proj  (E, 2 I, H)
    attention.qkv                                   ->  q_proj, k_proj, v_proj

The operations are transformers' own (`core_model_loading`), so every architecture that transformers
converts is supported. Values are computed on demand and not cached.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
)

from lorafold.errors import LorafoldError
from lorafold.models.weights import TensorEntry


@dataclass(frozen=True)
class SourceTensor:
    """A tensor from which a parameter is computed: its entry, its mapped values, the converter's
    pattern for its name, and its name in the reverse conversion.
    """

    entry: TensorEntry
    values: Tensor
    pattern: str
    renamed: str


class Conversion:
    """The parameters that a converter computes from a group of tensors; `name` is the first of
    these parameters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        converter: WeightConverter,
        name: str,
        sources: Sequence[SourceTensor],
    ) -> None:
        self.model, self.converter, self.name = model, converter, name
        self.sources = sorted(sources, key=lambda source: dot_natural_key(source.entry.name))
        self.like = self._convert(lambda values: values.to("meta"))

    @property
    def entries(self) -> list[TensorEntry]:
        return [source.entry for source in self.sources]

    def values(self) -> dict[str, Tensor]:
        """The parameters (any shape) by name, computed from the files."""
        return self._convert(lambda values: values)

    def _convert(self, each: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        converter: Any = deepcopy(self.converter)
        for s in self.sources:
            converter.add_tensor(self.name, s.entry.name, s.pattern, each(s.values))
        return self._run(converter, self.name)

    def reversed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The files' tensors by name, computed from the values (any shape) of all parameters."""
        tensors: dict[str, Tensor] = {}
        names, renamed = {s.renamed: s.entry for s in self.sources}, ""
        with suppress(NotImplementedError):
            back: Any = self.converter.reverse_transform()
            for name, tensor in values.items():
                renamed, pattern = back.rename_source_key(name)
                back.add_tensor(renamed, name, pattern, tensor)
            tensors = {names[n].name: t for n, t in self._run(back, renamed).items() if n in names}
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        if shapes != {e.name: e.shape for e in self.entries}:
            raise LorafoldError(
                f"{self.name}: transformers' conversion of this weight can't be reversed to the"
                " tensors of the files"
            )
        return tensors

    def check_reversible(self) -> None:
        """Checks that the reverse conversion restores the files' tensors."""
        back = self.reversed(self.values())
        if wrong := [s.entry.name for s in self.sources if not _same(back[s.entry.name], s.values)]:
            raise LorafoldError(
                f"{self.name}: reversing transformers' conversion gives other values for {wrong[0]}"
                " than the file contains, so the weight can't be written back"
            )

    def _run(self, converter: WeightConverter, name: str) -> dict[str, Tensor]:
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def elements(self, where: Tensor) -> Tensor | None:
        """The elements (n,) at indices (n, rank), computed without the whole conversion; None if
        that is not possible.
        """
        first, *rest = self.converter.operations
        joined = rest[0] if rest else None
        if not isinstance(first, MergeModulelist) or first.dim or len(rest) > 1:
            return None
        if joined is not None and not (isinstance(joined, Concatenate) and joined.dim > 0):
            return None
        lists = defaultdict(list)
        for s in self.sources:
            lists[s.pattern].append(s.values)
        ordered = [lists[p] for p in self.converter.source_patterns if p in lists]
        elements = []
        for e, *at in where.tolist():
            own = ordered[0]
            for own in ordered if joined is not None else ():
                size = own[0].shape[joined.dim - 1]  # type: ignore[union-attr]
                if at[joined.dim - 1] < size:  # type: ignore[union-attr]
                    break
                at[joined.dim - 1] -= size  # type: ignore[union-attr]
            elements.append(own[e][tuple(at)])
        return torch.stack(elements)

    @contextmanager
    def made(self) -> Iterator[dict[str, Tensor]]:
        """A context in which the model has the parameters (any shape) in memory; yields them by
        name.
        """
        values = self.values()
        before = {name: self._put(name, nn.Parameter(t, False)) for name, t in values.items()}
        try:
            yield values
        finally:
            for name, parameter in before.items():
                self._put(name, parameter)

    def _put(self, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Sets a parameter of the model, and returns the previous one."""
        path, _, leaf = name.rpartition(".")
        own = self.model.get_submodule(path)._parameters
        before, own[leaf] = own[leaf], parameter
        return before

    def parameter(self, name: str) -> nn.Parameter:
        """One of the parameters, whose values are computed on demand."""
        elements = self.elements if len(self.like) == 1 else None
        values = LazyTensor(self.like[name], lambda: self.values()[name], elements)
        return nn.Parameter(values, requires_grad=False)


class LazyTensor(Tensor):
    """A read-only CPU tensor whose values are computed by each operation that needs them. `like` is
    a meta tensor of the same shape and dtype; `elements` returns the elements at indices (n, rank).
    """

    make: Callable[[], Tensor]
    elements: Callable[[Tensor], Tensor | None] | None
    like: Tensor

    def __new__(cls, like: Tensor, *_: Any) -> LazyTensor:
        return Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )

    def __init__(
        self,
        like: Tensor,
        make: Callable[[], Tensor],
        elements: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self.like, self.make, self.elements = like, make, elements

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        self = args[0] if isinstance(args[0], LazyTensor) else None
        if self is not None and func is aten.detach.default:
            return LazyTensor(self.like, self.make, self.elements)
        if self is not None and func._schema.is_mutable:
            raise LorafoldError("can't write to a weight that is computed from files")
        if self is not None and func.is_view:
            like = func(self.like, *args[1:], **kwargs)
            if isinstance(like, Tensor):
                return LazyTensor(like, lambda: func(self.make(), *args[1:], **kwargs))
        device = kwargs.get("device")
        if self is not None and device is not None and torch.device(device).type == "meta":
            return func(self.like, *args[1:], **kwargs)
        if self is not None and func is aten.index.Tensor and self.elements is not None:
            index = args[1]
            if len(index) == self.dim() and all(i is not None and i.dim() == 1 for i in index):
                elements = self.elements(torch.stack(index, 1))
                if elements is not None:
                    return elements
        args, kwargs = tree_map_only(LazyTensor, lambda t: t.make(), (args, kwargs))
        return func(*args, **kwargs)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
