"""The original weights of a quantized base, read from its files under the names of its parameters.

    block_sparse_moe.gate.weight                    ->  mlp.gate.weight
    experts.0.w1.weight, experts.0.w3.weight, ...   ->  experts.gate_up_proj

Where transformers computes parameters from several tensors, so the fingerprint of a base, and a
method that starts from its weights, find the experts by the names that the model has for them. The
files of other models are read as they are, since their names are the model's but for a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lorafold.errors import LorafoldError, listed
from lorafold.models.checkpoint import build, by_parameter, conversions, entries_of, mapped_tensors
from lorafold.models.load_errors import loading
from lorafold.models.sources import ModelSource
from lorafold.models.weights import FileWeights, InMemory, Weights, model_files


class MappedWeights(InMemory):
    """Tensors that are mapped from files, or are made of such when they are used.

    Args:
        tensors: the tensors, of any shape, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._tensors


def original_weights(source: ModelSource) -> Weights:
    """The weights in the files of a model.

    Raises LorafoldError if transformers can't compute a parameter from them.

    Args:
        source: The model, whose files must have been checked.
    """
    config = source.config()
    kinds = {config.get("model_type"), config.get("text_config", {}).get("model_type")}
    rules = [rule for kind in kinds for rule in get_checkpoint_conversion_mapping(kind) or ()]
    if not any(isinstance(rule, WeightConverter) for rule in rules):
        return FileWeights(model_files(source.path))
    with loading(f"model {source.name}"):
        trusted = source.trust_remote_code
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=trusted)
        model = build(config, trusted)
    entries = entries_of(source.path)
    tensors = mapped_tensors(entries.values())
    found, parts = by_parameter(model, entries)
    converted, problems = conversions(model, parts, tensors)
    if problems:
        raise LorafoldError(f"model {source.name}: {listed(problems.values(), '; ')}")
    own = {name: tensors[entry.name] for name, entry in found.items()}
    return MappedWeights(own | {name: c.parameter(name) for name, c in converted.items()})
