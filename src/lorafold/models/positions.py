"""How many tokens a row may have for a model's positions, and what a length is cut to.

    wpe (n, d)              an embedding of positions, learned or computed once: a row of more
                            tokens has none, and fails
    bias (1, 1, n, n)       which position sees which, in models that read their mask from a buffer:
                            a sequence of more than n tokens is beyond it, packed of short rows too
    cos(p w), sin(p w)      rotary positions have no end, but the model was trained on as many as
                            its configuration says; beyond them it computes what it never saw

The first two are tables. A table may begin with rows that no token has: two in OPT and BART, those
up to the padding in RoBERTa. Relative positions (T5, ALiBi) and recurrences are not bounded.
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

SHORTEST = 2  # tokens of a row: one to read and one to predict
OFFSET = 2  # the most rows before the first position of a table that does not say how many
ENDLESS = "make_weights"  # what a table has that computes more rows when it needs them
# kinds of rotary positions whose factor stretches the positions that the configuration has
STRETCHED = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class Positions:
    """The positions of a model, whose class is `owner`: those of its `table`, and those that it was
    `trained` on; None where nothing bounds them.
    """

    owner: str
    table: int | None
    trained: int | None

    def after(self, before: int) -> Positions:
        """What is left of a table for a row that comes after so many positions."""
        if self.table is None:
            return self
        if self.table - before < SHORTEST:
            raise LorafoldError(
                f"{self.owner} has {self.table} positions, of which {before} come before each row;"
                f" expected at least {SHORTEST} for the row"
            )
        return replace(self, table=self.table - before)

    def fitted(self, length: int | None, usual: int) -> tuple[int, str | None]:
        """The length that rows are cut to, for a requested length or, if there is none, the
        usual one, and a line about it if the positions bound it or do not reach as far.
        """
        table, trained = self.table, self.trained
        if length is None:
            most = min(n for n in (usual, table, trained) if n is not None)
            has = "has" if most == table else "was trained on"
            line = f"max_length {most} instead of {usual}: {self.owner} {has} {most} positions"
            return most, line if most < usual else None
        if table is not None and length > table:
            raise LorafoldError(
                f"max_length {length}: expected at most {table}, the positions that {self.owner}"
                " has"
            )
        if trained is None or length <= trained:
            return length, None
        return length, (
            f"max_length {length}: {self.owner} was trained on {trained} positions, so the tokens"
            " of longer rows are at positions that it never saw"
        )


def positions_of(model: PreTrainedModel) -> Positions:
    """The positions of a model. Its tables are those in its language model that have about as many
    rows as its configuration has positions; a table bounds rows by its own size.
    """
    config, anatomy = model.config.get_text_config(), Anatomy.of(model)
    given, bounds = _given(config) or 0, [sequence_of(model)]
    for path, module in anatomy.language_modules if given else ():
        if path == anatomy.embedding or hasattr(module, ENDLESS):
            continue
        tables = [*module._buffers.values()]
        tables += [module._parameters["weight"]] if isinstance(module, nn.Embedding) else []
        for rows in (len(t) for t in tables if t is not None and t.ndim == 2):
            if given <= rows <= given + OFFSET:
                padding = getattr(module, "padding_idx", None)
                before = getattr(module, "offset", 0 if padding is None else padding + 1)
                bounds.append(min(rows - int(before), given))
    table = min((n for n in bounds if n is not None), default=None)
    return Positions(type(model).__name__, table, None if table else trained_on(config))


def positions_in(
    config: PreTrainedConfig, classifies: bool, trust_remote_code: bool = False
) -> Positions:
    """The positions of the model that a configuration is of, of which one block is made without
    values, unless its positions are rotary or its configuration names none.
    """
    from lorafold.models.fake import fake_model, without_values

    text, fp32 = config.get_text_config(), Storage(torch.float32)
    named = [*(config.architectures or []), config.model_type]
    trained = trained_on(text)
    known = Positions(named[0], None, trained)
    if trained is not None or _given(text) is None:
        return known
    try:
        with without_values():
            return positions_of(fake_model(config, fp32, 1, int(classifies), trust_remote_code))
    except Exception:  # a model's own code may need values: once it is loaded, it is asked itself
        return known


def sequence_of(model: nn.Module) -> int | None:
    """The most tokens of a sequence, packed or not; None if no buffer bounds them."""
    shapes = [tuple(buffer.shape) for buffer in model.buffers() if buffer.ndim == 4]
    return min((n for *one, m, n in shapes if one == [1, 1] and m == n > 1), default=None)


def trained_on(config: PreTrainedConfig) -> int | None:
    """How many positions a model with rotary ones was trained on; None for other models. A factor
    stretches the positions before it, which some configurations name beside those after it, and
    some name alone.
    """
    given, rotary = _given(config), getattr(config, "rope_parameters", None)
    if given is None or not isinstance(rotary, Mapping) or getattr(config, "alibi", False):
        return None
    kinds = [rotary] if "rope_type" in rotary else [*rotary.values()]
    stretched = [
        int((kind.get("original_max_position_embeddings") or given) * kind.get("factor", 1))
        for kind in kinds
        if isinstance(kind, Mapping) and kind.get("rope_type") in STRETCHED
    ]
    return max([given, *stretched])


def _given(config: PreTrainedConfig) -> int | None:
    size = getattr(config, "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None
