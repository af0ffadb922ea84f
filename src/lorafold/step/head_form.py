"""The linear form of a model's head, by which its logits are computed without the model.

Whether form and model agree is asked once for each state of the head, since a GPU has to be waited
for.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorafold.core.fake import is_fake
from lorafold.ops.cross_entropy import LinearHead
from lorafold.ops.logits import widened

# of a head, whether its linear form agrees with the model, by what that follows from
_agreed: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def linear_form(model: Any, logits: Tensor, h: Tensor) -> LinearHead | None:
    """Return the linear form of the head, or None. The head has one if it is frozen and the form's
    logits for h (1, d) agree with the `logits` that the model computed.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    plain = type(layer) is nn.Linear and isinstance(w := layer.weight, nn.Parameter)
    if logits.requires_grad or not plain:
        return None
    if (w.dtype, w.device, layer.in_features) != (h.dtype, h.device, h.shape[-1]):
        return None
    scale = getattr(model, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    linear = LinearHead(w, layer.bias, scale, getattr(config, "final_logit_softcapping", None))
    with torch.no_grad():
        if is_fake(h):
            return linear if logits.shape == linear.logits(h).shape else None
        # the answer of the device is waited for once
        key = (id(model), id(w), w._version, linear.scale, linear.cap)
        known = _agreed.setdefault(layer, {})
        if key not in known:
            known.clear()
            known[key] = _agree(logits, linear.logits(h))
    return linear if known[key] else None


def _agree(expected: Tensor, found: Tensor) -> bool:
    """Whether logits (1, V) are the same but for rounding."""
    if expected.shape != found.shape:
        return False
    off, wide = 4 * torch.finfo(found.dtype).eps, widened(found.dtype)
    expected, found = expected.to(wide), found.to(wide)
    return bool((found - expected).norm() <= off * expected.norm())
