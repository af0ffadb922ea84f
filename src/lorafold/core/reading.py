"""What a module's weight and bias are under the deltas that are active on it.

    round(fold_n(... fold_1(W, b)))         W (out, in), b (out,); transposed, or packed, as the
                                            module stores them

Summed in fp32 or wider, rounded with a dither to the stored dtype. Shape and dtype are told without
folding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafold.core.delta import Delta, on_meta
from lorafold.core.layer import Base
from lorafold.core.rounding import rounded
from lorafold.errors import NotMergeable

NAMES = ("weight", "bias")


@dataclass(frozen=True)
class Reading:
    """A module at `site`, under the deltas that were active when it was read: by the adapter's
    name, lowest first.
    """

    base: Base
    deltas: dict[str, Delta]
    site: str

    def stored(self, name: str) -> Tensor | None:
        return self.base.module._parameters.get(name)

    def like(self, name: str) -> Tensor:
        """A tensor of the same dtype and device."""
        own = self.stored(name)
        return self.base.bare.weight if own is None else own

    def folded(self) -> Callable[[str], Tensor | None]:
        """Fold, and give the weight or the bias, by its name, as the module would store it, rounded
        to its dtype; the parameter itself where no delta changes it. NotMergeable where a delta or
        the storage can't.
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
                raise self._refused(f"adapter {adapter!r} can't be applied there: {e}") from None
        return w, b

    def _refused(self, why: str) -> NotMergeable:
        return NotMergeable(
            f"{self.site} ({type(self.base.module).__name__}): the model reads its weight or bias"
            f" past its forward, and {why}; leave the module out of the targets, or read what is"
            " stored in the state dict"
        )

    def leaves(self) -> list[Tensor]:
        """The parameters that the folded tensors have a gradient for."""
        parts = [part for delta in self.deltas.values() for part in (delta, *delta.parts())]
        found = [
            *(p for part in parts for p in (*part.parameters(), *part.borrowed())),
            *(p for n in NAMES if (p := self.stored(n)) is not None),
        ]
        return [p for p in {id(p): p for p in found}.values() if p.requires_grad]

    def gained(self) -> Tensor | None:
        """On the meta device, the bias that the deltas give a module without one; None for none."""
        try:
            w, _ = self.base.dense()
            return self._fold(torch.empty_like(w, device="meta"), None, meta=True)[1]
        except NotMergeable:
            return None

    def shape(self, name: str) -> torch.Size:
        """That of the stored tensor, with the rows that the deltas append to it."""
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
