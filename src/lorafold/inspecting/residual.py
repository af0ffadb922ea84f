"""Which modules read the residual stream, through which norm, and which write to it: found by
running the model, not by its names.

    x = g * h / |h|_rms (+ b)       a norm; what takes exactly its output reads h, a direction v of
                                    its inputs being g v of h's
    x = h                           what takes a block's own input reads h too (where norms come
                                    after: OLMo 2)
    h + W x                         what reads h in neither way and gives vectors of h's size writes
                                    to h

The run has no values (`lorafold.models.fake`), so it costs no memory and reads no weight.
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
from lorafold.errors import NotMergeable
from lorafold.models.fake import fake_model, without_values
from lorafold.models.storage import Storage


@dataclass(frozen=True)
class Stream:
    """`readers`: the norm before each module that reads the residual stream, empty where there is
    none; `writers` write to it; `embedding` and `head` are the vocabulary's two ends, `size` the
    number of the stream's dimensions.
    """

    readers: dict[str, str]
    writers: frozenset[str]
    embedding: str
    head: str
    size: int

    @property
    def final_norm(self) -> str | None:
        return self.readers.get(self.head) or None


def stream_of(model: PreTrainedModel) -> Stream:
    """Trace a model of this configuration on four tokens."""
    config = model.config
    outputs: dict[int, str] = {}  # storage -> the norm that it came from, empty for a block's input
    readers: dict[str, str] = {}
    seen: set[str] = set()
    kept: list[Tensor] = []  # a storage that was given back might be another's soon
    with without_values(), torch.no_grad():
        # in bf16, which mixtures of experts ask for
        twin = fake_model(
            config, Storage(torch.bfloat16), config.get_text_config().num_hidden_layers
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

        for path, module in twin.named_modules():
            if is_norm(module, size):
                module.register_forward_hook(partial(normed, path))
            elif _is_matrix(module):
                module.register_forward_pre_hook(partial(read, path))
        for path in blocks(twin):
            twin.get_submodule(path).register_forward_pre_hook(entered)
        with suppress(RuntimeError):  # code that asks for values is followed that far
            twin(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        writers = {
            path
            for path in seen - readers.keys() - {head}
            if layer_of(twin.get_submodule(path)).shape[0] == size
        }
    return Stream(readers, frozenset(writers), embedding, head, size)


def is_norm(module: nn.Module, size: int) -> bool:
    shapes = {tuple(p.shape) for p in module.parameters()}
    return shapes == {(size,)} and not any(True for _ in module.children())


@torch.no_grad()
def gain(norm: nn.Module, size: int) -> Tensor:  # (d,)
    """g, whatever the module keeps (Gemma's is g - 1): from two inputs of mean zero and size one,
    between which a bias cancels.
    """
    z = torch.ones(size)
    z[1::2] = -1
    return (norm(z).float() - norm(-z).float()) / 2 * z


def _is_matrix(module: nn.Module) -> bool:
    try:
        return bool(layer_of(module).shape)
    except NotMergeable:
        return False
