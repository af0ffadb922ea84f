"""The modules that read the residual stream h, with the norm before each, and those that write to
it. They are found by running a fake model, whatever the modules are called.

    x = g * h / |h|_rms (+ b)       a module whose input is the output of a norm reads h; its input
                                    direction v is the direction g * v of h
    x = h                           a module whose input is a block's own input reads h too (in
                                    models such as OLMo 2, whose norms come after)
    h + W x                         a module that reads h in neither way, with outputs of h's size,
                                    writes to h

Of a module of experts, the first matrices read what the module reads, and the last ones write.

Fake tensors have no values (`lorafold.models.fake`), so the run takes no memory and reads no
weights. On the residual stream: Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits".
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold.bases import layer_of
from lorafold.core.anatomy import blocks
from lorafold.core.matrices import expert_parameters, module_at
from lorafold.errors import NotMergeable
from lorafold.models.fake import fake_model, without_values
from lorafold.models.storages import Storage

OWN_CODE = "transformers_modules"  # where transformers imports the Python files of a model from

@dataclass(frozen=True)
class Stream:
    """The modules of the residual stream, by path. `readers` maps each module that reads it to the
    norm before it, or to "" without one; `writers` write to it; `embedding` and `head` connect it
    with the vocabulary; `size` is its dimension.
    """

    readers: dict[str, str]
    writers: frozenset[str]
    embedding: str
    head: str
    size: int

    @property
    def final_norm(self) -> str | None:
        """The path of the norm before the head, or None."""
        return self.readers.get(self.head) or None


def stream_of(model: PreTrainedModel) -> Stream:
    """The modules of the model's residual stream, from a run of a fake model on four tokens."""
    config = model.config
    # from a tensor's memory to the norm that computed it, or "" for a block's input
    outputs: dict[int, str] = {}
    readers: dict[str, str] = {}
    seen: set[str] = set()
    kept: list[Tensor] = []  # keeps memory from being reused, which would mix up `outputs`
    with without_values(), torch.no_grad():
        # in bf16, which mixtures of experts require
        twin = fake_model(
            config,
            Storage(torch.bfloat16),
            config.get_text_config().num_hidden_layers,
            trust_remote_code=OWN_CODE in type(model).__module__,
        ).eval()
        names = {id(module): path for path, module in twin.named_modules()}
        embedding, head = (
            names[id(twin.get_input_embeddings())],
            names[id(twin.get_output_embeddings())],
        )
        size = twin.get_input_embeddings().weight.shape[1]

        def came(path: str, x: Tensor) -> None:
            kept.append(x)
            outputs[x.untyped_storage()._cdata] = path

        def normed(path: str, module: nn.Module, args: Any, output: Any) -> None:
            came(path, output)

        def entered(module: nn.Module, args: Any) -> None:
            came("", args[0])

        def read(path: str, module: nn.Module, args: Any) -> None:
            seen.add(path)
            if (norm := outputs.get(args[0].untyped_storage()._cdata)) is not None:
                readers[path] = norm

        def read_by_experts(path: str, module: nn.Module, args: Any) -> None:
            *firsts, last = (f"{path}.{name}" for name in expert_parameters(module))
            if (norm := outputs.get(args[0].untyped_storage()._cdata)) is not None:
                readers.update(dict.fromkeys(firsts, norm))
            if not getattr(module, "has_post_expert_norm", False):
                seen.add(last)

        for path, module in twin.named_modules():
            if is_norm(module, size):
                module.register_forward_hook(partial(normed, path))
            elif _is_matrix(module):
                module.register_forward_pre_hook(partial(read, path))
            elif expert_parameters(module):
                module.register_forward_pre_hook(partial(read_by_experts, path))
        for path in blocks(twin):
            twin.get_submodule(path).register_forward_pre_hook(entered)
        with suppress(RuntimeError):  # fake tensors end the run at code that needs values
            twin(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        writers = {
            path
            for path in seen - readers.keys() - {head}
            if layer_of(module_at(twin, path)).shape[0] == size
        }
    return Stream(readers, frozenset(writers), embedding, head, size)


def is_norm(module: nn.Module, size: int) -> bool:
    """Whether the module is a norm of the residual stream: it has only vectors of its size."""
    shapes = {tuple(p.shape) for p in module.parameters()}
    return shapes == {(size,)} and not any(True for _ in module.children())


@torch.no_grad()
def gain(norm: nn.Module, size: int) -> Tensor:  # (d,)
    """The gain g of a norm, whatever parameter it is computed from (Gemma's is g - 1): half the
    difference of the outputs for z and -z, of mean 0 and rms 1, in which a bias cancels.
    """
    z = torch.ones(size)
    z[1::2] = -1
    return (norm(z).float() - norm(-z).float()) / 2 * z


def _is_matrix(module: nn.Module) -> bool:
    try:
        return bool(layer_of(module).shape)
    except NotMergeable:
        return False
