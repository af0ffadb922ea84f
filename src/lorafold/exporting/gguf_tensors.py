"""The tensors of a GGUF file, from the parameters of a model with adapters merged in, one at a
time.

    model.layers.0.self_attn.q_proj.weight    ->  blk.0.attn_q.weight, rows interleaved in llama
    model.layers.0.input_layernorm.weight     ->  blk.0.attn_norm.weight, one more in gemma
    ...mlp.experts.gate_up_proj (E, 2 I, H)   ->  blk.0.ffn_gate_exps.weight, ffn_up_exps (E, I, H)

Merging is in fp32, rounded once by whoever writes. A tied head is left out: llama.cpp takes the
embedding. Tied parameters are written once, unless adapters change them in different ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from lorafold.core.attach import Adapted
from lorafold.core.matrices import module_at
from lorafold.errors import LorafoldError, NotMergeable, listed
from lorafold.exporting.gguf_metadata import Architecture
from lorafold.exporting.target import DOWN, GATE_UP, SiteFactors
from lorafold.fold.as_trained import ROUND_TRIP
from lorafold.fold.plan import plan_fold
from lorafold.merging.merged_tensors import before_and_after
from lorafold.models.weight_conversion import OnDemand

DELTAS = ".deltas."
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
BLOCK = 32
OUTPUT, EMBEDDING, ROUTER = "output.weight", "token_embd.weight", "ffn_gate_inp.weight"
AT_ONCE = 1 << 22  # weights that are converted together
LARGEST = 65504.0  # of F16
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class MergedParameter:
    """A parameter: its dotted name, its shape, and its values when they are asked for."""

    path: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @classmethod
    def known(cls, path: str, values: Tensor) -> MergedParameter:
        """A tensor that is there, of any shape."""
        return cls(path, tuple(values.shape), lambda: values)

    def part(self, shape: Sequence[int], of: Callable[[Tensor], Tensor]) -> MergedParameter:
        """What a function makes of the values (*, in), or (n,) of a vector."""
        return MergedParameter(self.path, tuple(shape), lambda: of(self.values()))


def folded(model: nn.Module, names: Sequence[str]) -> Iterator[MergedParameter]:
    """Yield the parameters of a model with adapters merged in; the model is not changed."""
    plan = plan_fold(model, (ROUND_TRIP, *names))
    if plan.problems:
        raise NotMergeable(listed((f"{path}: {why}" for path, why in plan.problems), "; "))

    def changed(name: str) -> Tensor:
        path, leaf = plan.sites[name]
        module: Adapted = module_at(model, path)  # type: ignore[assignment]
        return before_and_after(module, names, leaf)[1]

    def same(parameter: Tensor) -> Tensor:
        return parameter.make() if isinstance(parameter, OnDemand) else parameter

    untied = {name for first, others in plan.apart.items() for name in (first, *others)}
    seen: set[int] = set()
    left = dict(plan.shapes)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        shape = left.pop(path, None)
        if DELTAS in path or (id(parameter) in seen and path not in untied):
            continue
        seen.add(id(parameter))
        if shape is None:
            yield MergedParameter(path, tuple(parameter.shape), partial(same, parameter))
        else:
            yield MergedParameter(path, shape, partial(changed, path))
    for path, shape in left.items():  # biases that there were not
        yield MergedParameter(path, shape, partial(changed, path))


def type_of(name: str, shape: tuple[int, ...], tensors: str, tied: bool) -> str:
    """The type of a tensor."""
    if len(shape) < 2 or name.endswith(ROUTER):
        return "F32"
    if tensors in PLAIN:
        return tensors
    if shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if name == (EMBEDDING if tied else OUTPUT) else tensors


def size_of(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor."""
    per, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(torch.Size(shape).numel()) // per * size


def encoded(name: str, values: Tensor, kind: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor of any shape, in pieces."""
    rows, number = values.reshape(-1, values.shape[-1]), gguf.GGMLQuantizationType[kind]
    step = max(AT_ONCE // rows.shape[-1], 1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        if kind in PLAIN:
            made = some.to(PLAIN[kind]).contiguous()
            if kind == "F16" and not made.isfinite().all():
                raise LorafoldError(
                    f"gguf: {name} has a value of {float(some.float().abs().max()):.3g}, and F16"
                    f" has none above {LARGEST:,.0f}; expected --tensors BF16 or F32"
                )
            yield made.view(torch.uint8).numpy()
        else:
            yield gguf.quants.quantize(some.float().contiguous().numpy(), number)


def names_of(row: Architecture, layers: int) -> gguf.TensorNameMap:
    """The package's names of an architecture."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[row.name], layers)


def tensors_of(
    parameters: Iterable[MergedParameter], config: Any, row: Architecture
) -> Iterator[MergedParameter]:
    """The tensors of the file, by their names there, from the parameters of a model."""
    names = names_of(row, config.num_hidden_layers)
    for parameter in parameters:
        path, _, leaf = parameter.path.rpartition(".")
        if experts := leaf in (GATE_UP, DOWN):
            path, leaf = parameter.path, "weight"
        for part, count, of in _parts(path, experts, config, row):
            if row.gain and parameter.path.endswith("norm.weight"):
                of = partial(_raised, row.gain)
            name = names.get_name(f"{part}.{leaf}", try_suffixes=SUFFIXES)
            if name is None:
                raise LorafoldError(
                    f"found a parameter {part}.{leaf}, for which llama.cpp has no name"
                )
            shape = parameter.shape
            if count > 1:
                shape = (shape[0], shape[1] // count, shape[2])
            yield replace(parameter.part(shape, of) if of else parameter, path=name)


def _parts(
    path: str, experts: bool, config: Any, row: Architecture
) -> Iterator[tuple[str, int, Callable[[Tensor], Tensor] | None]]:
    """Yield the path, the number of parts and the mapping of rows of each matrix in the file."""
    stem, _, module = path.rpartition(".")
    if experts and module == GATE_UP:
        for n, half in enumerate(("gate_proj", "up_proj")):
            yield f"{stem}.{half}", 2, partial(_half, n)
    elif row.interleaved and module in HEADS:
        yield path, 1, partial(interleaved, heads=getattr(config, HEADS[module]))
    else:
        yield path, 1, None


def _raised(gain: float, values: Tensor) -> Tensor:
    return values.float() + gain


def _half(n: int, values: Tensor) -> Tensor:
    return values.chunk(2, 1)[n]


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * width, ...) with the two of a rotated pair next to each other."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def tensors_of_update(
    factors: SiteFactors, config: Any, row: Architecture
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors, of any shape, by name, and why others have no place there."""
    names = names_of(row, config.num_hidden_layers)
    tensors = {}
    problems = []
    tied = bool(config.tie_word_embeddings)
    for path, (up, down) in factors.items():
        for part, _, of in _parts(path, up.dim() == 3, config, row):
            name = names.get_name(f"{part}.weight", try_suffixes=SUFFIXES)
            if name is None:
                problems.append(f"{path}: llama.cpp has no tensor for it in {row.name}")
            elif tied and name in (EMBEDDING, OUTPUT):
                problems.append(
                    f"{path}: the head is the embedding in this model, and llama.cpp has one matrix"
                    " for both, which an adapter can't change"
                )
            else:
                tensors[f"{name}.lora_a"] = down.mT if name == EMBEDDING else down
                tensors[f"{name}.lora_b"] = of(up) if of else up
    return tensors, problems
