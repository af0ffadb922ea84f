"""The weight and bias of a module with its active deltas folded in.

    round(fold_n(... fold_1(W, b)))         W (out, in), b (out,); in the layout that the module
                                            stores (transposed for Conv1D and embeddings)

The sum is in fp32 or wider and is rounded with a dither to the stored dtype. Shape and dtype are
known without folding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafold.core.base import Base
from lorafold.core.delta import Delta, on_meta
from lorafold.core.rounding import rounded
from lorafold.errors import NotMergeable

NAMES = ("weight", "bias")


@dataclass(frozen=True)
class Reading:
    """A module, its path `site`, and the deltas that were active when its weight or bias was read,
    by the adapter's name, lowest first.
    """

    base: Base
    deltas: dict[str, Delta]
    site: str

    def stored(self, name: str) -> Tensor | None:  # own shape
        """The parameter of that name as the module stores it; None if there is none."""
        found: Tensor | None = self.base.parameter(name)
        return found

    def like(self, name: str) -> Tensor:
        """A tensor, of any shape, with the dtype and device of the parameter of that name."""
        own = self.stored(name)
        return self.base.bare.weight if own is None else own

    def folded(self) -> Callable[[str], Tensor | None]:
        """Fold the deltas, and return a function from "weight" or "bias" to the folded tensor.

        The tensor has the layout (own shape) and the dtype that the module stores. A parameter that
        no delta changes is returned itself. Raises NotMergeable if a delta can't be folded or the
        storage can't hold the result.
        """
        try:
            w, b = self.base.dense()
        except NotMergeable as e:
            raise self._refused(str(e)) from None
        start = dict(zip(NAMES, (_wide(w), None if b is None else _wide(b)), strict=True))
        with _exact(w.device):
            w, b = self._fold(start["weight"], start["bias"])  # type: ignore[arg-type]
        end = dict(zip(NAMES, (w, b), strict=True))

        def as_stored(name: str) -> Tensor | None:
            if end[name] is start[name]:
                return self.stored(name)
            try:
                encoded = self.base.encode(w, b)[name]
            except NotMergeable as e:
                raise self._refused(str(e)) from None
            return rounded(encoded, self.like(name).dtype).contiguous()

        return as_stored

    def _fold(
        self, w: Tensor, b: Tensor | None, meta: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        for adapter, delta in self.deltas.items():
            try:
                w, b = (on_meta(delta) if meta else delta).fold(w, b)
            except NotMergeable as e:
                raise self._refused(f"adapter {adapter!r} can't be folded: {e}") from None
        return w, b

    def _refused(self, why: str) -> NotMergeable:
        return NotMergeable(
            f"{self.site} ({type(self.base.module).__name__}): the model reads the weight or bias"
            f" of this module without calling its forward, so adapters must be folded, and {why};"
            " leave the module out of the targets, or read the stored weight from the state dict"
        )

    def leaves(self) -> list[Tensor]:
        """The trainable parameters, of any shape, that the folded tensors depend on."""
        parts = [part for delta in self.deltas.values() for part in (delta, *delta.parts())]
        found = [
            *(p for part in parts for p in (*part.parameters(), *part.borrowed())),
            *(p for n in NAMES if (p := self.stored(n)) is not None),
        ]
        return [p for p in {id(p): p for p in found}.values() if p.requires_grad]

    def gained(self) -> Tensor | None:
        """The bias (out,), on the meta device, that the deltas add to a module without one; None
        if they add none.
        """
        try:
            w, _ = self.base.dense()
            return self._fold(torch.empty_like(w, device="meta"), None, meta=True)[1]
        except NotMergeable:
            return None

    def shape(self, name: str) -> torch.Size:
        """The shape of the folded tensor: the stored one's, with what the deltas append to it."""
        like = self.stored(name) if self.stored(name) is not None else self.gained()
        assert like is not None
        parts = (part for delta in self.deltas.values() for part in delta.parts())
        rows = max((i + 1 for part in parts for i in part.values_at()), default=0)
        return torch.Size(max(n, rows) if axis == 0 else n for axis, n in enumerate(like.shape))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
