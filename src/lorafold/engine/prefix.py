"""What free slots still hold, so that a request whose prompt begins the same goes on from there.

    kept.keep(slot, prefix, tokens)         a request ended well: its slot holds these tokens
    slot, n = kept.find(prefix, prompt)     n of the prompt's tokens are in that slot

Keys and values follow from the base, the adapter and the tokens before. Tokens alone would give one
adapter's cache to another (vLLM #30931), and names that of files which were replaced (#42125); so a
beginning is found under its own `Prefix` only. The last token of a prompt is always computed, since
its logits are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prefix:
    """What keys and values were computed with, beside their tokens and the engine's one base. No
    name is part of it.

    Args:
        digest: the digest of the adapter's files, "" for the base.
        generation: the number of the call that made the adapter known, 0 for the base.
        tenant: on whose behalf; nobody's slot serves another.
    """

    digest: str
    generation: int
    tenant: str


@dataclass(frozen=True)
class _Slot:
    prefix: Prefix
    tokens: tuple[int, ...]
    since: int


class KeptPrefixes:
    """The free slots that hold something, by their number."""

    def __init__(self) -> None:
        self.slots: dict[int, _Slot] = {}
        self._clock = itertools.count(1)

    def keep(self, slot: int, prefix: Prefix, tokens: Sequence[int]) -> None:
        """Remember what a slot holds.

        Args:
            slot: the slot, which is free now.
            prefix: what it was computed with.
            tokens: the tokens whose keys and values it has.
        """
        self.slots[slot] = _Slot(prefix, tuple(tokens), next(self._clock))

    def find(self, prefix: Prefix, prompt: Sequence[int]) -> tuple[int, int]:
        """The slot that has most of the prompt's first tokens, and how many; (-1, 0) if none has
        any.
        """
        best, most = -1, 0
        for slot, kept in self.slots.items():
            if kept.prefix == prefix and (n := common(kept.tokens, prompt[:-1])) > most:
                best, most = slot, n
        return best, most

    def age(self, slot: int) -> int:
        """The larger, the later a free slot was kept; 0 if it holds nothing."""
        return self.slots[slot].since if slot in self.slots else 0

    def length(self, slot: int) -> int:
        """How many tokens a free slot holds."""
        return len(self.slots[slot].tokens) if slot in self.slots else 0

    def moved(self, source: int, target: int) -> None:
        """A slot's content, if it holds any, is in another free slot now."""
        if source in self.slots:
            self.slots[target] = self.slots.pop(source)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
