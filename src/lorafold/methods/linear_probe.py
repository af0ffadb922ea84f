"""Linear probe: a trained head on a frozen decoder.

    logits = W h + b                W (classes, d) and b (classes,) start as the model's own head; h
                                    (T, d) is never changed

Alain & Bengio 2016, arXiv 1610.01644. A linear probe measures how much of the task the base's
representation already contains; a method that does better has changed that representation. Linear
probes are for sequence classification, and train the head of `AutoModelForSequenceClassification`
whatever its name is.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.methods.common.biases_and_modules import ReplaceDelta


@dataclass(frozen=True)
class LinearProbe(Spec):
    """A linear probe, which has no options."""

    targets = "head"
    lr = 1e-3
    head_alone = True

    def build(self, layer: Layer) -> ReplaceDelta:
        return ReplaceDelta(layer.module, type(layer.module).__name__)
