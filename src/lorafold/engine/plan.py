"""The planned step: a forward pass of a known kind of decoder as one call of `kernels/step.cpp`.

A plan is made for decoders whose layers have RMS norms, attention with rotary embeddings (grouped
queries, sliding windows, biases, norms of queries and keys) and a gated MLP, in fp32 or bf16 on a
CPU, if its logits are the model's own. Other models, and adapters other than low-rank updates and
gains, run through their torch modules.

The step has matmuls of its own, because oneDNN can't be called from outside torch, and because few
rows are bound by reading the weights: they are packed once, and each is read once for 8 rows (4
without AVX-512). Rows are multiplied in fp32, or as pairs of bf16 where the processor has an
instruction for that. Sums, and activations between matmuls, are fp32.
"""

from __future__ import annotations

import inspect
import logging
import mmap
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import deltas_on, selection_of
from lorafold.core.contexts import evaluating
from lorafold.engine.kv_cache import BlockCache, num_blocks
from lorafold.errors import EXITS, LorafoldError
from lorafold.kernels.compiling import DTYPES
from lorafold.kernels.step import step_function
from lorafold.layers import is_linear, layer_of
from lorafold.ops.elementwise import rms_norm, rotary
from lorafold.runtime.memory import free_bytes
from lorafold.training_step.fused_modules import activation_of, fused_rotary, rms_gain, rotary_of

log = logging.getLogger(__name__)
# the norms of a layer: before attention, after it, before the MLP, after it
NORMS = (
    ("input_layernorm", "", "post_attention_layernorm", ""),
    ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
     "post_feedforward_layernorm"),
)  # fmt: skip
# matrices with the same input, of attention and of the MLP
GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj", "qkv_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj", "gate_up_proj")),
    ("mlp", ("down_proj",)),
)
MATRICES = {name for _, names in GROUPS for name in names}
OTHERS = {"q_norm", "k_norm", "rotary_emb", "act_fn", "activation_fn"}
ACTIVATIONS = ("silu", "gelu_tanh")
ATTENTION_KINDS = ("full_attention", "sliding_attention")
TILE, WIDTHS = 16, (64, 32, 16)  # outputs of a vector's sums, and of a strip (`kernels/tiles.h`)
# columns of `StepPlan._table`: each matrix's outputs and inputs, caches, and rotary tables
SHAPES, KEYS, COS = [8, 9, 15, 16, 22, 23, 29, 30], 34, 36
POSITIONS = 1024  # rotary tables grow by this
CHECKED = 40  # tokens
LINE = 64  # bytes of a cache line


class Unplanned(LorafoldError):
    """Raised for a model that has no plan, with the reason."""


class PackedAdapter(NamedTuple):
    """An adapter's factors, gains and offsets in the step's layout; `table` has their addresses."""

    table: Tensor
    tensors: tuple[Tensor, ...]


class Part(NamedTuple):
    """A matrix among those that share an input."""

    at: int  # its first output
    out: int
    width: int  # outputs of its strips
    number: int  # among all


