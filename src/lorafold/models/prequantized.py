"""Models whose files are already quantized: compressed-tensors, fine-grained FP8, and gpt-oss's
MXFP4.

    fp8      float8_e4m3fn with a scale for the matrix, a row, or a block    0.50 of bf16's bytes
    int8     8-bit integers                                                  0.50
    int4     4-bit integers, packed into int32, in rows or groups            0.25 and the scales
    mxfp4    experts.gate_up_proj_blocks (E, out, in / 32, 16), two codes a byte, and
             experts.gate_up_proj_scales (E, out, in / 32), powers of two    0.27

The package compressed-tensors is used only to parse configurations and match module names. Codes
stay unchanged in memory, and results do not depend on the kernels of other packages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.expert_matrices import expert_parameters, matrices_of
from lorafold.errors import LorafoldError, join_problems
from lorafold.layers import layer_class
from lorafold.layers.compressed import CompressedLinear, QuantizationFormat
from lorafold.layers.dense import Linear
from lorafold.layers.expert_storage import BLOCKS, MXFP4_GROUP, SCALES, mxfp4_parameters
from lorafold.models.load_errors import one_line
from lorafold.models.quantizations import COMPRESSED_NAMES, STORAGES, codes_storage, method_storage
from lorafold.models.weights import DTYPES, NAMES, TensorEntry
from lorafold.ops.float8 import is_nan
from lorafold.ops.mxfp4 import NAN

COMPRESSED, PACKED = "compressed-tensors", "pack-quantized"  # a quant_method and one of its formats
FLOATS = ("F32", "F16", "BF16")
# suffixes of tensor names that only quantized weights have
QUANTIZED_SUFFIXES = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx"),
    *(f"_proj{BLOCKS}", f"_proj{SCALES}"),
)


def _code_type_of_method(settings: Mapping[str, Any]) -> str | None:
    """The type of codes that the `quant_method` implies: float for fine-grained FP8, empty for
    MXFP4, and None for any other method.
    """
    name = method_storage(settings.get("quant_method"))
    return None if name is None else STORAGES[name].codes[0]


def _fine_grained(settings: Mapping[str, Any]) -> bool:
    return _code_type_of_method(settings) == "float"


def has_mxfp4_experts(settings: Mapping[str, Any]) -> bool:
    return _code_type_of_method(settings) == ""


def can_read(settings: Mapping[str, Any]) -> bool:
    """Whether lorafold can read files with this `quantization_config` itself."""
    return settings.get("quant_method") == COMPRESSED or _code_type_of_method(settings) is not None


def storage_in_files(settings: Mapping[str, Any], what: str) -> str:
    """The name in STORAGES of the quantization in a `quantization_config` that `can_read` accepts.
    """
    if has_mxfp4_experts(settings):
        return str(method_storage(settings["quant_method"]))
    names = sorted(
        {str(codes_storage(fmt.code_type, fmt.bits)) for fmt, _ in _formats(settings, what)}
    )
    if len(names) != 1:
        raise LorafoldError(
            f"{what}: the weights are stored in {len(names)} quantizations ({', '.join(names)}),"
            f" expected exactly one of {', '.join(COMPRESSED_NAMES)}"
        )
    return names[0]


def make_quantized(model: Any, settings: Mapping[str, Any], what: str) -> None:
    """Replaces the linear layers or experts of a model without values (fake or on the meta device)
    by quantized layers.
    """
    if has_mxfp4_experts(settings):
        return make_mxfp4_experts(model, settings, what)
    formats: dict[str, QuantizationFormat] = {}
    for fmt, targets in _formats(settings, what):
        formats = dict.fromkeys(_matched_modules(model, settings, targets), fmt) | formats
    if not formats:
        raise LorafoldError(f"{what}: quantization_config matches no linear layer of the model")
    head = model.get_output_embeddings()
    for path, fmt in formats.items():
        module = model.get_submodule(path)
        if layer_class(module) is not Linear or module is head:
            kind = "the head" if module is head else f"of class {type(module).__name__}"
            raise LorafoldError(
                f"{what}: quantization_config includes {path}, {kind}; expected only linear layers"
                " of the transformer blocks"
            )
        model.set_submodule(path, CompressedLinear(module, fmt, torch.bfloat16))


def match_scale_dtypes(model: nn.Module, entries: Mapping[str, TensorEntry], what: str) -> None:
    """Gives the scales of a model on the meta device the files' dtypes, after `make_quantized`.
    Raises if tensors are missing or misshapen.
    """
    if problems := [*tensor_problems(model, entries)]:
        raise LorafoldError(f"{what}: {join_problems(problems)}")
    for path, module in _compressed(model):
        entry = entries[f"{path}.{module.fmt.scale}"]
        empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        module._parameters[module.fmt.scale] = nn.Parameter(empty, requires_grad=False)


def check_codes(model: nn.Module, what: str) -> None:
    """Checks that scales are finite and not zero, codes are not NaN, and recorded shapes are
    correct.
    """
    for path, module in _compressed(model):
        name, parameters = module.fmt.scale, module._parameters
        scale: Any = parameters[name]
        wrong = scale.detach()[~(scale.isfinite() & (scale != 0))]
        if len(wrong):
            raise LorafoldError(
                f"{what}: {path}.{name}: found {wrong[0].item():g} ({len(wrong)} such scales),"
                " expected finite numbers other than 0"
            )
        codes: Any = parameters.get("weight")
        if module.fmt.code_type == "float" and (num_nan := int(is_nan(codes).sum())):
            raise LorafoldError(f"{what}: {path}.weight: found {num_nan} NaN values, expected none")
        recorded, shape = parameters.get("weight_shape"), [module.out_features, module.in_features]
        if recorded is not None and recorded.tolist() != shape:
            raise LorafoldError(
                f"{what}: {path}.weight_shape: found {recorded.tolist()}, expected {shape}"
            )
    for name, parameter in _mxfp4_parameters(model):
        if name.endswith(SCALES) and (num_nan := int((parameter == NAN).sum())):
            raise LorafoldError(
                f"{what}: {name}: found {NAN}, which encodes NaN ({num_nan} such scales),"
                f" expected at most {NAN - 1}"
            )


def make_mxfp4_experts(model: nn.Module, settings: Mapping[str, Any], what: str) -> None:
    """Replaces the matrices of experts by parameters without values for MXFP4 blocks and scales."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    unconverted, quantized = settings.get("modules_to_not_convert"), 0
    for path, module in Anatomy.of(model).modules:
        if not expert_parameters(module) or not should_convert_module(path, unconverted):
            continue
        for name, matrices in matrices_of(module).items():
            parameters = mxfp4_parameters(matrices)
            floats: Any = module._parameters.pop(name)
            inn = floats.shape[1 if matrices.stored.transposed else 2]
            if inn % MXFP4_GROUP:
                raise LorafoldError(
                    f"{what}: {path}.{name}: found rows of {inn} weights, expected a multiple of"
                    f" {MXFP4_GROUP}, the block size of MXFP4"
                )
            module._parameters.update(parameters)
        # the module's own initialization would need the removed parameters
        module._is_hf_initialized = True  # type: ignore[assignment]
        quantized += 1
    if not quantized:
        raise LorafoldError(f"{what}: quantization_config matches no experts of the model")


