"""Prompt tuning: learned embeddings of n virtual tokens before the first token.

    model([E, embed(ids)])          E (n, d)

Lester et al. 2021, arXiv 2104.08691. In a causal decoder the activations of E do not depend on the
tokens that follow, so E runs through the decoder once per batch, and every attention prepends the
keys and values of E (`lorafold.methods.common.virtual_tokens`). If there is a KV cache, these keys
and values are stored with it, so that decoding computes them once. A prompt can't be merged, and
every initialization changes the base's outputs. Use prompt tuning if an adapter must be tiny (n d
parameters) and the base is large, because it matches full fine-tuning only for large models (figure
1 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lorafold.core.layer import Layer
from lorafold.methods.common.virtual_tokens import KVByLayer, VirtualTokenDelta, VirtualTokens

Init = Literal["vocabulary", "random"]


class PromptDelta(VirtualTokenDelta):
    """The embeddings (n, d) of the virtual tokens, fp32."""

    def __init__(self, body: nn.Module, embeddings: Tensor, layers: list[int]) -> None:
        super().__init__(body, layers)
        self.embeddings = nn.Parameter(embeddings.detach().float().clone())

    @property
    def positions(self) -> int:
        return len(self.embeddings)

    def keys_and_values(self, layer: Layer, cache: Any) -> KVByLayer:
        """The keys and values of positions 0 to n - 1, by `layer_idx`. If the KV cache contains
        tokens, the virtual keys and values stored on it are returned.
        """
        cached = getattr(cache, "virtual_tokens", {})
        if cache is not None and cache.get_seq_length() and id(self) in cached:
            return cached[id(self)]
        kv_by_layer: KVByLayer = {}
        dtype = layer.module.get_input_embeddings().weight.dtype  # type: ignore[operator]
        inputs = {"inputs_embeds": self.embeddings.to(dtype)[None], "use_cache": False}
        self.run_decoder(layer, inputs, None, 0, kv_by_layer)
        if cache is not None:
            cache.virtual_tokens = cached | {id(self): kv_by_layer}
        return kv_by_layer


@dataclass(frozen=True)
class Prompt(VirtualTokens):
    """Prompt tuning.

    Args:
        tokens: the number n of virtual tokens.
        init: vocabulary (the embeddings of n random tokens), or random (normal, with the standard
            deviation of the vocabulary's embeddings).
    """

    tokens: int = 20
    init: Init = "vocabulary"

    inits = get_args(Init)

    def build_delta(self, layer: Layer, attentions: list[nn.Module]) -> PromptDelta:
        body = layer.module
        layers = [m.layer_idx for m in attentions]
        return PromptDelta(body, self.initial_embeddings(body.get_input_embeddings()), layers)  # type: ignore

    @torch.no_grad()
    def initial_embeddings(self, embedding: nn.Embedding) -> Tensor:  # (n, d)
        """The initial embeddings of the virtual tokens, according to `init`."""
        weight = embedding.weight
        if self.init == "vocabulary":
            return embedding(self.random_ids(embedding))
        random = torch.randn(self.tokens, weight.shape[1], device=weight.device)
        return random * weight.float().std()
