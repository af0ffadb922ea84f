"""Trained token rows in PEFT's files: single rows of the embedding and of the head.

    trainable_token_indices                        ids for the input embedding and the modules tied
                                                   to it, or ids by module name
    {at}.token_adapter.trainable_tokens_delta      (k, d), the rows themselves (despite the name),
                                                   in the order of the ids

For a resized vocabulary, PEFT also writes the whole embedding and head. Rows in these matrices that
this base lacks, or that differ from the base's rows, are read as token rows of the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy, tied_modules
from lorafold.errors import LorafoldError, listed
from lorafold.layers import layer_class
from lorafold.models import fingerprint
from lorafold.models.weights import InMemory, Weights
from lorafold.peft.table_types import ROOT

INDICES = "trainable_token_indices"
ROWS = "token_adapter.trainable_tokens_delta"

ByPath = Mapping[str, tuple[int, ...]]
TokenIds = tuple[int, ...] | ByPath


def config_entry(model: nn.Module, own: Mapping[str, list[int]]) -> dict[str, Any]:
    """The config's entry for ids by module path: a list if only the input embedding has ids,
    otherwise lists by shortest unique path suffix.
    """
    if [*own] == Anatomy.of(model).vocabulary_ends[:1]:
        return {INDICES: next(iter(own.values()))}
    paths = Anatomy.of(model).paths

    def shortest(path: str) -> str:
        alone = (end for end in path_ends(path) if sum(p.endswith(end) for p in paths) == 1)
        return next(alone, path)

    return {INDICES: {shortest(path): ids for path, ids in own.items()}}


def resolve(model: nn.Module, ids: TokenIds) -> ByPath:
    """The ids in a config by module path."""
    if not isinstance(ids, Mapping):
        # PEFT looks for embed_tokens if the model does not name its embedding
        embedding, *_ = *Anatomy.of(model).vocabulary_ends, "embed_tokens"
        ids = {embedding: ids}
    paths = Anatomy.of(model).paths
    matches = {name: [p for p in paths if p.endswith(name)] for name in ids}
    if missing := [name for name, hits in matches.items() if not hits]:
        raise LorafoldError(f"{INDICES}: found no module {listed(missing)} in this model")
    return {path: ids[name] for name, hits in matches.items() for path in hits}


def with_resized_rows(
    model: nn.Module, ids: ByPath, file: InMemory, base: Weights
) -> tuple[ByPath, InMemory]:
    """The ids by module path and the file's tensors, in which token rows replace resized matrices.
    """
    all_ids, hidden, rows = dict(ids), set[str](), dict[str, Tensor]()
    trained = {i for some in ids.values() for i in some}
    for path in dict.fromkeys([*ids, *Anatomy.of(model).vocabulary_ends]):
        owner, key = _owner(model, path, ids), f"{ROOT}.{path}.{ROWS}"
        given = [file.get(key)] if key in file.names else []
        if owner and given and given[0].equal(file.get(f"{ROOT}.{owner}.{ROWS}")):
            hidden.add(key)
        matrix = next((n for n in file.names if base_key(n) == f"{ROOT}.{path}.weight"), None)
        own = base.find(f"{path}.weight") or (base.find(f"{owner}.weight") if owner else None)
        if matrix is None or own is None:
            continue
        values, before = file.get(matrix), ids.get(path, ())
        new = _new_rows(values, base.get(own), trained)
        if new is None:
            continue
        hidden.add(matrix)
        given, more = given if path in ids else [], [i for i in new if i not in before]
        if more and owner is None and all(t.shape[1:] == values.shape[1:] for t in given):
            all_ids[path] = (*before, *more)
            rows[key] = torch.cat([t.float() for t in (*given, values[more])])
    return all_ids, file.with_others(hidden, rows)


def _owner(model: nn.Module, path: str, ids: ByPath) -> str | None:
    """The path of the embedding whose token rows a tied module shares, or None."""
    if layer_class(model.get_submodule(path)).takes_ids:
        return None
    shared = tied_modules(model, model.get_submodule(path))
    return next((o for o in shared if o in ids and ids.get(path, ids[o]) == ids[o]), None)


def _new_rows(matrix: Tensor, own: Tensor, trained: set[int]) -> list[int] | None:
    """The ids of rows in the file's matrix that are new or differ from the base's rows; None if the
    matrix is not a resized matrix of the base.
    """
    old = len(own)
    same_width = matrix.dim() == 2 and matrix.shape[1:] == own.shape[1:]
    if not same_width or len(matrix) < old or not matrix.is_floating_point():
        return None
    differs = ~fingerprint.elements_equal(matrix[:old], own).all(1)
    new = [*differs.nonzero()[:, 0].tolist(), *range(old, len(matrix))]
    return new if not new or (new[0] in trained and 2 * len(new) < len(matrix)) else None


def base_key(key: str) -> str:
    """The key of a base weight without the names of PEFT's wrapper modules."""
    return re.sub(r"\.(token_adapter|base_layer|original_module)(?=\.)", "", key)


def path_ends(path: str) -> Iterator[str]:
    """The suffixes of a path that consist of whole parts, shortest first."""
    parts = path.split(".")
    return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
