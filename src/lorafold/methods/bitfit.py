"""BitFit: trained biases, as an offset added to a layer's output.

    y = layer(x) + c                c (out,), zero at start

Zaken et al. 2021, arXiv 2106.10199. BitFit has very few parameters and suits small data sets. It
trains every bias of the language model, also in norms, except those of routers. If the blocks of a
model have no biases, their linear layers get them; merging then enables biases in the model's
config (Llama: attention_bias, mlp_bias), and fails if the architecture has no such setting.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.common.biases_and_modules import BiasDelta


@dataclass(frozen=True)
class BitFit(Spec):
    """BitFit, which has no options.

    If you set other targets, an offset is added to the outputs of those modules even if they have
    no bias.
    """

    targets = "biases"
    lr = 5e-3

    def build(self, layer: Layer) -> BiasDelta:
        if layer.matrices:
            raise LorafoldError(
                "BitFit: found expert weights, whose biases can't be trained; leave the experts out"
                " of the targets"
            )
        bias = layer.module._parameters.get("bias")
        return BiasDelta(layer.shape[0] if bias is None else len(bias), layer.device)
