"""Models whose files are quantized by another tool, whichever of these it was: the same four
questions to `models.compressed` (fp8, int8, int4), and to MXFP4 here, in which files hold the
matrices of experts, as gpt-oss is released.

    experts.gate_up_proj_blocks    (E, out, in / 32, 16)    two codes a byte
    experts.gate_up_proj_scales    (E, out, in / 32)        a power of two for 32 weights

Both stay in memory as they are in the files, as parameters of those names
(`bases.expert_matrices`), 4.25 bits a weight; everything else is plain. transformers would
dequantize all of it while it loads, wherever its own kernels can't run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lorafold.bases.expert_matrices import BLOCKS, GROUP, SCALES, mxfp4_parameters
from lorafold.core.anatomy import bare_modules
from lorafold.core.matrices import expert_parameters, matrices_of
from lorafold.errors import LorafoldError, as_one
from lorafold.models import compressed
from lorafold.models.storages import STORAGES, of_method
from lorafold.models.weights import Entry
from lorafold.ops.mxfp4 import NAN


def readable(settings: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one that lorafold itself reads."""
    return compressed.stored_compressed(settings) or stored_mxfp4(settings)


def storage_in_files(settings: Mapping[str, Any], what: str) -> str:
    """Return the storage of a readable `quantization_config`.

    Raises LorafoldError, in messages that begin with `what`, as `compressed.storage_of` does.
    """
    if stored_mxfp4(settings):
        return str(of_method(settings["quant_method"]))
    return compressed.storage_of(settings, what)


def make_quantized(model: Any, settings: Mapping[str, Any], what: str) -> None:
    """Make what the files have quantized so in a model without values.

    Raises LorafoldError if the configuration does not fit the model.

    Args:
        model: The model as its architecture has it.
        settings: The `quantization_config` of its files.
        what: What messages begin with.
    """
    if stored_mxfp4(settings):
        make_mxfp4(model, settings, what)
    else:
        compressed.compress(model, settings, what, torch.bfloat16)


def as_in_files(model: nn.Module, entries: Mapping[str, Entry], what: str) -> None:
    """Give the scales of a model on the meta device the dtypes of the files.

    Raises LorafoldError with every tensor that a quantized weight lacks or that does not fit it.

    Args:
        model: After `make_quantized`.
        entries: The tensors of the files by the model's names.
        what: What messages begin with.
    """
    problems = [*compressed.misfits(model, entries), *misfits(model, entries)]
    if problems:
        raise LorafoldError(f"{what}: {as_one(problems)}")
    compressed.scales_as_in_files(model, entries)


def check_quantized(model: nn.Module, what: str) -> None:
    """Raise LorafoldError for codes and scales that no weight can have, by name.

    Args:
        model: The model with its values.
        what: What messages begin with.
    """
    compressed.check_values(model, what)
    check_scales(model, what)


def stored_mxfp4(settings: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one that this module reads."""
    name = of_method(settings.get("quant_method"))
    return name is not None and not STORAGES[name].codes[0]


def make_mxfp4(model: nn.Module, settings: Mapping[str, Any], what: str) -> None:
    """Give the experts of a model parameters for blocks and scales, without values.

    Raises LorafoldError if there are no experts to give them to, or if rows are no whole groups.

    Args:
        model: The model as its architecture has it.
        settings: The `quantization_config` of its files.
        what: What messages begin with.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    plain, found = settings.get("modules_to_not_convert"), False
    for path, module in bare_modules(model):
        if not expert_parameters(module) or not should_convert_module(path, plain):
            continue
        for name, matrices in matrices_of(module).items():
            made = mxfp4_parameters(matrices)
            floats: Any = module._parameters.pop(name)
            inn = floats.shape[1 if matrices.stored.transposed else 2]
            if inn % GROUP:
                raise LorafoldError(
                    f"{what}: {path}.{name}: found rows of {inn} weights, expected a multiple of"
                    f" {GROUP}, the weights that share a scale of MXFP4"
                )
            module._parameters.update(made)
        # its own initialization asks for parameters that it has no longer
        module._is_hf_initialized = True  # type: ignore[assignment]
        found = True
    if not found:
        raise LorafoldError(f"{what}: its quantization_config matches no experts of the model")


def misfits(model: nn.Module, entries: Mapping[str, Entry]) -> Iterator[str]:
    """Say of each tensor of blocks or scales that it is missing, or not of its dtype and shape.

    Args:
        model: After `make_mxfp4`.
        entries: The tensors of the files by the model's names.
    """
    known = dict(_parameters(model))
    for name, parameter in known.items():
        entry, expected = entries.get(name), f"U8 {list(parameter.shape)}"
        if entry is None:
            yield f"{name}: found in no weight file, expected {expected}"
        elif (found := f"{entry.dtype} {list(entry.shape)}") != expected:
            yield f"{entry.name}: found {found}, expected {expected}"
    for name, entry in entries.items():
        if name.endswith((f"_proj{BLOCKS}", f"_proj{SCALES}")) and name not in known:
            yield f"{entry.name}: found in the files, but quantization_config expects none"


def check_scales(model: nn.Module, what: str) -> None:
    """Raise LorafoldError for scales of values that are not numbers, with the name of the tensor.

    Args:
        model: The model with its values.
        what: What messages begin with.
    """
    for name, parameter in _parameters(model):
        if name.endswith(SCALES) and (lost := int((parameter == NAN).sum())):
            raise LorafoldError(
                f"{what}: {name}: found {NAN}, which stands for not-a-number ({lost} such scales),"
                f" expected at most {NAN - 1}"
            )


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in bare_modules(model):
        for matrices in expert_parameters(module):
            for name in (matrices + BLOCKS, matrices + SCALES):
                if (parameter := module._parameters.get(name)) is not None:
                    yield f"{path}.{name}", parameter
