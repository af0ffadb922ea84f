"""Prefix tuning: learned keys and values in front of every attention.

    attention(q, [P_K, K], [P_V, V])        P (n, 2 L Hk D): for each of L layers n keys (Hk, D) and
                                            n values (Hk, D)

Li & Liang 2021, arXiv 2101.00190, without the reparameterization. The prefix has the positions 0 to
n - 1 and every token attends to it; the positions of the tokens start at n. A prefix can't be
merged, and every initialization changes the base's outputs, since the n additional keys take a
share of each attention. By default the prefix starts with the activations of real tokens (sec. 7.4
of the paper). Use prefix tuning to steer a frozen base whose weights must stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lorafold.core.layer import Layer
from lorafold.errors import LorafoldError
from lorafold.methods.common.options_and_init import zeros
from lorafold.methods.common.virtual_tokens import KVByLayer, VirtualTokenDelta, VirtualTokens

Init = Literal["activations", "random"]


class PrefixDelta(VirtualTokenDelta):
    """The parameter `prefix` (n, 2 L Hk D), fp32. Each row contains the key and value of one
    virtual token for all layers in order, which is the layout of PEFT's files.
    """

    def __init__(
        self, body: nn.Module, tokens: int, shape: tuple[int, int], layers: list[int]
    ) -> None:
        super().__init__(body, layers)
        self.shape = shape  # (Hk, D)
        size = 2 * len(layers) * shape[0] * shape[1]
        self.prefix = zeros((tokens, size), next(body.parameters()).device)

    def by_layer(self) -> Tensor:  # (L, 2, Hk, n, D)
        """A view of the prefix: the keys and values of each layer."""
        split = self.prefix.view(len(self.prefix), len(self.layers), 2, *self.shape)
        return split.permute(1, 2, 3, 0, 4)

    @property
    def positions(self) -> int:
        return len(self.prefix)

    def keys_and_values(self, layer: Layer, cache: Any) -> KVByLayer:
        return {i: (kv[:1], kv[1:]) for i, kv in zip(self.layers, self.by_layer(), strict=True)}


@dataclass(frozen=True)
class Prefix(VirtualTokens):
    """Prefix tuning. All attentions of the model must have the same number of key heads and the
    same head size.

    Args:
        tokens: the number n of virtual tokens.
        init: activations (the keys and values of n random tokens of the vocabulary), or random
            (normal, std 0.02).
    """

    tokens: int = 20
    init: Init = "activations"

    inits = get_args(Init)

    def build_delta(self, layer: Layer, attentions: list[nn.Module]) -> PrefixDelta:
        body: Any = layer.module
        shapes = set()  # (Hk, D): number and size of an attention's key heads
        for attention in attentions:
            config: Any = attention.config
            queries = config.num_attention_heads
            size = getattr(attention, "head_dim", None) or config.hidden_size // queries
            shapes.add((getattr(config, "num_key_value_heads", None) or queries, size))
        if len(shapes) > 1:
            raise LorafoldError(
                f"Prefix: found several attention shapes (key heads, head size) in"
                f" {type(body).__name__}: {sorted(shapes)}, expected one; choose another method"
            )
        layers: list[Any] = [m.layer_idx for m in attentions]
        delta = PrefixDelta(body, self.tokens, shapes.pop(), layers)
        if self.init == "random":
            nn.init.normal_(delta.prefix, std=0.02)
            return delta
        ids = self.random_ids(body.get_input_embeddings()).to(delta.prefix.device)
        with torch.no_grad():  # the keys and values of the random tokens at positions 0 to n - 1
            cache = layer(input_ids=ids[None], use_cache=True).cache
            for i, kv in zip(layers, delta.by_layer(), strict=True):
                kv.copy_(torch.cat([cache.layers[i].keys, cache.layers[i].values]))
        return delta
