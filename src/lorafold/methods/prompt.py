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
from typing import Any, ClassVar, Literal, get_args

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

    def keys_and_values(self, layer: Layer) -> KeysAndValues:
        """The keys and values that the decoder's attentions compute from the embeddings at
        positions 0 to n - 1.
        """
        seen: Seen = {}
        dtype = layer.module.get_input_embeddings().weight.dtype  # type: ignore[operator]
        self.send(
            layer,
            {"inputs_embeds": self.embeddings.to(dtype)[None], "use_cache": False},
            None,
            0,
            seen,
        )
        return seen

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        kept = self.kept_with(inputs.get("cache"), layer)
        return self.send(layer, inputs, kept, self.positions)

    def kept_with(self, cache: Any, layer: Layer) -> KeysAndValues:
        """The keys and values that are kept with a cache since its first token; they are computed
        if there is no cache, or it is empty.
        """
        if cache is None:
            return self.keys_and_values(layer)
        kept = getattr(cache, "virtual_tokens", {})
        if cache.get_seq_length() == 0 or id(self) not in kept:
            cache.virtual_tokens = kept = kept | {id(self): self.keys_and_values(layer)}
        return kept[id(self)]


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

    inits: ClassVar[tuple[str, ...]] = get_args(Init)

    def sender(self, layer: Layer, attentions: list[nn.Module]) -> PromptDelta:
        body = layer.module
        layers: list[Any] = [m.layer_idx for m in attentions]
        start = self.start(body.get_input_embeddings())  # type: ignore[operator]
        return PromptDelta(body, start, layers)

    @torch.no_grad()
    def start(self, embedding: nn.Embedding) -> Tensor:  # (n, d)
        """The embeddings at start, by `init`."""
        weight = embedding.weight
        if self.init == "vocabulary":
            return embedding(
                torch.randint(embedding.num_embeddings, (self.tokens,)).to(weight.device)
            )
        return (
            torch.randn(self.tokens, weight.shape[1], device=weight.device) * weight.float().std()
        )
