"""IA3: three learned vectors per block, for the keys, the values and the input of the MLP's last
matrix.

    keys, values    y = l * (W x + b)       l (out,) one at start
    MLP, last       y = W (l * x) + b       l (in,) one at start

Liu et al. 2022, arXiv 2205.05638, sec. 3.3. IA3 has very few parameters and suits training on few
examples; it costs nothing once merged.

The default targets are found by the names that transformers gives such matrices: in attention, a
projection to keys or values, or a fused projection that includes them (k_proj, value, qkv_proj,
c_attn ...); elsewhere, the matrix back to the hidden size (down_proj, fc2, wo, mlp.c_proj ...).
PEFT instead has a table by architecture, which lists queries instead of keys for some
architectures, unlike the paper.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import ends_in
from lorafold.core.delta import Delta, Gained
from lorafold.core.layer import Layer, WeightAndBias
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError

ATTENTION = "(?i:attn|attention)"
KEYS_VALUES = r"(?:k|v|kv|qkv|Wqkv|key|value|query_key_value|kv_b|in)(?:_proj|_lin)?|c_attn"
MLP_LAST = r"down_proj|fc2|fc_out|lin2|wo|w2|dense_4h_to_h|c_proj|output\.dense"


class IA3Delta(Delta):
    """The gains l (*matrices, out), or (*matrices, in) if the layer's inputs are scaled, fp32."""

    vector_names = ("l",)
    setting_names = ("of_input",)

    def __init__(self, shape: tuple[int, ...], of_input: bool, device: torch.device) -> None:
        super().__init__()
        self.of_input = of_input
        self.l = nn.Parameter(torch.ones(shape, device=device, dtype=torch.float32))

    def gained(self, layer: Layer) -> Gained | None:
        return None if self.of_input else Gained(None, self.l, None)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if self.of_input:
            return layer(layer.scale(x, self.l), onto=onto)
        return layer.scale(layer(x), self.l, onto=onto)

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        if self.of_input:
            return w * self.l[..., None, :], b
        return self.l[..., None] * w, None if b is None else self.l * b


@dataclass(frozen=True)
class IA3(Spec):
    """IA3: learned gains on keys, values and MLP activations.

    Args:
        feedforward: the modules whose inputs are scaled: names or path ends, or a regular
            expression for whole paths (None: all targets outside attention). They can't include
            embeddings or convolutions.
    """

    feedforward: str | Sequence[str] | None = None

    targets = rf".*{ATTENTION}.*\.(?:{KEYS_VALUES})|(?!.*{ATTENTION}).*\.(?:{MLP_LAST})"
    lr = 1e-2

    def at(self, path: str) -> Self:
        if self.feedforward is None:
            last = re.search(ATTENTION, path) is None
        elif isinstance(self.feedforward, str):
            last = re.fullmatch(self.feedforward, path) is not None
        else:
            last = any(ends_in(path, name) for name in self.feedforward)
        return replace(self, feedforward=(path,) if last else ())

    def build(self, layer: Layer) -> IA3Delta:
        out, inn = layer.shape
        if self.feedforward and not layer.takes_vectors:
            inputs = "ids" if layer.takes_ids else "signals or groups of vectors"
            raise LorafoldError(
                f"IA3: found a feedforward module whose inputs are {inputs}, expected vectors,"
                " which IA3 scales; set feedforward without this module"
            )
        shape = (*layer.matrices, inn if self.feedforward else out)
        return IA3Delta(shape, bool(self.feedforward), layer.device)
