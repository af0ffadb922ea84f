"""Models whose files are quantized by another tool: by compressed-tensors, as fine-grained FP8, or
in MXFP4, as gpt-oss is released: which matrices are, how, and whether the files have what that
takes.

    fp8      float8_e4m3fn with a scale for the matrix, a row, or a block    0.50 of bf16's bytes
    int8     8-bit integers                                                  0.50
    int4     4-bit integers, packed into int32, in rows or groups            0.25 and the scales
    mxfp4    experts.gate_up_proj_blocks (E, out, in / 32, 16), two codes a byte, and
             experts.gate_up_proj_scales (E, out, in / 32), powers of two    0.27

The package compressed-tensors reads its own configurations and matches modules with them. The
linears become `layers.compressed.CompressedLinear`, and matrices of experts in MXFP4 parameters of
the files' names (`layers.expert_matrices`), so the codes stay as they are in memory, and what the
model computes does not depend on other packages' kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.matrices import expert_parameters, matrices_of
from lorafold.errors import LorafoldError, as_one
from lorafold.layers import layer_class
from lorafold.layers.compressed import CompressedLinear, QuantizationFormat
from lorafold.layers.dense import Linear
from lorafold.layers.expert_matrices import BLOCKS, GROUP, SCALES, mxfp4_parameters
from lorafold.models.load_errors import one_line
from lorafold.models.quantizations import IN_CODES, STORAGES, of_codes, of_method
from lorafold.models.weights import DTYPES, NAMES, TensorEntry
from lorafold.ops.float8 import is_nan
from lorafold.ops.mxfp4 import NAN

COMPRESSED, PACKED = "compressed-tensors", "pack-quantized"  # a quant_method, and a format of it
FLOATS = ("F32", "F16", "BF16")
# the last parts of tensors' names that only quantized weights have
PARTS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx"),
    *(f"_proj{BLOCKS}", f"_proj{SCALES}"),
)


def readable(settings: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one that lorafold itself reads."""
    return stored_compressed(settings) or stored_mxfp4(settings)


def storage_in_files(settings: Mapping[str, Any], what: str) -> str:
    """Return the storage of a readable `quantization_config`.

    Raises LorafoldError, in messages that begin with `what`, as `compressed.storage_of` does.
    """
    if stored_mxfp4(settings):
        return str(of_method(settings["quant_method"]))
    return storage_of(settings, what)


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
        compress(model, settings, what, torch.bfloat16)


def as_in_files(model: nn.Module, entries: Mapping[str, TensorEntry], what: str) -> None:
    """Give the scales of a model on the meta device the dtypes of the files.

    Raises LorafoldError with every tensor that a quantized weight lacks or that does not fit it.

    Args:
        model: After `make_quantized`.
        entries: The tensors of the files by the model's names.
        what: What messages begin with.
    """
    problems = [*misfits(model, entries)]
    if problems:
        raise LorafoldError(f"{what}: {as_one(problems)}")
    scales_as_in_files(model, entries)


def check_quantized(model: nn.Module, what: str) -> None:
    """Raise LorafoldError for codes and scales that no weight can have, by name.

    Args:
        model: The model with its values.
        what: What messages begin with.
    """
    check_values(model, what)
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
    for path, module in Anatomy.of(model).modules:
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
    for path, module in Anatomy.of(model).modules:
        for matrices in expert_parameters(module):
            for name in (matrices + BLOCKS, matrices + SCALES):
                if (parameter := module._parameters.get(name)) is not None:
                    yield f"{path}.{name}", parameter


