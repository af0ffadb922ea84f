"""Where the factors of an update go in llama.cpp's form of an adapter, and in which order.

    W (out, in)        NAME.lora_a (r, in) = down         NAME.lora_b (out, r) = up
    embedding (V, d)   token_embd.weight.lora_a (V, r) = down^T    .lora_b (d, r) = up
    experts            ffn_{gate,up,down}_exps: lora_a (E, r, in), lora_b (E, out, r)

An embedding is taken as a map from tokens, so that its `up` is (d, r). Rows of `up` lie in the file
as those of W do: interleaved for queries and keys of llama, the halves of transformers'
gate_up_proj of experts apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorafold.exporting.gguf_metadata import Architecture
from lorafold.exporting.gguf_tensors import HEADS, SUFFIXES, interleaved, names_of
from lorafold.exporting.gguf_types import EMBEDDING, OUTPUT
from lorafold.exporting.update import Factors

if TYPE_CHECKING:
    from gguf import TensorNameMap


def tensors_of_update(
    factors: Mapping[str, Factors], config: Any, row: Architecture
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the file, of any shape, by their names there, and why others have no place, a
    line each.

    Args:
        factors: of each site, up (*matrices, out, r) and down (*matrices, r, in).
        config: of the base.
        row: llama.cpp's architecture for it.
    """
    names = names_of(row, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    problems = []
    tied = bool(config.tie_word_embeddings)
    for path, pair in factors.items():
        for part, (up, down) in _parts(path, pair, config, row):
            name = _name(part, names)
            if name is None:
                problems.append(f"{path}: llama.cpp has no tensor for it in {row.name}")
            elif tied and name in (EMBEDDING, OUTPUT):
                problems.append(
                    f"{path}: the head is the embedding in this model, and llama.cpp has one matrix"
                    " for both, which an adapter can't change"
                )
            elif name == EMBEDDING:
                tensors |= {f"{name}.lora_a": down.mT, f"{name}.lora_b": up}
            else:
                tensors |= {f"{name}.lora_a": down, f"{name}.lora_b": up}
    return tensors, problems


def _parts(
    path: str, pair: Factors, config: Any, row: Architecture
) -> Iterator[tuple[str, Factors]]:
    """The products of which the file has tensors, with rows in its order."""
    up, down = pair
    stem, _, module = path.rpartition(".")
    if up.dim() == 3 and module == "gate_up_proj":
        for half, rows in zip(("gate_proj", "up_proj"), up.chunk(2, 1), strict=True):
            yield f"{stem}.{half}", (rows, down)
    elif row.interleaved and module in HEADS:
        yield path, (interleaved(up, getattr(config, HEADS[module])), down)
    else:
        yield path, pair


def _name(path: str, names: TensorNameMap) -> str | None:
    found = names.get_name(f"{path}.weight", try_suffixes=SUFFIXES)
    return None if found is None else str(found)
