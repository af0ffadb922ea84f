"""The tensors of a GGUF file, from the parameters of a model on its files.

    model.layers.0.self_attn.q_proj.weight    ->  blk.0.attn_q.weight, rows interleaved in llama
    model.layers.0.input_layernorm.weight     ->  blk.0.attn_norm.weight, one more in gemma
    ...mlp.experts.gate_up_proj (E, 2 I, H)   ->  blk.0.ffn_gate_exps.weight, ffn_up_exps (E, I, H)

A tied head is not there: llama.cpp takes the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafold.errors import LorafoldError
from lorafold.exporting.gguf_metadata import Architecture

if TYPE_CHECKING:
    from gguf import TensorNameMap

HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Placed:
    """A tensor of the file: its name there, its shape, and its values when they are asked for."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


def tensors_of(model: nn.Module, config: Any, row: Architecture) -> Iterator[Placed]:
    """All tensors of a model. Raises LorafoldError for a parameter that has no name there."""
    names = names_of(row, config.num_hidden_layers)
    for path, parameter in model.named_parameters():
        yield from _placed(path, parameter, names, config, row)


def names_of(row: Architecture, layers: int) -> TensorNameMap:
    """The package's names of an architecture."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[row.name], layers)


def _placed(
    path: str, parameter: Tensor, names: TensorNameMap, config: Any, row: Architecture
) -> Iterator[Placed]:
    stem, _, leaf = path.rpartition(".")
    shape = tuple(parameter.shape)
    if leaf in ("gate_up_proj", "down_proj"):  # of all experts
        halves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        rows = shape[1] // len(halves)
        for n, half in enumerate(halves):
            name = _named(f"{stem}.{half}.weight", names)
            part = partial(_rows, parameter, n * rows, rows)
            yield Placed(name, (shape[0], rows, shape[2]), part)
        return
    module = stem.rpartition(".")[2]
    make = partial(_whole, parameter)
    if row.interleaved and module in HEADS:
        make = partial(interleaved, parameter, getattr(config, HEADS[module]))
    elif row.gain and path.endswith("norm.weight"):
        make = partial(_more, parameter, row.gain)
    yield Placed(_named(path, names), shape, make)


def _named(path: str, names: TensorNameMap) -> str:
    found = names.get_name(path, try_suffixes=SUFFIXES)
    if found is None:
        raise LorafoldError(f"gguf: found a parameter {path}, for which llama.cpp has no name")
    return found


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * width, ...) of halves that rotate together, in llama.cpp's order, in which the
    two of a pair are neighbours.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _whole(values: Tensor) -> Tensor:
    return values


def _rows(values: Tensor, start: int, count: int) -> Tensor:
    return values[:, start : start + count]


def _more(values: Tensor, gain: float) -> Tensor:
    return values.float() + gain
