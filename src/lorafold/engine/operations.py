"""The operations of a pass: those of `ops.decoding`, and norms, rotations and gates without
gradients, by their forms on one kind of device (`kernels.table`).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lorafold.engine.steady import attend
from lorafold.kernels.table import DECODING, use
from lorafold.ops.decoding import ATTEND, LOW_RANK, STORED, WRITE
from lorafold.ops.fused import GATED, NORM, ROTARY
from lorafold.ops.scale import SCALE, scaled

log = logging.getLogger(__name__)

# by device, the operations whose numbers for a row are the same bits whatever rows and tokens are
# beside it, which is what a request's answer rests on
INDEPENDENT = {
    "": frozenset({"write", "rotary", "scale"}),
    "cpu": frozenset(operation.name for operation in DECODING if operation is not STORED),
}


class Operations:
    """Final: the operations by name. Each has the parameters of its plain form.

    Args:
        device: the kind of device, whose forms are in use; without it the plain forms.
        as_trained: attend as training does.
    """

    def __init__(self, device: str = "", as_trained: bool = False) -> None:
        self.name = (device or "plain") + "_as_trained" * as_trained
        self.independent = INDEPENDENT.get(device, INDEPENDENT[""])
        self.stored, self.low_rank = STORED.on(device), LOW_RANK.on(device)
        self.attend, self.write, self.gated = ATTEND.on(device), WRITE.on(device), GATED.on(device)
        if as_trained:
            self.attend = attend
        self._norm, self._turned = NORM.on(device), ROTARY.on(device)
        self._scale = SCALE.on(device)

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """`lorafold.ops.fused.rms_norm`: x (..., d) normalized, times the gain (d,).

        Args:
            x: the input (..., d).
            gain: the gain (d,).
            eps: what is added to the mean square.
        """
        y: Tensor = self._norm(x.contiguous(), gain, eps)
        return y

    def scale(self, y: Tensor, g: Tensor, c: Tensor | None) -> Tensor:
        """`lorafold.ops.scale.scale`: y times gains, plus offsets.

        Args:
            y: the output of a layer (B, T, k).
            g, c: a gain and an offset, fp32, of all rows (k,) or of each (B, k).
        """
        if g.dim() > 1:
            g, c = g[:, None], None if c is None else c[:, None]
        # torch's dispatcher takes longer, which counts on a CPU alone
        half = SCALE if y.is_cuda else self._scale
        z: Tensor = (half if y.dtype is torch.bfloat16 else scaled)(y.contiguous(), g, c, None)
        return z

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`lorafold.ops.fused.rotary`: x (..., D) rotated by halves.

        Args:
            x: the input (B, H, T, D).
            cos, sin: constants that broadcast to x.
        """
        y: Tensor = self._turned(x, cos, sin, False)
        return y


def available(device: str, as_trained: bool = False) -> Operations:
    """The operations in their forms for a kind of device; the plain ones where there are none or,
    which the log says, where they can't be compiled.

    Args:
        as_trained: attend as training does.
    """
    if why := use(DECODING, device):
        log.info("the engine's operations run in torch: %s", why)
    return Operations("" if why else device, as_trained)
