"""The tensors of a GGUF file, from the parameters of a model on its files.

    model.layers.0.self_attn.q_proj.weight    ->  blk.0.attn_q.weight, rows interleaved in llama
    model.layers.0.input_layernorm.weight     ->  blk.0.attn_norm.weight, one more in gemma
    ...mlp.experts.gate_up_proj (E, 2 I, H)   ->  blk.0.ffn_gate_exps.weight, ffn_up_exps (E, I, H)

A tied head is not there: llama.cpp takes the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.exporting.folded import Folded
from lorafold.exporting.gguf_metadata import Architecture

if TYPE_CHECKING:
    from gguf import TensorNameMap

HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
SUFFIXES = (".weight", ".bias")


def tensors_of(parameters: Iterable[Folded], config: Any, row: Architecture) -> Iterator[Folded]:
    """The tensors of the file, by their names there, from the parameters of a model.

    Raises LorafoldError for a parameter that has no name there.
    """
    names = names_of(row, config.num_hidden_layers)
    for parameter in parameters:
        yield from _placed(parameter, names, config, row)


def names_of(row: Architecture, layers: int) -> TensorNameMap:
    """The package's names of an architecture."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[row.name], layers)


def _placed(
    parameter: Folded, names: TensorNameMap, config: Any, row: Architecture
) -> Iterator[Folded]:
    stem, _, leaf = parameter.path.rpartition(".")
    shape = parameter.shape
    if leaf in ("gate_up_proj", "down_proj"):  # of all experts
        halves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        rows = shape[1] // len(halves)
        for n, half in enumerate(halves):
            made = parameter.part((shape[0], rows, shape[2]), partial(_rows, n * rows, rows))
            yield replace(made, path=_named(f"{stem}.{half}.weight", names))
        return
    module, made = stem.rpartition(".")[2], parameter
    if row.interleaved and module in HEADS:
        made = parameter.part(shape, partial(interleaved, heads=getattr(config, HEADS[module])))
    elif row.gain and parameter.path.endswith("norm.weight"):
        made = parameter.part(shape, lambda values: values.float() + row.gain)
    yield replace(made, path=_named(parameter.path, names))


def _named(path: str, names: TensorNameMap) -> str:
    found = names.get_name(path, try_suffixes=SUFFIXES)
    if found is None:
        raise LorafoldError(f"found a parameter {path}, for which llama.cpp has no name")
    return found


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * width, ...) of halves that rotate together, in llama.cpp's order, in which the
    two of a pair are neighbours.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _rows(start: int, count: int, values: Tensor) -> Tensor:
    return values[:, start : start + count]