def _mxfp4_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in Anatomy.of(model).modules:
        for matrices in expert_parameters(module):
            for name in (matrices + BLOCKS, matrices + SCALES):
                if (parameter := module._parameters.get(name)) is not None:
                    yield f"{path}.{name}", parameter


def ignored_quantization_note(settings: Mapping[str, Any], what: str) -> str | None:
    """A message about quantized activations or KV caches, which lorafold leaves unquantized; None
    if the `quantization_config` has neither.
    """
    groups = (settings.get("config_groups") or {}).values()
    sides = ("input_activations", "output_activations")
    activations = _fine_grained(settings) or any(
        not isinstance(group, Mapping) or any(map(group.get, sides)) for group in groups
    )
    ignored = [
        *["activations"] * activations,
        *["the KV cache"] * bool(settings.get("kv_cache_scheme")),
    ]
    if not ignored:
        return None
    return (
        f"{what}: quantization_config also quantizes {' and '.join(ignored)}, which lorafold"
        " leaves unquantized, because a merged adapter would give other outputs otherwise"
    )


def tensor_problems(model: nn.Module, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Yields a message for each tensor of a quantized weight that is missing, misshapen or
    unexpected.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    expected = [(name, p, ["U8"], False) for name, p in _mxfp4_parameters(model)]
    for path, module in _compressed(model):
        for name, p in module._parameters.items():
            if name != "bias" and p is not None:
                scales = name == module.fmt.scale
                dtypes = [*FLOATS] if scales else [NAMES[p.dtype]]
                expected.append((f"{path}.{name}", p, dtypes, scales and p.numel() == 1))
    for name, p, dtypes, is_scalar in expected:
        entry, wanted = entries.get(name), f"{' or '.join(dtypes)} {list(p.shape)}"
        if entry is None:
            yield f"{name}: missing in the weight files, expected {wanted}"
            continue
        fits = entry.shape == tuple(p.shape) or (is_scalar and entry.shape in ((), (1,), (1, 1)))
        if entry.dtype not in dtypes or not fits:
            yield f"{entry.name}: found {entry.dtype} {list(entry.shape)}, expected {wanted}"
    for name, entry in entries.items():
        if name.endswith(QUANTIZED_SUFFIXES) and name not in known:
            yield f"{entry.name}: found in the files, but not expected by quantization_config"


def _compressed(model: nn.Module) -> Iterator[tuple[str, CompressedLinear]]:
    return ((path, m) for path, m in Anatomy.of(model).modules if isinstance(m, CompressedLinear))


def _formats(settings: Mapping[str, Any], what: str) -> list[tuple[QuantizationFormat, list[str]]]:
    """The formats of the weights, each with the patterns of the modules that use it."""
    if _fine_grained(settings):
        rows, columns = settings.get("weight_block_size", (128, 128)) or (0, 0)
        return [(QuantizationFormat("float", rows, columns, scale="weight_scale_inv"), [])]
    try:
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(dict(settings))
    except ImportError:
        raise LorafoldError(
            f"{what}: the weights require the package compressed-tensors, which is not installed;"
            " install lorafold[quantized]"
        ) from None
    except ValueError as error:
        raise LorafoldError(f"{what}: quantization_config: {one_line(error)}") from None
    for field, value in (
        ("transform_config", settings.get("transform_config")),
        ("sparsity_config", (settings.get("sparsity_config") or {}).get("format", "dense")),
        ("quantization_status", config.quantization_status.value),
    ):
        if value not in (None, {}, "dense", "compressed"):
            raise LorafoldError(
                f"{what}: {field}: found {str(value)[:60]}, which lorafold does not support"
            )
    return [
        (_format_of_group(group, config.format, what), list(group.targets))
        for group in config.config_groups.values()
        if group.weights is not None
    ]


def _format_of_group(group: Any, default: str, what: str) -> QuantizationFormat:
    weights, named = group.weights, group.format or default
    name = str(getattr(named, "value", named))
    blocks = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, weights.group_size),
        "block": tuple(weights.block_structure or ()),
    }
    stored, strategy = codes_storage(weights.type, weights.num_bits), str(weights.strategy)
    known = stored is not None and name in STORAGES[stored].codes[1] and strategy in blocks
    zero_points = not weights.symmetric
    if not known or (zero_points and (weights.type == "float" or strategy == "tensor")):
        raise LorafoldError(
            f"{what}: found weights in the format {name} ({weights.num_bits}-bit {weights.type}, a"
            f" scale for each {strategy}{', zero points' * zero_points}), expected"
            " float-quantized, int-quantized or pack-quantized weights of 8 or 4 bits with a scale"
            f" for each {' or '.join(blocks)}"
        )
    rows, columns = blocks[strategy]
    return QuantizationFormat(
        weights.type, rows, columns, weights.num_bits, name == PACKED, weights.symmetric
    )


def _matched_modules(model: Any, settings: Mapping[str, Any], targets: list[str]) -> list[str]:
    if _fine_grained(settings):
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        unconverted = HfQuantizer.get_modules_to_not_convert(
            model,
            settings.get("modules_to_not_convert") or settings.get("ignored_layers"),
            model._keep_in_fp32_modules,
        )
        linears = [path for path, m in Anatomy.of(model).modules if isinstance(m, nn.Linear)]
        return [path for path in linears if should_convert_module(path, unconverted)]
    from compressed_tensors.utils.match import match_named_modules

    return [path for path, _ in match_named_modules(model, targets, settings.get("ignore") or [])]