def stored_compressed(settings: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of those that this module reads."""
    return settings.get("quant_method") == COMPRESSED or _fine_grained(settings)


def _fine_grained(settings: Mapping[str, Any]) -> bool:
    name = of_method(settings.get("quant_method"))
    return name is not None and STORAGES[name].codes[0] == "float"


def storage_of(settings: Mapping[str, Any], what: str) -> str:
    """Return the storage of a `quantization_config`: fp8, int8 or int4.

    Raises LorafoldError, in messages that begin with `what`, if it is none of them, or mixed, or if
    compressed-tensors is not installed.
    """
    found = sorted({str(of_codes(c.kind, c.bits)) for c, _ in _groups(settings, what)})
    if len(found) != 1:
        raise LorafoldError(
            f"{what}: its weights are stored in {len(found)} ways ({', '.join(found)}), expected"
            f" one of {', '.join(IN_CODES)}"
        )
    return found[0]


def remark(settings: Mapping[str, Any], what: str) -> str | None:
    """A line on what the files ask for and training does not do, or None; it begins with `what`."""
    asked = [
        *["activations"] * (_activations(settings)),
        *["the cache of keys and values"] * bool(settings.get("kv_cache_scheme")),
    ]
    if not asked:
        return None
    return (
        f"{what}: its files ask to quantize {' and '.join(asked)} too, which are computed"
        " unquantized, since a merged adapter would compute something else otherwise"
    )


def compress(model: Any, settings: Mapping[str, Any], what: str, scales: torch.dtype) -> None:
    """Make the quantized linears of a model without values `CompressedLinear`.

    Raises LorafoldError if something else than a linear is quantized.

    Args:
        model: The model as its architecture has it.
        settings: The `quantization_config` of its files.
        what: What messages begin with.
    """
    for path, codes in codes_of(model, settings, what).items():
        parent, _, name = path.rpartition(".")
        module: Any = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, CompressedLinear(module, codes, scales))


def codes_of(model: Any, settings: Mapping[str, Any], what: str) -> dict[str, QuantizationFormat]:
    """Return how the quantized linears of a model are stored, by path.

    Args:
        model: The model as its architecture has it.
        settings: The `quantization_config` of its files.
        what: What messages begin with.
    """
    found: dict[str, QuantizationFormat] = {}
    for codes, targets in _groups(settings, what):
        found |= {path: codes for path in _matched(model, settings, targets) if path not in found}
    head = model.get_output_embeddings()
    for path in found:
        module = model.get_submodule(path)
        if layer_class(module) is not Linear or module is head:
            kind = "the head" if module is head else f"of class {type(module).__name__}"
            raise LorafoldError(
                f"{what}: its quantization_config quantizes {path}, {kind}; expected linears of the"
                " blocks"
            )
    if not found:
        raise LorafoldError(f"{what}: its quantization_config matches no linear of the model")
    return found


def scales_as_in_files(model: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Give the scales of a model on the meta device the dtypes of the files.

    Args:
        model: After `compress`.
        entries: The tensors of the files by the model's names, without `misfits`.
    """
    for path, module in _compressed(model):
        entry = entries[f"{path}.{module.codes.scale}"]
        empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        module._parameters[module.codes.scale] = nn.Parameter(empty, requires_grad=False)


def check_values(model: nn.Module, what: str) -> None:
    """Raise LorafoldError for scales that are zero or not finite, for codes that are not numbers,
    and for recorded shapes that are not those of the model, with the names of the tensors.

    Args:
        model: The model with its values.
        what: What messages begin with.
    """
    for path, module in _compressed(model):
        name = module.codes.scale
        scale = module._parameters[name].detach()  # type: ignore[union-attr]
        wrong = scale[~(scale.isfinite() & (scale != 0))]
        if len(wrong):
            raise LorafoldError(
                f"{what}: {path}.{name}: found {wrong[0].item():g} ({len(wrong)} such scales),"
                " expected finite numbers other than 0"
            )
        codes: Any = module._parameters.get("weight")
        if module.codes.kind == "float" and (lost := int(is_nan(codes).sum())):
            raise LorafoldError(
                f"{what}: {path}.weight: found {lost} values that are not numbers, expected none"
            )
        recorded = module._parameters.get("weight_shape")
        shape = [module.out_features, module.in_features]
        if recorded is not None and recorded.tolist() != shape:
            raise LorafoldError(
                f"{what}: {path}.weight_shape: found {recorded.tolist()}, expected {shape}"
            )


def misfits(model: nn.Module, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Say of each tensor of a quantized weight that it is missing, or not of its dtype and shape.

    Args:
        model: After `make_quantized`.
        entries: The tensors of the files by the model's names.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    expected = [(name, p, ["U8"], False) for name, p in _parameters(model)]
    for path, module in _compressed(model):
        for name, p in module._parameters.items():
            if name != "bias" and p is not None:
                scales = name == module.codes.scale
                kinds = [*FLOATS] if scales else [NAMES[p.dtype]]
                expected.append((f"{path}.{name}", p, kinds, scales and p.numel() == 1))
    for name, p, kinds, one in expected:
        entry, wanted = entries.get(name), f"{' or '.join(kinds)} {list(p.shape)}"
        if entry is None:
            yield f"{name}: found in no weight file, expected {wanted}"
            continue
        fits = entry.shape == tuple(p.shape) or (one and entry.shape in ((), (1,), (1, 1)))
        if entry.dtype not in kinds or not fits:
            yield f"{entry.name}: found {entry.dtype} {list(entry.shape)}, expected {wanted}"
    for name, entry in entries.items():
        if name.endswith(PARTS) and name not in known:
            yield f"{entry.name}: found in the files, but quantization_config expects none"


def _compressed(model: nn.Module) -> Iterator[tuple[str, CompressedLinear]]:
    return ((path, m) for path, m in Anatomy.of(model).modules if isinstance(m, CompressedLinear))


def _activations(settings: Mapping[str, Any]) -> bool:
    if _fine_grained(settings):
        return True
    groups = settings.get("config_groups") or {}
    asked = ("input_activations", "output_activations")
    return any(not isinstance(g, Mapping) or any(map(g.get, asked)) for g in groups.values())


def _groups(settings: Mapping[str, Any], what: str) -> list[tuple[QuantizationFormat, list[str]]]:
    """How the weights are stored, and patterns of modules for which that is so."""
    if _fine_grained(settings):
        rows, columns = settings.get("weight_block_size", (128, 128)) or (0, 0)
        return [(QuantizationFormat("float", rows, columns, scale="weight_scale_inv"), [])]
    config = _configuration(settings, what)
    for field, value in (
        ("transform_config", settings.get("transform_config")),
        ("sparsity_config", (settings.get("sparsity_config") or {}).get("format", "dense")),
        ("quantization_status", config.quantization_status.value),
    ):
        if value not in (None, {}, "dense", "compressed"):
            raise LorafoldError(
                f"{what}: {field}: found {str(value)[:60]}, expected plain compressed weights"
            )
    return [
        (_codes(group, config.format, what), list(group.targets))
        for group in config.config_groups.values()
        if group.weights is not None
    ]


def _codes(group: Any, form: str, what: str) -> QuantizationFormat:
    weights, form = group.weights, str(getattr(group.format or form, "value", group.format or form))
    blocks = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, weights.group_size),
        "block": tuple(weights.block_structure or ()),
    }
    stored = of_codes(weights.type, weights.num_bits)
    strategy = str(weights.strategy)
    apart = not weights.symmetric and (weights.type == "float" or strategy == "tensor")
    if stored is None or form not in STORAGES[stored].codes[1] or strategy not in blocks or apart:
        raise LorafoldError(
            f"{what}: found weights in the format {form} ({weights.num_bits}-bit {weights.type}, a"
            f" scale for each {strategy}{', zero points' * (not weights.symmetric)}), expected"
            " float-quantized, int-quantized or pack-quantized ones of 8 or 4 bits, a scale for"
            f" each {', '.join(blocks)}"
        )
    rows, columns = blocks[strategy]
    packed = form == PACKED
    return QuantizationFormat(
        weights.type, rows, columns, weights.num_bits, packed, weights.symmetric
    )


def _configuration(settings: Mapping[str, Any], what: str) -> Any:
    try:
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError:
        raise LorafoldError(
            f"{what}: its weights are stored by compressed-tensors, and that package is not"
            " installed; install lorafold[quantized]"
        ) from None
    try:
        return QuantizationConfig.model_validate(dict(settings))
    except ValueError as error:
        raise LorafoldError(f"{what}: quantization_config: {one_line(error)}") from None


def _matched(model: Any, settings: Mapping[str, Any], targets: list[str]) -> list[str]:
    if _fine_grained(settings):
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        plain = HfQuantizer.get_modules_to_not_convert(
            model,
            settings.get("modules_to_not_convert") or settings.get("ignored_layers"),
            model._keep_in_fp32_modules,
        )
        linears = [path for path, m in Anatomy.of(model).modules if isinstance(m, nn.Linear)]
        return [path for path in linears if should_convert_module(path, plain)]
    from compressed_tensors.utils.match import match_named_modules

    return [path for path, _ in match_named_modules(model, targets, settings.get("ignore") or [])]
