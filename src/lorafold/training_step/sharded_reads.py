"""Operations on tensors that are divided among processes: each is whole while an operation reads or
writes it, and is let go when another one is needed.

    with Reading(shards):
        module.weight.float()               gathered, in all processes at once

So whatever prepares a run, a method, a check or a fingerprint, uses weights as if they were whole.
All processes must do the same operations on them in the same order. What state dicts are made of
(`ALIASES`) leaves them as they are, so what other code takes by its address must be copied first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafold.training_step.shards import Shard

ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class ShardedReads(TorchDispatchMode):
    """The mode in which operations find divided tensors whole."""

    def __init__(self, shards: Mapping[int, Shard]) -> None:
        super().__init__()
        self.shards = shards
        self.filled: list[Shard] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.shards and func not in ALIASES:
            self._fill([shard for t in tree_leaves((args, kwargs)) if (shard := self._of(t))])
            if func._schema.is_mutable:
                for declared, t in zip(func._schema.arguments, args, strict=False):
                    written = declared.alias_info is not None and declared.alias_info.is_write
                    if written and (shard := self._of(t)):
                        shard.written = True
        return func(*args, **kwargs)

    def _of(self, value: Any) -> Shard | None:
        if not isinstance(value, Tensor) or value.is_meta or not torch._C._has_storage(value):
            return None
        return self.shards.get(value.untyped_storage()._cdata)

    def _fill(self, needed: list[Shard]) -> None:
        """Fill what is not whole, and let go what was filled before."""
        missing = [shard for shard in dict.fromkeys(needed) if not shard.whole]
        if missing:
            self.let_go(needed)
            for shard in missing:
                shard.fill()
            self.filled += missing

    def let_go(self, but: Sequence[Shard] = ()) -> None:
        """Let go what was filled here."""
        for shard in self.filled:
            if shard not in but:
                shard.empty()
        self.filled = [shard for shard in self.filled if shard in but]
