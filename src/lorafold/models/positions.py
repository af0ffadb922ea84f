"""The maximum row length that a model's position embeddings allow.

    wpe (n, d)              position embeddings, learned or computed once: longer rows fail
    bias (1, 1, n, n)       a causal mask in a buffer: sequences of more than n tokens fail, even
                            if they are packed from short rows
    cos(p w), sin(p w)      rotary positions are unlimited, but the model was trained on only as
                            many as its configuration contains

The first two are tables of a fixed size. A position table may begin with unused rows: two in OPT
and BART, and all rows up to the padding index in RoBERTa. Models with relative positions (T5,
ALiBi) and recurrent models have no limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorafold.core.anatomy import Anatomy
from lorafold.errors import LorafoldError
from lorafold.models.quantizations import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MIN_ROW_TOKENS = 2  # one token to read and one to predict
MAX_UNUSED_ROWS = 2  # the maximum number of unused rows of a table
GROWING_TABLE_METHOD = "make_weights"  # the method of tables that grow on demand
# RoPE types whose factor extends the configuration's number of positions
SCALED_ROPE_TYPES = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class Positions:
    """The numbers of positions of a model of class `owner`: `table` is the size of its position
    table, and `trained` the number of positions seen in training. None means no limit.
    """

    owner: str
    table: int | None
    trained: int | None

    def after(self, before: int) -> Positions:
        """The positions that remain for a row if `before` positions precede it."""
        if self.table is None:
            return self
        if self.table - before < MIN_ROW_TOKENS:
            raise LorafoldError(
                f"{self.owner} has {self.table} positions, and virtual tokens take {before} of each"
                f" row; expected at least {MIN_ROW_TOKENS} for the row itself"
            )
        return replace(self, table=self.table - before)

    def fitted(self, length: int | None, usual: int) -> tuple[int, str | None]:
        """The length to truncate rows to, for a requested `length` or (if None) the `usual` length,
        and a message if it is less than usual or more than in training.
        """
        table, trained = self.table, self.trained
        if length is None:
            most = min(n for n in (usual, table, trained) if n is not None)
            has = "allows rows of" if most == table else "was trained on"
            line = f"max_length {most} instead of {usual}: {self.owner} {has} {most} positions"
            return most, line if most < usual else None
        if table is not None and length > table:
            raise LorafoldError(
                f"max_length {length}: expected at most {table}, the positions per row of"
                f" {self.owner}"
            )
        if trained is None or length <= trained:
            return length, None
        return length, (
            f"max_length {length}: {self.owner} was trained on {trained} positions, so longer"
            " rows have tokens at positions never seen in training"
        )


def positions_of(model: PreTrainedModel) -> Positions:
    """The positions of a model. A tensor counts as a position table if it has about as many rows as
    the configuration has positions.
    """
    config, anatomy = model.config.get_text_config(), Anatomy.of(model)
    given, bounds = _configured_positions(config) or 0, [max_sequence_tokens(model)]
    for path, module in anatomy.language_modules if given else ():
        if path == anatomy.embedding or hasattr(module, GROWING_TABLE_METHOD):
            continue
        tables = [*module._buffers.values()]
        tables += [module._parameters["weight"]] if isinstance(module, nn.Embedding) else []
        for rows in (len(t) for t in tables if t is not None and t.ndim == 2):
            if given <= rows <= given + MAX_UNUSED_ROWS:
                padding = getattr(module, "padding_idx", None)
                before = getattr(module, "offset", 0 if padding is None else padding + 1)
                bounds.append(min(rows - int(before), given))
    table = min((n for n in bounds if n is not None), default=None)
    return Positions(type(model).__name__, table, None if table else trained_positions(config))


def positions_in(
    config: PreTrainedConfig, classifies: bool, trust_remote_code: bool = False
) -> Positions:
    """The positions of a model before it is loaded. If only tables can limit them, they are read
    from a fake model with one block.
    """
    from lorafold.models.fake import fake_model, without_values

    text, fp32 = config.get_text_config(), Storage(torch.float32)
    named = [*(config.architectures or []), config.model_type]
    trained = trained_positions(text)
    known = Positions(named[0], None, trained)
    if trained is not None or _configured_positions(text) is None:
        return known
    try:
        with without_values():
            return positions_of(fake_model(config, fp32, 1, int(classifies), trust_remote_code))
    except Exception:  # a model's own code may need values; then it is checked after loading
        return known


def max_sequence_tokens(model: nn.Module) -> int | None:
    """The maximum number of tokens in a packed or unpacked sequence, from causal masks in buffers;
    None if unlimited.
    """
    shapes = [tuple(buffer.shape) for buffer in model.buffers() if buffer.ndim == 4]
    return min((n for *one, m, n in shapes if one == [1, 1] and m == n > 1), default=None)


def trained_positions(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model with RoPE was trained on; None for other models. With
    scaled RoPE, it is at least the factor times `original_max_position_embeddings`, or times
    `max_position_embeddings` if a configuration lacks the former.
    """
    given, rotary = _configured_positions(config), getattr(config, "rope_parameters", None)
    if given is None or not isinstance(rotary, Mapping) or getattr(config, "alibi", False):
        return None
    kinds = [rotary] if "rope_type" in rotary else [*rotary.values()]
    stretched = [
        int((kind.get("original_max_position_embeddings") or given) * kind.get("factor", 1))
        for kind in kinds
        if isinstance(kind, Mapping) and kind.get("rope_type") in SCALED_ROPE_TYPES
    ]
    return max([given, *stretched])


def _configured_positions(config: PreTrainedConfig) -> int | None:
    size = getattr(config, "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None