class HugePages:
    """Memory for tensors in huge pages, which are read in about half the time of others."""

    def __init__(self, nbytes: int) -> None:
        if sys.platform == "linux":
            memory = mmap.mmap(-1, max(1, nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.content = torch.frombuffer(memory, dtype=torch.uint8)
        else:
            self.content = torch.empty(nbytes, dtype=torch.uint8)
        self._end = 0

    def place(self, t: Tensor) -> Tensor:
        """Returns a copy of a tensor of any shape, at the next multiple of LINE bytes."""
        part = self.content[self._end : self._end + t.nbytes].view(t.dtype).view(t.shape)
        self._end += -(-t.nbytes // LINE) * LINE
        return part.copy_(t)


class StepPlan:
    """The packed matrices of a model. Raises Unplanned if it is not of a known kind, and
    Unavailable without a compiler.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model, model.dtype
        fits = model.device.type == "cpu" and self.dtype in DTYPES
        _require(fits, "it is not in bf16 or fp32 on a CPU")
        self._step = step_function(self.dtype)
        self._kept: list[Tensor] = []  # tensors whose addresses are in tables
        self._paths = {module: path for path, module in model.named_modules()}
        self._names, self._eps = selection_of(model).names, set[float]()
        self.parts: dict[str, Part] = {}
        embedding = model.get_input_embeddings()
        padding = WIDTHS[0] * embedding.weight[0].nbytes + LINE * len(self._paths)  # of the head
        self._pages = HugePages(matrix_bytes(model) + padding)
        self._decoder, head = model.get_decoder(), model.get_output_embeddings()
        self._layers = [*self._decoder.layers]
        # (layers, 39): `layer` of step.cpp
        self._table = torch.tensor([self._layer(layer) for layer in self._layers])
        self._unchanged(embedding)
        _require(embedding.weight.dtype == self.dtype, "its embedding has another dtype")
        weight, norm, out = embedding.weight, self._gain(self._decoder.norm), self._matrix([head])
        _require(len(self._eps) == 1, "its norms differ in epsilon")
        self._outputs, self._vocabulary = out[2], layer_of(head).shape[0]
        self._positions = self._rotated = 0
        self.grow(POSITIONS)
        config, first = model.config.get_text_config(), self._layers[0]
        attention, mlp = first.self_attn, first.mlp
        kinds = {*(getattr(config, "layer_types", None) or ())} - {*ATTENTION_KINDS}
        _require(not kinds, f"its layers have {', '.join(sorted(kinds))}")
        heads = config.num_attention_heads
        self._kv = getattr(config, "num_key_value_heads", None) or heads
        activation = activation_of(getattr(mlp, "act_fn", None) or mlp.activation_fn)
        _require(activation in ACTIVATIONS, "its MLP is not gated by SiLU or GELU with tanh")
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        hidden, d, width = weight.shape[1], attention.head_dim, layer_of(mlp.down_proj).shape[1]
        shapes = self._table[:, SHAPES].tolist()
        expected = [(heads + 2 * self._kv) * d, hidden, hidden, heads * d]
        expected += [2 * width, hidden, hidden, width]
        _require(all(shape == expected for shape in shapes), "its layers differ in their shapes")
        sizes = [
            len(self._layers), hidden, heads, self._kv, d, self._rotated,
            width, ACTIVATIONS.index(str(activation)),
            *(1 if one is None else len(one.weight) for one in norms),
        ]  # fmt: skip
        some = weight[: WIDTHS[0]].float()
        scale = (embedding(torch.arange(len(some))).float() * some).sum() / some.square().sum()
        doubles = torch.tensor([*self._eps, float(scale), attention.scaling], dtype=torch.float64)
        addresses = [self._table.data_ptr(), weight.data_ptr(), norm, *out]
        # `decoder` of step.cpp
        self._model = torch.tensor([*sizes, *doubles.view(torch.int64).tolist(), *addresses])
        self._kept.append(weight)
        self.stop = torch.zeros(1, dtype=torch.int32)  # 1: the running step raises
        self._check()

    def step(
        self, cache: BlockCache, tokens: Sequence[Sequence[int]], starts: Sequence[int],
        blocks: Sequence[Sequence[int]], adapters: Sequence[PackedAdapter | None],
        wanted: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """Returns the logits (n, V) in fp32 at n of the rows' tokens, numbered over all rows. A
        row's tokens are at the positions from its start on, and `blocks` are its blocks in the
        cache.
        """
        d = self._layers[0].self_attn.head_dim
        for i in range(len(self._layers) if not cache.keys else 0):
            cache.create(i, self._kv, d, d, self.dtype)
        pools = [(cache.keys[i].data_ptr(), cache.values[i].data_ptr()) for i in cache.keys]
        self._table[:, KEYS : KEYS + 2] = torch.tensor(pools)
        counts = torch.tensor([len(row) for row in tokens])
        rows = torch.arange(len(tokens)).repeat_interleave(counts)
        first = torch.tensor(starts) - counts.cumsum(0) + counts
        positions = torch.arange(len(rows)) + first[rows]
        self.grow(int(positions.max()) + 1)
        most = max(map(len, blocks))
        tables = torch.tensor([[*row, *[0] * (most - len(row))] for row in blocks])
        addresses = torch.tensor([0 if a is None else a.table.data_ptr() for a in adapters])
        ids, outputs = torch.tensor([*chain.from_iterable(tokens)]), torch.tensor(wanted)
        inputs = ids, positions, rows, addresses[rows], outputs, tables
        sizes = len(ids), len(outputs), most
        batch = torch.tensor([*sizes, *(t.data_ptr() for t in inputs)])  # `batch` of step.cpp
        logits = torch.empty(len(outputs), self._outputs)
        code = self._step(self._model, batch, logits, self.stop, torch.get_num_threads())
        if code:
            raise LorafoldError("stopped" if code == 1 else "too little memory for a step")
        return logits[:, : self._vocabulary]

    def pack(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        gains: Mapping[str, tuple[Tensor, Tensor | None]],
    ) -> PackedAdapter | None:
        """Packs the factors up (out, r) and down (r, in), gains and offsets (out,) of an adapter's
        matrices. Returns None if a step does not have all of them.
        """
        if not factors.keys() | gains.keys() <= self.parts.keys():
            return None
        table, tensors = torch.zeros(len(self.parts), 5, dtype=torch.long), dict[Any, Tensor]()
        for path, (up, down) in factors.items():
            part, more = self.parts[path], -len(down) % TILE
            down = pad(down.to(self.dtype), (0, 0, 0, more))
            up = pad(up.to(self.dtype), (0, more, 0, part.out - len(up)))
            tensors[part.number, 0] = packed(down, len(down))
            tensors[part.number, 1] = packed(up, part.width)
            table[part.number, 2] = len(down)
        for path, gain in gains.items():
            part = self.parts[path]
            for column, t in enumerate(gain, 3):
                if t is not None:
                    tensors[part.number, column] = pad(t.float(), (0, part.out - len(t)))
        pages = HugePages(sum(t.nbytes + LINE for t in tensors.values()))
        for at, t in tensors.items():
            tensors[at] = pages.place(t)
            table[at] = tensors[at].data_ptr()
        return PackedAdapter(table, tuple(tensors.values()))

    def grow(self, positions: int) -> None:
        """Extends the rotary tables to this number of positions."""
        if positions <= self._positions:
            return
        self._positions = -(-positions // POSITIONS) * POSITIONS
        embedding, tables = self._decoder.rotary_emb, dict[Any, list[Tensor]]()
        types = embedding.rope_type
        types = {*types.values()} if isinstance(types, dict) else {types}
        _require(not types & {"dynamic", "longrope"}, "its rotary embedding depends on the length")
        by_layer = "layer_type" in inspect.signature(embedding.forward).parameters
        at, x = torch.arange(self._positions)[None], torch.zeros(1, 1, 1)
        for row, layer in zip(self._table, self._layers, strict=True):
            attention, kind = layer.self_attn, []
            if not getattr(attention, "use_rope", True):
                continue
            if by_layer:
                names = (getattr(attention, n, None) for n in ("layer_type", "attention_type"))
                kind = [next(filter(None, names))]
            if str(kind) not in tables:
                with torch.no_grad():
                    tables[str(kind)] = [t[0].contiguous() for t in embedding(x, at, *kind)]
            cos, sin = tables[str(kind)]
            row[COS], row[COS + 1], self._rotated = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        self._tables = tables

    def _check(self) -> None:
        """Compares the logits of a prompt with the model's own."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self._vocabulary, (CHECKED,), generator=generator)
        cache = BlockCache(num_blocks(CHECKED), self.model.device)
        blocks = cache.allocate(num_blocks(CHECKED))
        found = self.step(cache, [ids.tolist()], [0], [blocks], [None], range(CHECKED))
        with evaluating(self.model):
            expected = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
        allowed = max(1e-5, 8 * torch.finfo(self.dtype).eps) * expected.norm()
        _require(bool((found - expected).norm() <= allowed), "its logits differ from the plan's")

    def _layer(self, layer: Any) -> list[int]:
        attention, mlp = layer.self_attn, layer.mlp
        children = {name: m for name, m in layer.named_children() if not isinstance(m, nn.Dropout)}
        names = {*children} - {"self_attn", "mlp"}
        norms = next((known for known in NORMS if {*filter(None, known)} == names), None)
        inner = {name for part in (attention, mlp) for name, _ in part.named_children()}
        others = (names if norms is None else set()) | (inner - MATRICES - OTHERS)
        _require(norms is not None and not others, f"its layers have {', '.join(sorted(others))}")
        plain = rotary_of(attention)
        rotates = plain is not None and fused_rotary(rotary, plain) is not None
        _require(rotates, "its attention does not rotate the halves of a head")
        capped = getattr(attention, "attn_logit_softcapping", None) is not None
        _require(not capped and not hasattr(attention, "sinks"), "it caps scores, or has sinks")
        of = [children.get(name) for name in norms or ()]
        of += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        gains = [0 if norm is None else self._gain(norm) for norm in of]
        matrices = []
        for part, group in GROUPS:
            there = (getattr(getattr(layer, part), name, None) for name in group)
            matrices += self._matrix([module for module in there if module is not None])
        of_config = getattr(attention.config, "sliding_window", None)
        window = getattr(attention, "sliding_window", of_config)
        return [*gains, *matrices, 0, 0, 0, 0, window or 0]

    def _gain(self, norm: nn.Module) -> int:
        found = rms_gain(rms_norm, norm)
        if found is None:
            raise Unplanned(f"{type(norm).__name__} is not an RMS norm")
        gain, eps = found
        self._eps.add(eps)
        return self._address(gain().detach().float().contiguous())

    def _matrix(self, modules: Sequence[nn.Module]) -> list[int]:
        """Packs matrices with the same input; returns `matrix` of step.cpp."""
        is_head = self._paths[modules[0]].count(".") == 0
        weights, biases, first = list[Tensor](), list[Tensor](), len(self.parts)
        for module in modules:
            self._unchanged(module)
            w, b = layer_of(module).dense() if is_linear(module) else (torch.empty(0), None)
            _require(w.dtype == self.dtype, f"{self._paths[module]} is not in {self.dtype}")
            more = -len(w) % WIDTHS[0] if is_head else 0  # a vocabulary can have any size
            b = w.new_zeros(len(w)) if b is None else b
            weights.append(pad(w.detach(), (0, 0, 0, more)))
            biases.append(pad(b.detach().float(), (0, more)))
        for module, w, end in zip(modules, weights, accumulate(map(len, weights)), strict=True):
            part = Part(end - len(w), len(w), _width(len(w)), len(self.parts))
            self.parts[self._paths[module]] = part
        w, b = torch.cat(weights), torch.cat(biases)
        width, table = _width(len(w)), torch.tensor([*self.parts.values()][first:])
        bias = self._address(b) if b.any() else 0
        weight = self._pages.place(packed(w, width))
        return [weight.data_ptr(), bias, *w.shape, width, len(modules), self._address(table)]

    def _unchanged(self, module: nn.Module) -> None:
        path = self._paths[module]
        _require(not deltas_on(module, self._names), f"an adapter is active on {path}")
        _require("forward" not in vars(module) and not module._forward_hooks, f"{path} is changed")

    def _address(self, t: Tensor) -> int:
        self._kept.append(t)
        return t.data_ptr()


def plan_of(model: Any) -> StepPlan | None:
    """Returns a model's plan, or logs why it has none and returns None. Quantized matrices are
    packed without quantization.
    """
    try:
        needed, free = packed_bytes(model), free_bytes(model.device)
        _require(2 * needed <= free, f"packed matrices take {needed:,} bytes, of {free:,} free")
        return StepPlan(model)
    except EXITS:
        raise
    except Exception as error:  # a model of another kind may lack any of the parts
        reason = error if isinstance(error, LorafoldError) else f"{type(error).__name__}: {error}"
        log.info("the engine runs this model through torch, which is slower: %s", reason)
    return None


def packed_bytes(model: Any) -> int:
    """Returns the bytes of the packed copies of a model's matrices and of its rotary tables, if it
    has a plan.
    """
    head_dim = getattr(model.config.get_text_config(), "head_dim", None) or 0
    return matrix_bytes(model) + 2 * POSITIONS * 4 * head_dim


def matrix_bytes(model: Any) -> int:
    shapes = [layer_of(m).shape for _, m in Anatomy.of(model).modules if is_linear(m)]
    return sum(map(prod, shapes)) * int(model.dtype.itemsize)


def packed(w: Tensor, width: int) -> Tensor:
    """Packs a matrix (out, in) in strips of `width` outputs (`kernels/tiles.h`)."""
    (out, size), each = w.shape, 4 // w.dtype.itemsize
    return w.reshape(out // width, width, size // each, each).transpose(1, 2).contiguous()


def _width(out: int) -> int:
    found = next((n for n in WIDTHS if out % n == 0), None)
    if found is None:
        raise Unplanned(f"it has a matrix with {out} outputs, expected a multiple of {TILE}")
    return found


def _require(fits: bool, otherwise: str) -> None:
    if not fits:
        raise Unplanned(otherwise)
