"""Fake models: modules with shapes and dtypes, but without values or memory.

    with without_values():
        model = fake_model(config, Storage(torch.bfloat16), blocks=2)

Fake models have transformers' own classes, so code for models runs on them unless it reads values
(`core.contexts`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from lorafold.core.contexts import is_fake
from lorafold.core.expert_matrices import expert_parameters
from lorafold.errors import LorafoldError
from lorafold.layers import layer_of
from lorafold.layers.bitsandbytes import set_compute_dtype
from lorafold.layers.expert_storage import quantize_experts
from lorafold.models.architecture import text_auto_class
from lorafold.models.classifier import expect_poolers, widen_heads
from lorafold.models.load_errors import loading
from lorafold.models.prequantized import can_read, make_quantized
from lorafold.models.quantizations import IN_FILES, STORAGES, Storage
from lorafold.models.quantize_on_load import quantizable_paths, use_quantized_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


COUNTING_ROUTER = "JetMoeTopKGating"  # a router that counts the rows of each expert
GROUPED_MM = torch.ops.aten._grouped_mm.default


def without_values() -> AbstractContextManager[Any]:
    """A context in which new tensors, and all results computed from fake tensors, are fake."""
    return _Fake(allow_non_fake_inputs=True)


class _Fake(FakeTensorMode):
    """A FakeTensorMode that supports grouped matmuls in every dtype; torch infers their shape only
    in bf16.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not GROUPED_MM:
            return super().__torch_dispatch__(func, types, args, kwargs)
        bf16 = [factor.to(torch.bfloat16) for factor in args[:2]]
        shape: Any = super().__torch_dispatch__(func, types, (*bf16, *args[2:]), kwargs)
        return shape.to(args[0].dtype)


def first_blocks(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """The configuration of a model that has only the first `blocks` blocks."""
    short = deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = blocks
    # some configurations compute layer_types, which then can't be set
    if kinds := vars(text).get("layer_types"):
        text.layer_types = [kinds[i % len(kinds)] for i in range(blocks)]
    return short


def period(config: PreTrainedConfig) -> int:
    """The number of blocks after which block types repeat, for example 2 if sliding-window and full
    attention alternate.
    """
    kinds = [*(getattr(config.get_text_config(), "layer_types", None) or [""])]
    size = len(kinds)
    return next(n for n in range(1, size + 1) if kinds == [kinds[i % n] for i in range(size)])


def fake_model(
    config: PreTrainedConfig,
    storage: Storage,
    blocks: int,
    classes: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A frozen model of the first `blocks` blocks, or a classifier if `classes` is not 0. Outside
    of `without_values`, its weights are random.
    """
    import transformers as tf

    short = first_blocks(config, blocks)
    if classes:
        text = short.get_text_config()
        short.num_labels, text.use_cache = classes, False
        if text.pad_token_id is None:
            text.pad_token_id = 0
    what = f"configuration of a {config.model_type}"
    auto = tf.AutoModelForSequenceClassification if classes else text_auto_class(config, what)
    fake = is_fake(torch.empty(0))
    # initialization may read values
    with loading(what), no_init_weights() if fake else nullcontext():
        trusted = {"trust_remote_code": trust_remote_code}  # transformers prompts if unset
        model = auto.from_config(short, dtype=storage.dtype, **trusted).requires_grad_(False)
        model.tie_weights()  # which no_init_weights skips
        for module in model.modules() if fake else ():
            if type(module).__name__ == COUNTING_ROUTER:
                module.forward = partial(_route_evenly, module)
        if classes:
            expect_poolers(model)
            widen_heads(model)
    settings = getattr(config, "quantization_config", None) or {}
    if storage.quantization is not None and can_read(settings):
        make_quantized(model, settings, what)
        use_quantized_experts(model)
        for module in model.modules():
            set_compute_dtype(module, storage.dtype)
    elif storage.quantization in IN_FILES:
        raise LorafoldError(
            f"storage {storage.quantization}: the {what} is not quantized, expected a model"
            " whose files are stored that way"
        )
    elif storage.quantization is not None:
        pack = STORAGES[storage.quantization].pack
        for path in quantizable_paths(model):
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            if name in expert_parameters(owner):
                owner._parameters[name] = quantize_experts(owner._parameters[name], pack)
                continue
            w, b = layer_of(owner.get_submodule(name)).dense()
            linear: Any = pack(w)
            linear.bias = b
            setattr(owner, name, linear)
        use_quantized_experts(model)
    return model


def _route_evenly(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
    """Routes x (T, H) to JetMoe's experts with equally many rows for each, because counting the
    rows of experts needs values.
    """
    logits = router.layer(x).float()  # (T, E)
    gates = logits.topk(router.top_k, dim=1)[0].softmax(1).type_as(x)  # (T, k)
    order = gates.flatten().argsort()
    rows, n = len(order), router.num_experts
    sizes = [rows * (i + 1) // n - rows * i // n for i in range(n)]
    return order, order // router.top_k, gates.flatten()[order], sizes, logits
