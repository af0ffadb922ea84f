"""Finds the modules that read the residual stream h, with the norm before each, and the modules
that write to it. A fake model is run for this, so no weights are read.

    x = g * h / |h|_rms (+ b)       a module whose input is the output of a norm reads h; its input
                                    direction v is the direction g * v of h
    x = h                           a module whose input is a block's own input reads h too (OLMo 2)
    h + W x                         any other module with outputs of h's size writes to h

Residual stream: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    share of head h = |dW_h|^2 / |dW|^2        dW_h: the rows of q, k and v that make head h, or the
                                               columns of the output projection that read it

A projection is split into heads if its attention module has `head_dim`, and if its outputs (q, k,
v) or inputs (output projection) are num_attention_heads or num_key_value_heads times `head_dim`.
Fused projections are not split.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold.core.anatomy import Anatomy
from lorafold.core.expert_matrices import expert_parameters, module_at
from lorafold.errors import NotMergeable
from lorafold.inspecting.updates import Svd
from lorafold.layers import layer_of
from lorafold.models.fake import fake_model, without_values
from lorafold.models.quantizations import Storage

REMOTE_CODE_PACKAGE = "transformers_modules"  # the package of a model's own Python files


@dataclass(frozen=True)
class ResidualStream:
    """The paths of the modules that read or write the residual stream. `readers` maps each module
    to the norm before it, or "" without one; `size` is the stream's dimension.
    """

    readers: dict[str, str]
    writers: frozenset[str]
    embedding: str
    head: str
    size: int

    @property
    def final_norm(self) -> str | None:
        return self.readers.get(self.head) or None


def find_stream(model: PreTrainedModel) -> ResidualStream:
    config = model.config
    # key: the address of a tensor's storage; value: the norm that computed it ("" for a block's
    # input), and the tensor, so that its storage isn't freed and reused
    outputs = {}
    readers = {}
    modules_run: set[str] = set()
    with without_values(), torch.no_grad():
        # in bf16, which mixtures of experts require
        fake = fake_model(
            config,
            Storage(torch.bfloat16),
            config.get_text_config().num_hidden_layers,
            trust_remote_code=REMOTE_CODE_PACKAGE in type(model).__module__,
        ).eval()
        names = {id(module): path for path, module in fake.named_modules()}
        ends = fake.get_input_embeddings(), fake.get_output_embeddings()
        embedding, head = (names[id(end)] for end in ends)
        size = ends[0].weight.shape[1]

        def on_norm(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[output.untyped_storage()._cdata] = path, output

        def on_input(module: nn.Module, args: Any) -> None:
            outputs[args[0].untyped_storage()._cdata] = "", args[0]

        def on_run(reads: list[str], writes: list[str], module: nn.Module, args: Any) -> None:
            modules_run.update(writes)
            if (norm := outputs.get(args[0].untyped_storage()._cdata)) is not None:
                readers.update(dict.fromkeys(reads, norm[0]))

        for path, module in fake.named_modules():
            shapes = {tuple(parameter.shape) for parameter in module.parameters()}
            if shapes == {(size,)} and not [*module.children()]:  # a norm
                module.register_forward_hook(partial(on_norm, path))
            elif _shape(module):
                module.register_forward_pre_hook(partial(on_run, [path], [path]))
            elif parameters := expert_parameters(module):
                *firsts, last = (f"{path}.{name}" for name in parameters)
                writes = [last] * (not getattr(module, "has_post_expert_norm", False))
                module.register_forward_pre_hook(partial(on_run, firsts, writes))
        for path in Anatomy.of(fake).blocks:
            fake.get_submodule(path).register_forward_pre_hook(on_input)
        with suppress(RuntimeError):  # code that needs values fails on fake tensors
            fake(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        writers = {
            path
            for path in modules_run - readers.keys() - {head}
            if layer_of(module_at(fake, path)).shape[0] == size
        }
    return ResidualStream(readers, frozenset(writers), embedding, head, size)


@torch.no_grad()
def gain(norm: nn.Module, size: int) -> Tensor:  # (d,)
    """The gain g of a norm, from its outputs for z and -z (mean 0, rms 1), so its bias cancels."""
    z = torch.ones(size)
    z[1::2] = -1
    return (norm(z).float() - norm(-z).float()) / 2 * z


@dataclass(frozen=True)
class Heads:
    """The attention heads of a projection: `n` heads of dimension `size` each, on its output side
    (`out`) or its input side.
    """

    n: int
    size: int
    out: bool

    def shares(self, svd: Svd) -> list[float]:
        """The share of the update's energy in each head; zeros for a zero update."""
        side = svd.u if self.out else svd.v  # (n * size, k)
        energy = ((side * svd.s) ** 2).sum(1).reshape(self.n, self.size).sum(1)
        total = float(energy.sum())
        return [float(e) / total if total else 0.0 for e in energy]


def heads_in(model: PreTrainedModel, stream: ResidualStream) -> tuple[dict[str, Heads], list[str]]:
    config = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None)
    counts = {queries, getattr(config, "num_key_value_heads", None) or queries}
    heads, fused = {}, []
    for path, module in Anatomy.of(model).modules:
        size = getattr(model.get_submodule(path.rpartition(".")[0]), "head_dim", None)
        if not isinstance(size, int) or len(shape := _shape(module)) != 2:
            continue
        if path not in stream.readers and path not in stream.writers:
            continue
        out = path in stream.readers
        n, remainder = divmod(shape[0 if out else 1], size)
        if not remainder and n in counts:
            heads[path] = Heads(n, size, out)
        elif not remainder and out and n > max(c for c in counts if c):
            fused.append(path)
    return heads, fused


def _shape(module: nn.Module) -> tuple[int, ...]:
    try:
        return tuple(layer_of(module).shape)
    except NotMergeable:
        return ()
