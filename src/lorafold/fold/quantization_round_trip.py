"""Merges adapters that were trained on a quantized base into the original weights, by a delta below
them that quantizes and dequantizes the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.attach import attach_delta, selection_of
from lorafold.core.delta import Delta
from lorafold.core.expert_matrices import Matrices, module_at
from lorafold.core.layer import Layer, add
from lorafold.layers import layer_class, layer_of
from lorafold.models.loading import prequantized_storage
from lorafold.models.quantizations import ON_LOAD, STORAGES
from lorafold.models.quantize_on_load import quantizable_paths
from lorafold.models.sources import ModelSource
from lorafold.peft.adapter_directory import SavedAdapter, training_storage_of
from lorafold.peft.provenance import TrainingStorage

ROUND_TRIP = "round-trip"  # the name of the delta below the adapters


class RoundTrip(Delta):
    """Quantization and dequantization as a change of the weight: W (*matrices, out, in) -> q(W), in
    fp32 or wider.
    """

    def __init__(self, quantization: str, transposed: bool = False) -> None:
        super().__init__()
        self.quantization, self.transposed = quantization, transposed

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Any:
        w, b = self.fold(*layer.dense())
        return add(add(layer.op(x, w), onto), b)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(w.dtype, torch.float32)
        if w.is_meta:
            return torch.empty_like(w, dtype=wide), b
        stored = w.mT if self.transposed else w
        # expert weights are quantized as one matrix
        q = layer_of(STORAGES[self.quantization].pack(stored.flatten(0, -2))).dense()[0]
        q = q.view(stored.shape).to(wide)
        return q.mT if self.transposed else q, b


def attach_round_trip(model: nn.Module, quantization: str) -> None:
    """Attaches the round trip to every module that was quantized in training, for folding only."""
    selection = selection_of(model)
    for path in quantizable_paths(model):  # type: ignore[arg-type]
        module = module_at(model, path)
        delta = RoundTrip(quantization, isinstance(module, Matrices) and module.stored.transposed)
        attach_delta(module, layer_class(module), ROUND_TRIP, delta, selection, path)


def attach_training_round_trip(
    model: nn.Module, source: ModelSource, storage: str, adapters: Sequence[SavedAdapter]
) -> None:
    """Attaches the round trip of the adapters' quantization, unless the model's files are
    quantized.
    """
    training = training_storage_of(adapters) if storage == "auto" else TrainingStorage(storage)
    if training and training.storage in ON_LOAD and prequantized_storage(source) is None:
        attach_round_trip(model, training.storage)
