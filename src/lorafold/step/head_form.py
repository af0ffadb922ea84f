"""The linear form of a model's head, by which its logits are computed without the model.

Whether form and model agree is asked once for each state of the head, since a GPU has to be waited
for.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lorafold.core.fake import is_fake
from lorafold.ops.cross_entropy import LinearHead
from lorafold.ops.logits import widened


class _Known(NamedTuple):
    """Whether a head's linear form agrees with the model, and what that follows from."""

    model: ref[Any]
    weight: ref[Tensor]
    key: tuple[Any, ...]
    agree: bool

    def is_of(self, model: Any, weight: Tensor, key: tuple[Any, ...]) -> bool:
        return self.model() is model and self.weight() is weight and self.key == key


_agreed: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


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
        key, known = (w._version, linear.scale, linear.cap), _agreed.get(layer)
        if known is None or not known.is_of(model, w, key):
            agree = _agree(logits, linear.logits(h))
            _agreed[layer] = known = _Known(ref(model), ref(w), key, agree)
    return linear if known.agree else None


def _agree(expected: Tensor, found: Tensor) -> bool:
    """Whether logits (1, V) are the same but for rounding."""
    if expected.shape != found.shape:
        return False
    off, wide = 4 * torch.finfo(found.dtype).eps, widened(found.dtype)
    expected, found = expected.to(wide), found.to(wide)
    return bool((found - expected).norm() <= off * expected.norm())
