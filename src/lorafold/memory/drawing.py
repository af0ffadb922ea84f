"""Traces the bytes of an engine that draws completions beside a step, on a fake model.

It holds the fast path's form of the weights and the factors of what trains for the whole run, and
keys and values only while it draws. Passes are those of transformers' code, on as many tokens as
the engine computes at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lorafold.core.attach import selection_of
from lorafold.engine.adapters import attached
from lorafold.engine.fast_path import packed_bytes
from lorafold.engine.request import EngineSettings
from lorafold.engine.slots import columns
from lorafold.evaluation.rollouts import RolloutSize
from lorafold.memory.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS = EngineSettings()  # those of the tokens of prompts that are read in one pass
COPIES = 3  # of a pass's logits: the head's, those of the rows in order, and those that are chosen
KEPT = 3  # of an adapter's factors: as they are held, as passes read them, and zeros for other rows
TOKENS = 4, 8  # below any window of attention


class Drawing(NamedTuple):
    """Bytes that an engine has beside the model: always, and of keys and values and in all while it
    draws.
    """

    engine: int
    slots: int
    peak: int


@torch.no_grad()
def drawing(model: PreTrainedModel, drawn: RolloutSize, ledger: Ledger) -> Drawing:
    """Trace what draws.

    Args:
        model: A fake model with what trains attached, in evaluation mode.
        drawn: What is drawn at a time.
        ledger: The ledger that counts, already entered.
    """
    few, more = (_cached(model, n, ledger) for n in TOKENS)
    a_token = (more - few) // (TOKENS[1] - TOKENS[0])
    state = few - TOKENS[0] * a_token
    # what has a state beside keys and values computes one completion at a time
    slots = drawn.slots if state <= 0 else 1
    held = slots * (max(0, state) + columns(drawn.prompt + drawn.longest) * a_token)
    config = model.config.get_text_config()
    logits = COPIES * slots * config.vocab_size * model.dtype.itemsize
    read, prompts = min(drawn.prompt, SETTINGS.chunk), -(-slots // drawn.group)
    rows = max(1, min(prompts, SETTINGS.budget // read))
    passes = max(_workspace(model, rows, read, ledger), _workspace(model, slots, 1, ledger))
    factors = 0
    for delta in attached(model, selection_of(model).names).values():
        if (found := delta.factors()) is not None:
            factors += sum(t.numel() for t in found)
    engine = packed_bytes(model) + KEPT * factors * model.dtype.itemsize
    return Drawing(engine, held, held + max(passes, logits))


def _cached(model: PreTrainedModel, tokens: int, ledger: Ledger) -> int:
    start = ledger.now
    cache = model(input_ids=_ids(1, tokens), use_cache=True, logits_to_keep=1).cache
    found = ledger.now - start
    del cache
    return found


def _workspace(model: PreTrainedModel, rows: int, tokens: int, ledger: Ledger) -> int:
    ledger.peak = start = ledger.now
    model(input_ids=_ids(rows, tokens), use_cache=False, logits_to_keep=1)
    return ledger.peak - start


def _ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.zeros(rows, tokens, dtype=torch.long)
