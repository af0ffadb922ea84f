"""The operations of a pass: those of `ops.decoding`, and norms, rotations and gates without
gradients, by their forms on one kind of device (`kernels.table`).
"""

from __future__ import annotations

import logging

from torch import Tensor

from lorafold.engine.as_trained import attend
from lorafold.kernels.table import DECODING, use
from lorafold.ops.decoding import ATTEND, LOW_RANK, STORED, WRITE
from lorafold.ops.gated import GATED
from lorafold.ops.norm import NORM
from lorafold.ops.rotary import ROTARY

log = logging.getLogger(__name__)

# by device, the operations whose numbers for a row are the same bits whatever rows and tokens are
# beside it, which is what a request's answer rests on
INDEPENDENT = {
    "": frozenset({"write", "rotary"}),
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

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """`lorafold.ops.norm.rms_norm`: x (..., d) normalized, times the gain (d,).

        Args:
            x: the input (..., d).
            gain: the gain (d,).
            eps: what is added to the mean square.
        """
        y: Tensor = self._norm(x.contiguous(), gain, eps)
        return y

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`lorafold.ops.rotary.rotary`: x (..., D) rotated by halves.

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
