"""Prefix tuning: learned keys and values in front of every attention.

    attention(q, [P_K, K], [P_V, V])        P (n, 2 L Hk D): for each of L layers n keys (Hk, D) and
                                            n values (Hk, D)

Li & Liang 2021, arXiv 2101.00190, without the reparameterization. They lie at positions 0 to n - 1,
seen by every token; the tokens follow from n. Nothing is folded and no start is the identity: n
more keys take their share of each attention. As in the paper's sec. 7.4 it begins with the
activations of real tokens, not with noise. Use it to steer a frozen base that no weight may be
added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import causal_attentions
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.parts.virtual import KeysAndValues, Receiver, Sender, check, is_attention

Init = Literal["activations", "random"]


class PrefixDelta(Sender):
    """prefix (n, 2 L Hk D), fp32, each row a token's keys and values of layer after layer: the
    layout of PEFT's files.
    """

    def __init__(
        self, body: nn.Module, tokens: int, shape: tuple[int, int], layers: list[int]
    ) -> None:
        super().__init__(body, layers)
        self.shape = shape  # (Hk, D)
        size = 2 * len(layers) * shape[0] * shape[1]
        self.prefix = nn.Parameter(
            torch.zeros(tokens, size, device=next(body.parameters()).device, dtype=torch.float32)
        )

    def by_layer(self) -> Tensor:  # (L, 2, Hk, n, D), a view
        return self.prefix.view(len(self.prefix), len(self.layers), 2, *self.shape).permute(
            1, 2, 3, 0, 4
        )

    def keys_and_values(self) -> KeysAndValues:
        return {i: (kv[:1], kv[1:]) for i, kv in zip(self.layers, self.by_layer(), strict=True)}

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        return self.send(layer, inputs, self.keys_and_values(), len(self.prefix))

    @torch.no_grad()
    def begin_with(self, layer: Layer, ids: Tensor) -> None:  # (n,)
        """Take over what the decoder makes of these tokens at positions 0 to n - 1."""
        cache = layer(input_ids=ids[None], use_cache=True).cache
        for i, kv in zip(self.layers, self.by_layer(), strict=True):
            kv.copy_(torch.cat([cache.layers[i].keys, cache.layers[i].values]))


@dataclass(frozen=True)
class Prefix(Spec):
    """tokens n; init: activations of n random tokens of the vocabulary, or random (normal, 0.02).

    Raises LorafoldError for values out of range, and when laid on a model whose attentions differ
    in their shape.
    """

    tokens: int = 20
    init: Init = "activations"

    targets: ClassVar[str] = "decoder"
    lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        check("Prefix", self.tokens, self.init, get_args(Init))

    def build(self, layer: Layer) -> PrefixDelta | Receiver:
        if is_attention(layer.module):
            return Receiver(layer.module)
        body, attentions = (
            layer.module,
            [layer.module.get_submodule(path) for path in causal_attentions(layer.module)],
        )
        if not attentions:
            raise LorafoldError(
                "Prefix lies on a decoder and its attentions (targets 'decoder'), not on"
                f" {type(body).__name__}"
            )
        shapes = {key_shape(m) for m in attentions}
        if len(shapes) > 1:
            raise LorafoldError(
                f"Prefix: the attentions of {type(body).__name__} differ in heads and head size:"
                f" {sorted(shapes)}"
            )
        layers: list[Any] = [m.layer_idx for m in attentions]
        delta = PrefixDelta(body, self.tokens, shapes.pop(), layers)
        if self.init == "activations":
            embedding = body.get_input_embeddings()  # type: ignore[operator]
            delta.begin_with(
                layer,
                torch.randint(embedding.num_embeddings, (self.tokens,)).to(delta.prefix.device),
            )
        else:
            nn.init.normal_(delta.prefix, std=0.02)
        return delta


def key_shape(attention: nn.Module) -> tuple[int, int]:
    """(Hk, D): the heads of an attention's keys and their size."""
    config: Any = attention.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (
        heads,
        getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
