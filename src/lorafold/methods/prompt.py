"""Prompt tuning: learned embeddings of n virtual tokens before the first token.

    model([E, embed(ids)])          E (n, d)

Lester et al. 2021, arXiv 2104.08691. A causal decoder computes the same for E whatever follows, so
E runs through it once for a whole batch, and every attention gets its keys and values in front of
its own (`lorafold.methods.parts.virtual_tokens`). They are kept with the cache, if there is one, so
that decoding computes them once. The method can't be folded, and no initialization leaves the
base's outputs as they are. Use it where an adapter must be tiny (n d numbers) and the base is
large: only for large models does it reach full fine-tuning (the paper's figure 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lorafold.core.layer import Layer
from lorafold.methods.parts.virtual_tokens import KeysAndValues, Seen, Sender, VirtualTokens

Init = Literal["vocabulary", "random"]


class PromptDelta(Sender):
    """embeddings (n, d), fp32, of the virtual tokens."""

    def __init__(self, body: nn.Module, embeddings: Tensor, layers: list[int]) -> None:
        super().__init__(body, layers)
        self.embeddings = nn.Parameter(embeddings.detach().float().clone())

    @property
    def positions(self) -> int:
        """n."""
        return len(self.embeddings)

    def keys_and_values(self, layer: Layer, cache: Any) -> KeysAndValues:
        """Those of positions 0 to n - 1. A cache keeps them since its first token; they are
        computed if there is no cache, or it is empty.
        """
        kept = getattr(cache, "virtual_tokens", {})
        if cache is not None and cache.get_seq_length() and id(self) in kept:
            return kept[id(self)]
        seen: Seen = {}
        dtype = layer.module.get_input_embeddings().weight.dtype  # type: ignore[operator]
        embeddings = self.embeddings.to(dtype)[None]
        self.send(layer, {"inputs_embeds": embeddings, "use_cache": False}, None, 0, seen)
        if cache is not None:
            cache.virtual_tokens = kept | {id(self): seen}
        return seen


@dataclass(frozen=True)
class Prompt(VirtualTokens):
    """Prompt tuning. Raises LorafoldError for values out of range.

    Args:
        tokens: the number n of virtual tokens.
        init: embeddings of n random tokens of the vocabulary, or random (normal, with the standard
            deviation of the vocabulary's).
    """

    tokens: int = 20
    init: Init = "vocabulary"

    inits = get_args(Init)

    def sender(self, layer: Layer, attentions: list[nn.Module]) -> PromptDelta:
        body = layer.module
        layers = [m.layer_idx for m in attentions]
        return PromptDelta(body, self.start(body.get_input_embeddings()), layers)  # type: ignore

    @torch.no_grad()
    def start(self, embedding: nn.Embedding) -> Tensor:  # (n, d)
        """The embeddings at start, by `init`."""
        weight = embedding.weight
        if self.init == "vocabulary":
            return embedding(self.random_ids(embedding))
        random = torch.randn(self.tokens, weight.shape[1], device=weight.device)
        return random * weight.float().std()
