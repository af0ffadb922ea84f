"""Loading of quantized models: bitsandbytes quantizes one tensor at a time, or the files are
already quantized.

Linear layers of the blocks and matrices of experts are quantized; embeddings, norms, routers and
heads are not. Files are not memory-mapped, so peak memory is the quantized model plus one
tensor.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from lorafold.core.anatomy import Anatomy, beneath
from lorafold.core.expert_matrices import Matrices, experts_layout, module_at
from lorafold.core.targets import block_linears
from lorafold.errors import LorafoldError
from lorafold.layers import is_linear, layer_of
from lorafold.layers.bitsandbytes import import_bitsandbytes, set_compute_dtype
from lorafold.layers.compressed import CompressedLinear
from lorafold.layers.expert_storage import FloatExperts, quantize_experts, stored_matrices
from lorafold.layers.experts import run_over_layers
from lorafold.models.prequantized import (
    can_read,
    check_codes,
    has_mxfp4_experts,
    ignored_quantization_note,
    make_mxfp4_experts,
    make_quantized,
    match_scale_dtypes,
    storage_in_files,
)
from lorafold.models.quantizations import (
    COMPRESSED_NAMES,
    IN_FILES,
    ON_LOAD,
    STORAGES,
    Storage,
    bnb_storage,
)
from lorafold.models.weights import FileWeights, model_files
from lorafold.ops.nf4 import BLOCK
from lorafold.runtime.memory import RETURN_FREED, malloc_policy

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from lorafold.models.sources import ModelSource

log = logging.getLogger(__name__)

# quant_method -> the package that transformers needs to read it
READER_PACKAGES = {"gptq": "gptqmodel", "awq": "gptqmodel", "auto-round": "auto_round"}


def quantization_of(settings: Mapping[str, Any], what: str) -> str:
    """The name of the quantization in a `quantization_config`: a name in STORAGES, or fp4."""
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    if settings.get("load_in_8bit"):
        return str(bnb_storage(8))
    if can_read(settings):
        return storage_in_files(settings, what)
    method = str(settings.get("quant_method", "unknown"))
    advice = "use the unquantized model instead"
    package = READER_PACKAGES.get(method)
    if package is None:
        methods = (row.method for row in STORAGES.values())
        raise LorafoldError(
            f"{what}: unsupported quantization {method}; supported: compressed-tensors"
            f" ({', '.join(COMPRESSED_NAMES)}), {', '.join(filter(None, methods))}, bitsandbytes"
            f" ({', '.join(ON_LOAD)}); {advice}"
        )
    absent = importlib.util.find_spec(package) is None
    raise LorafoldError(
        f"{what}: the weights are quantized with {method} (package {package}"
        f"{', not installed' * absent}), which lorafold does not support; {advice}"
    )


def quantizable_paths(model: PreTrainedModel) -> list[str]:
    """The paths of the matrices in blocks that can be quantized. Their number of inputs must be
    divisible by 64, because bitsandbytes' forward is wrong for other matrices on some CPUs.
    """
    anatomy = Anatomy.of(model)
    inside = filter(beneath([anatomy.decoder]), block_linears(model, is_linear))
    layers = ((p, layer_of(module_at(model, p))) for p in inside if p != anatomy.head)
    return [p for p, layer in layers if layer.takes_vectors and layer.shape[1] % BLOCK == 0]


def read_quantized(
    auto: Any, source: ModelSource, storage: Storage, device: torch.device, **config: Any
) -> tuple[Any, Any]:
    """Loads a quantized model with an auto class and these fields of its configuration replaced.
    Returns the model and transformers' report on its weights.

    Raises ImportError if bitsandbytes is needed but not installed.
    """
    from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

    path, quantization, trusted = source.path, storage.quantization, source.trust_remote_code
    configuration = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **config)
    settings: Any = getattr(configuration, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    what = f"model {source.name}"
    stored = None if settings is None else quantization_of(settings, what)
    if stored is None and quantization in IN_FILES:
        raise LorafoldError(
            f"{what}: the files are not quantized; lorafold can quantize them to"
            f" {' or '.join(ON_LOAD)}, not to {quantization}"
        )
    if stored not in (None, quantization):
        raise LorafoldError(
            f"{what}: the weights are stored as {stored}, so they can't be loaded as"
            f" {quantization}; load them as {stored}"
        )
    is_prequantized = stored is not None and can_read(settings)
    if is_prequantized:
        # transformers would round scales to `dtype`, and dequantize every weight on the first call
        del configuration.quantization_config
    else:
        import_bitsandbytes()
    with torch.device("meta"):
        empty = auto.from_config(configuration, trust_remote_code=trusted)
    cls, options = type(empty), dict[str, Any](dtype=torch.bfloat16)
    quantizing: AbstractContextManager[Any] = nullcontext()
    if is_prequantized:
        cls, options = _prepared_class(empty, settings, path, what), {"dtype": storage.dtype}
    elif stored is None:
        packed = set(quantizable_paths(empty))
        plain = [p for p, m in Anatomy.of(empty).modules if is_linear(m) and p not in packed]
        bnb = STORAGES[str(quantization)].bnb_options
        options["quantization_config"] = BitsAndBytesConfig(**bnb, llm_int8_skip_modules=plain)
        quantizing = quantizing_experts(str(quantization))
    weights = FileWeights(model_files(path), mapped=False)
    with malloc_policy(RETURN_FREED), quantizing:
        model, info = cls.from_pretrained(
            None,
            config=configuration,
            state_dict={n: weights.slice(n) for n in weights.names},
            device_map={"": device},
            use_kernels=False,
            output_loading_info=True,
            **options,
        )
    use_quantized_experts(model)
    if is_prequantized:
        model.__class__ = type(empty)
        model.config.quantization_config = settings
        check_codes(model, what)
        if note := ignored_quantization_note(settings, what):
            log.warning(note)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), info


def _prepared_class(model: PreTrainedModel, settings: dict[str, Any], path: Path, what: str) -> Any:
    """A subclass of a model's class whose constructor inserts the quantized layers for the files.
    """
    from lorafold.models.checkpoint import map_to_parameters, tensor_entries

    make_quantized(model, settings, what)
    match_scale_dtypes(model, map_to_parameters(model, tensor_entries(path))[0], what)
    linears = {p: m for p, m in Anatomy.of(model).modules if isinstance(m, CompressedLinear)}

    class Prepared(type(model)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for at, module in linears.items():
                module._parameters["bias"] = self.get_submodule(at).bias
                self.set_submodule(at, module)
            if has_mxfp4_experts(settings):
                make_mxfp4_experts(self, settings, what)

    return Prepared


@contextmanager
def quantizing_experts(quantization: str) -> Iterator[None]:
    """A context that quantizes parameters of experts when they are registered, so that only one at
    a time is in 16 bits.
    """
    pack = STORAGES[quantization].pack

    def quantize(module: Any, name: str, parameter: Any) -> Any:
        form = experts_layout(module)
        stored = None if form is None else form.parameters.get(name)
        if stored is None or parameter.is_meta or parameter.dim() != 3 - stored.flat:
            return None
        if not parameter.is_floating_point():
            return None
        if FloatExperts(Matrices(module, name)).shape[2] % BLOCK:
            return None
        codes: Any = quantize_experts(parameter, pack)
        codes._is_hf_initialized = True  # otherwise transformers fills it with random values
        return codes

    with register_module_parameter_registration_hook(quantize):
        yield


def use_quantized_experts(model: torch.nn.Module) -> None:
    """Makes modules of experts compute with their quantized matrices."""
    for _, module in Anatomy.of(model).modules:
        if isinstance(module, Matrices) and stored_matrices(module).quantized:
            run_over_layers(module.routed)


def set_model_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Sets the dtype to which a quantized model dequantizes, and converts its other weights to it.
    """
    for module in model.modules():
        set_compute_dtype(module, dtype)
        if isinstance(module, CompressedLinear):  # already in this dtype, except for its scales
            module.freeze()
            continue
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or hasattr(tensor, "quant_state"):
                continue  # codes must keep their dtype
            if tensor.dtype == torch.bfloat16 != dtype:
                tensor.data = tensor.data.to(dtype)
                # registered again, to trigger registration hooks
                if isinstance(tensor, torch.nn.Parameter):
                    module.register_parameter(name, tensor)
                else:
                    persistent = name not in module._non_persistent_buffers_set
                    module.register_buffer(name, tensor, persistent)
    model.config.dtype = dtype
