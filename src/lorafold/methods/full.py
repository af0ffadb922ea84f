"""Full fine-tuning: the base's own weights are trained in place.

    y = layer(x)                    W itself is the parameter; there is no copy and nothing to merge

Full fine-tuning is the baseline for every other method. With its gradient and AdamW's fp32
moments, a parameter takes 16 bytes on an fp32 base and 12 on a bf16 base. On a bf16 base the
optimizer has to round stochastically (`training_step.optimizers`), because most updates are below
half a unit in the last place. Saving writes a plain model. The original weights are overwritten, so
`only(model)` runs the trained model, and `detach` leaves the trained weights in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafold.core.delta import Delta, DeltasByPath
from lorafold.core.layer import Layer, WeightAndBias
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError


class FullDelta(Delta):
    """The parameters of a module, registered again under the same names."""

    in_place = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # found by name, because biases of experts have two dimensions: (experts, out)
        self.vector_names = tuple(name for name in module._parameters if name.endswith("bias"))
        for name, p in module._parameters.items():
            self.register_parameter(name, p)

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        return layer(*args, **kwargs)

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        return w, b


@dataclass(frozen=True)
class Full(Spec):
    """Full fine-tuning, which has no options. If you set targets, only those modules are trained.

    Building fails for weights that can't have a gradient, for example in a quantized base.
    """

    targets = "parameters"
    lr = 2e-5
    trains_base = True

    def build(self, layer: Layer) -> FullDelta:
        module = layer.module
        fixed = [
            name
            for name, p in module._parameters.items()
            if p is not None and not (p.is_floating_point() and p.dtype.itemsize > 1)  # FP8
        ]
        if fixed or not any(p is not None for p in module._parameters.values()):
            reason = f"quantized parameters: {', '.join(fixed)}" if fixed else "no parameters"
            raise LorafoldError(
                f"Full trains floating-point weights in place; {type(module).__name__} has {reason}"
                "; choose other targets, or an unquantized base"
            )
        return FullDelta(module)

    def join(self, deltas: DeltasByPath) -> None:
        for delta in deltas.values():
            delta.requires_grad_(True)  # attaching an earlier adapter may have frozen them
