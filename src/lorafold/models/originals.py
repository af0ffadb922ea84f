"""The original weights of a quantized base, read from its files under the names of its parameters.

    experts.0.w1.weight, experts.0.w3.weight, ...   ->  experts.gate_up_proj

Where transformers computes parameters from several tensors, these stand for the tensors. So the
fingerprint of a base, and a method that starts from its weights, find the experts by the names that
the model has for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lorafold.errors import LorafoldError
from lorafold.models.checkpoint import build, by_parameter, mapped_tensors, open_checkpoint
from lorafold.models.converted import Conversion
from lorafold.models.load_errors import loading
from lorafold.models.sources import ModelSource
from lorafold.models.weights import FileWeights, Weights, model_files


class ConvertedWeights(Weights):
    """The tensors of files, where some have parameters in their place.

    Args:
        files: the tensors as they are.
        converted: the conversions by parameter.
    """

    def __init__(self, files: FileWeights, converted: Mapping[str, Conversion]) -> None:
        self.files, self.converted = files, converted
        taken = {entry.name for c in converted.values() for entry in c.entries}
        self._names = dict.fromkeys([*(n for n in files.names if n not in taken), *converted])

    @property
    def names(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        own = self.converted.get(name)
        return self.files.shape(name) if own is None else tuple(own.like[name].shape)

    def is_floating(self, name: str) -> bool:
        own = self.converted.get(name)
        return self.files.is_floating(name) if own is None else own.like[name].is_floating_point()

    def at(self, name: str, where: Tensor) -> Tensor:
        own = self.converted.get(name)
        return self.files.at(name, where) if own is None else own.parameter(name)[where.unbind(1)]

    def get(self, name: str) -> Tensor:
        own = self.converted.get(name)
        return self.files.get(name) if own is None else own.values()[name]


def original_weights(source: ModelSource) -> Weights:
    """The weights in the files of a model.

    Raises LorafoldError if transformers can't compute a parameter from them.

    Args:
        source: The model, whose files must have been checked.
    """
    files, config = FileWeights(model_files(source.path)), source.config()
    kinds = {config.get("model_type"), config.get("text_config", {}).get("model_type")}
    rules = [rule for kind in kinds for rule in get_checkpoint_conversion_mapping(kind) or ()]
    if "quantization_config" in config or not any(isinstance(r, WeightConverter) for r in rules):
        return files
    with loading(f"model {source.name}"):
        model = build(AutoConfig.from_pretrained(source.path), False)
    entries = open_checkpoint(source, ()).entries
    _, converted, problems = by_parameter(model, entries, mapped_tensors(entries.values()))
    if problems:
        raise LorafoldError(f"model {source.name}: {'; '.join(problems.values())}")
    return ConvertedWeights(files, converted)
