"""The planned step: a recognized decoder's forward pass as one call of `kernels/step.cpp`.

A decoder is recognized by its parts: RMS norms around attention and a gated MLP, rotary embeddings,
grouped queries, sliding windows. The plan then has to give the logits of the model itself. Other
models, and adapters that are not low-rank updates or gains, run through their torch modules.

The step multiplies with its own kernels, because oneDNN can't be called from outside torch, and
because few rows are bound by reading the weights: packed once, each weight is read once for 8 rows
(4 without AVX-512). bf16 weights are multiplied by bf16 inputs where the processor has instructions
for that, otherwise by fp32 inputs. Sums and all activations between products are in fp32.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorafold.core.attach import deltas_on, selection_of
from lorafold.core.contexts import evaluating
from lorafold.engine.kv_cache import BlockCache, num_blocks
from lorafold.engine.operations import Operations
from lorafold.errors import LorafoldError
from lorafold.kernels.compiling import DTYPES
from lorafold.kernels.step import step_function
from lorafold.layers import is_linear, layer_of
from lorafold.ops.elementwise import rms_norm, rotary
from lorafold.training_step.fused_modules import (
    activation_of,
    fused_rotary,
    rms_gain,
    rotary_of,
)

# the norms of a layer: before attention, after it, before the MLP, after it
NORMS: Mapping[frozenset[str], Sequence[str]] = {
    frozenset(filter(None, names)): names
    for names in (
        ("input_layernorm", "", "post_attention_layernorm", ""),
        ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
         "post_feedforward_layernorm"),
    )
}  # fmt: skip
QUERIES, GATES = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
TILE, WIDTHS = 16, (64, 32, 16)  # outputs of a vector's sums, and of a strip
CHECKED = 40  # tokens
POSITIONS = 1024  # rotary tables grow by this
ACTIVATIONS = ["silu", "gelu_tanh"]


class Unplanned(LorafoldError):
    """Raised for a model that has no plan, with the reason."""


class PackedAdapter(NamedTuple):
    """An adapter's factors, gains and offsets in the step's layout; `table` has their addresses."""

    table: Tensor
    tensors: tuple[Tensor, ...]


class Part(NamedTuple):
    """A matrix among those that share an input: its first output, outputs, width of strips, index.
    """

    at: int
    out: int
    width: int
    index: int


class Plan:
    """A decoder's packed matrices. Raises Unplanned if the model is not recognized, and Unavailable
    without a compiler.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model, model.dtype
        _require(model.device.type == "cpu" and self.dtype in DTYPES, "it is not bf16 or fp32 on a CPU")
        self._step = step_function(self.dtype)
        self._kept: list[Tensor] = []  # tensors whose addresses are in tables
        self._paths = {module: path for path, module in model.named_modules()}
        self._names, self._eps = selection_of(model).names, set[float]()
        self.parts: dict[str, Part] = {}
        config, self._decoder = model.config.get_text_config(), model.get_decoder()
        self._layers = [*getattr(self._decoder, "layers", ())]
        _require(bool(self._layers), "it has no layers")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        _require(isinstance(embedding, nn.Embedding) and head is not None, "it has no embedding")
        self._plain(embedding)
        weight = embedding.weight
        known = torch.arange(len(weight))[:64]
        scale = float((embedding(known).float() * weight[:64].float()).sum() / weight[:64].float().square().sum())
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        attention, mlp = self._layers[0].self_attn, self._layers[0].mlp
        act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
        activation = None if act is None else activation_of(act)
        _require(activation in ACTIVATIONS, "its MLP is not gated by SiLU or GELU with tanh")
        self.kv, self.head_dim, self.rotated = kv, attention.head_dim, 0
        rows = [self._layer(layer) for layer in self._layers]
        norm, out = self._gain(self._decoder.norm), self._matrix([head], padded=True)
        _require(len(self._eps) == 1, "its norms differ in epsilon")
        self._vocabulary, self._width = len(head.weight), out[2]
        self._table = torch.tensor(rows)  # (layers, 39), `layer` of step.cpp
        self.grow(POSITIONS)
        doubles = torch.tensor([*self._eps, scale, attention.scaling], dtype=torch.float64)
        normed = [len(getattr(getattr(attention, n, None), "weight", "0")) for n in ("q_norm", "k_norm")]
        sizes = [len(rows), weight.shape[1], heads, kv, self.head_dim, self.rotated]
        mlp_width = mlp.down_proj.weight.shape[1]
        sizes += [mlp_width, ACTIVATIONS.index(str(activation)), *normed]
        self._kept += [weight, self._table]
        addresses = [self._table.data_ptr(), weight.data_ptr(), norm, *out]
        self._model = torch.tensor([*sizes, *doubles.view(torch.int64).tolist(), *addresses])
        self.stop = torch.zeros(1, dtype=torch.int32)
        self._check()

    def _check(self) -> None:
        """Compares the logits of a prompt with the model's own."""
        ids = torch.randint(self._vocabulary, (CHECKED,), generator=torch.Generator().manual_seed(0))
        cache = BlockCache(num_blocks(CHECKED), self.model.device, Operations())
        self.bind(cache)
        blocks = cache.allocate(num_blocks(CHECKED))
        found = self.step([ids.tolist()], [0], [blocks], [None], range(CHECKED))
        with evaluating(self.model):
            expected = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
        allowed = max(1e-5, 8 * torch.finfo(self.dtype).eps) * expected.norm()
        _require(bool((found - expected).norm() <= allowed), "its logits differ from the plan's")

    def bind(self, cache: BlockCache) -> None:
        """Sets the cache that steps write and read."""
        for i, row in enumerate(self._table):
            cache.create(i, self.kv, self.head_dim, self.head_dim, self.dtype)
            row[34], row[35] = cache.keys[i].data_ptr(), cache.values[i].data_ptr()

    def step(
        self,
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        blocks: Sequence[Sequence[int]],
        adapters: Sequence[PackedAdapter | None],
        wanted: Sequence[int],
    ) -> Tensor:
        """Returns the logits (n, V) in fp32 at n of the tokens, which are numbered from the first
        row's first to the last row's last. Row b's tokens are at the positions from starts[b] on;
        `blocks` are its blocks in the cache.
        """
        counts = torch.tensor([len(row) for row in tokens])
        rows = torch.arange(len(tokens)).repeat_interleave(counts)
        starts_n = torch.tensor(starts).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        positions = torch.arange(len(rows)) - first + starts_n
        self.grow(int(positions.max()) + 1)
        wide = max(map(len, blocks))
        tables = torch.tensor([[*row, *[0] * (wide - len(row))] for row in blocks])
        of_row = torch.tensor([0 if a is None else a.table.data_ptr() for a in adapters])
        inputs = (
            torch.tensor([*chain.from_iterable(tokens)]), positions, rows, of_row[rows],
            torch.tensor(wanted), tables,
        )  # fmt: skip
        sizes = [len(rows), len(wanted), wide]
        batch = torch.tensor([*sizes, *(t.data_ptr() for t in inputs)])
        logits = torch.empty(len(wanted), self._width)
        code = self._step(self._model, batch, logits, self.stop, torch.get_num_threads())
        if code:
            raise LorafoldError("the step was stopped" if code == 1 else "the memory is too small for a step")
        return logits[:, : self._vocabulary]

    def pack(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        gains: Mapping[str, tuple[Tensor, Tensor | None]],
    ) -> PackedAdapter | None:
        """Packs the factors up (out, r) and down (r, in), gains and offsets (out,) of an adapter's
        matrices. Returns None if the plan does not have all of them.
        """
        if not factors.keys() | gains.keys() <= self.parts.keys():
            return None
        table, kept = torch.zeros(len(self.parts), 5, dtype=torch.long), []

        def address(t: Tensor | None) -> int:
            if t is None:
                return 0
            kept.append(t.contiguous())
            return kept[-1].data_ptr()

        for path, (up, down) in factors.items():
            part, more = self.parts[path], -len(down) % TILE
            up = pad(up.to(self.dtype), (0, more, 0, part.out - len(up)))
            down = pad(down.to(self.dtype), (0, 0, 0, more))
            packed = packed_matrix(down, len(down)), packed_matrix(up, part.width)
            table[part.index, :3] = torch.tensor([*map(address, packed), len(down)])
        for path, gain in gains.items():
            part = self.parts[path]
            given = (None if t is None else pad(t.float(), (0, part.out - len(t))) for t in gain)
            table[part.index, 3:] = torch.tensor([*map(address, given)])
        return PackedAdapter(table, tuple(kept))

    def grow(self, positions: int) -> None:
        """Extends the rotary tables to this number of positions."""
        if positions <= getattr(self, "_positions", 0):
            return
        self._positions = -(-positions // POSITIONS) * POSITIONS
        known: dict[Any, tuple[Tensor, Tensor]] = {}
        embedding = self._decoder.rotary_emb
        types = embedding.rope_type if isinstance(embedding.rope_type, dict) else {"": embedding.rope_type}
        _require(not {"dynamic", "longrope"} & {*types.values()}, "its rotary embedding is dynamic")
        typed = "layer_type" in inspect.signature(embedding.forward).parameters
        at, x = torch.arange(self._positions)[None], torch.zeros(1, 1, 1)
        for row, layer in zip(self._table, self._layers, strict=True):
            attention = layer.self_attn
            if not getattr(attention, "use_rope", True):
                continue
            kind = [kind_of(attention)] if typed else []
            if str(kind) not in known:
                with torch.no_grad():
                    cos, sin = (t[0].contiguous() for t in embedding(x, at, *kind))
                known[str(kind)] = cos, sin
            cos, sin = known[str(kind)]
            row[36], row[37] = cos.data_ptr(), sin.data_ptr()
            self.rotated = cos.shape[-1]
        self._rotary = known

    def _layer(self, layer: Any) -> list[int]:
        attention, mlp = layer.self_attn, layer.mlp
        norms = {n for n, _ in layer.named_children() if n.endswith("norm")}
        names = NORMS.get(frozenset(norms))
        other = {n for n, m in layer.named_children() if n not in norms} - {"self_attn", "mlp"}
        known = {*QUERIES, "qkv_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
        other |= {n for n, _ in attention.named_children()} - known
        other |= {n for n, _ in mlp.named_children()} - {*GATES, "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
        other |= {n for n, p in layer.named_parameters() if n.count(".") < 2 and "norm" not in n}
        other = {n for n in other if not isinstance(getattr(layer, n, None), nn.Dropout)}
        _require(names is not None and not other, f"its layers have other parts: {', '.join(sorted(norms | other))}")
        plain = rotary_of(attention)
        rotates = plain is not None and fused_rotary(rotary, plain) is not None
        _require(rotates, "its attention does not rotate the halves of heads")
        capped = getattr(attention, "attn_logit_softcapping", None) is not None
        _require(not capped and not hasattr(attention, "sinks"), "its attention is capped or has sinks")
        of = [getattr(layer, name, None) for name in names or ()]
        of += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        gains = [0 if norm is None else self._gain(norm) for norm in of]
        groups = (
            [m for n in (*QUERIES, "qkv_proj") if (m := getattr(attention, n, None)) is not None],
            [attention.o_proj],
            [m for n in (*GATES, "gate_up_proj") if (m := getattr(mlp, n, None)) is not None],
            [mlp.down_proj],
        )
        matrices = [x for group in groups for x in self._matrix(group)]
        return [*gains, *matrices, 0, 0, 0, 0, window_of(attention)]

    def _gain(self, norm: nn.Module) -> int:
        found = rms_gain(rms_norm, norm)
        _require(found is not None, f"{type(norm).__name__} is not an RMS norm")
        gain, eps = found
        self._eps.add(eps)
        return self._address(gain().detach().float())

    def _matrix(self, modules: Sequence[nn.Module], padded: bool = False) -> list[int]:
        """Packs matrices with the same input; returns `matrix` of step.cpp."""
        for module in modules:
            self._plain(module)
            _require(is_linear(module) and module._parameters["weight"].dtype == self.dtype, f"{self._paths[module]} is not in {self.dtype}")
        dense = [layer_of(module).dense() for module in modules]
        more = -len(dense[0][0]) % WIDTHS[0] if padded else 0
        ws = [pad(w.detach(), (0, 0, 0, more)) for w, _ in dense]
        bs = [w[:, 0] * 0 if b is None else pad(b.detach(), (0, more)) for w, (_, b) in zip(ws, dense)]
        w, first = torch.cat(ws), len(self.parts)
        width = _width(len(w))
        bias = self._address(torch.cat(bs).float()) if any(b is not None for _, b in dense) else 0
        for module, own, end in zip(modules, ws, accumulate(map(len, ws))):
            part = Part(end - len(own), len(own), _width(len(own)), len(self.parts))
            self.parts[self._paths[module]] = part
        table = torch.tensor([*self.parts.values()][first:])
        self._kept.append(table)
        return [self._address(packed_matrix(w, width)), bias, *w.shape, width, len(modules), table.data_ptr()]

    def _plain(self, module: nn.Module) -> None:
        path = self._paths[module]
        _require(not deltas_on(module, self._names), f"{path} has an active adapter")
        _require("forward" not in vars(module) and not module._forward_hooks, f"{path} is replaced")

    def _address(self, t: Tensor) -> int:
        self._kept.append(t.contiguous())
        return self._kept[-1].data_ptr()


def packed_matrix(w: Tensor, width: int) -> Tensor:
    """Packs a matrix (out, in) in strips of `width` outputs (`kernels/tiles.h`)."""
    (out, size), each = w.shape, 4 // w.dtype.itemsize
    return w.reshape(out // width, width, size // each, each).transpose(1, 2).contiguous()


def kind_of(attention: nn.Module) -> Any:
    return getattr(attention, "layer_type", getattr(attention, "attention_type", None))


def window_of(attention: nn.Module) -> int:
    config = attention.config
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window or 0


def _width(out: int) -> int:
    found = next((n for n in WIDTHS if out % n == 0), 0)
    _require(bool(found), f"it has a matrix with {out} outputs, not a multiple of 16")
    return found


def _require(fits: bool, otherwise: str) -> None:
    if not fits:
        raise Unplanned(f"the model has no planned step: {otherwise}")
