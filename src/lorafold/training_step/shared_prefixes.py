"""Packed rows whose documents share their first tokens, such as two completions of one prompt.

A document consists of the first s tokens of the previous document, and of its own tokens at
positions s, s + 1, ... The last shared token can predict only one token, so each branch must begin
with the last token of the prompt. The backward pass may run after the `document_layout` block,
because masks are arguments of checkpointed layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lorafold.core.contexts import evaluating
from lorafold.errors import LorafoldError
from lorafold.ops.host_tensors import on_host
from lorafold.ops.packed_documents import Documents
from lorafold.training_step.packed_attention import (
    NAME,
    attending,
    document_mask,
    isolates,
    near,
    packed_logits,
    random_ids,
)


@dataclass(eq=False)
class PrefixSupport:
    """The model's support for shared prefixes, and the layout of the current batch.

    packs: whether packed documents do not influence each other.
    shares: whether the documents of one row may share a prefix.
    across: whether the documents of different rows may share a prefix.
    max_tokens: the maximum number of tokens of a document that shares a prefix, or None. Models
        with chunked attention have one, because a layout can't express the borders of chunks.
    """

    packs: bool
    shares: bool
    max_tokens: int | None = None
    across: bool = False
    _docs: Documents | None = None
    _used: bool = False

    @contextmanager
    def document_layout(self, docs: Documents) -> Iterator[None]:
        """Context in which every forward pass of the model is over these documents."""
        self._docs, self._used = docs, False
        try:
            yield
            if not self._used:
                raise LorafoldError(
                    "packed documents: no attention of the model received the layout of the batch;"
                    " set packing to false to train without shared prefixes"
                )
        finally:
            self._docs = None

    def mask(self, **protocol: Any) -> Documents | Tensor | None:
        """The layout set by `document_layout`, if the batch has its tokens; otherwise the result of
        `document_mask`, such as a mask (B, 1, Tq, Tk).
        """
        mask, docs = document_mask(**protocol), self._docs
        if docs is None or protocol["batch_size"] * protocol["q_length"] != sum(docs.own):
            return mask
        if protocol.get("local_size") == 0:  # Qwen2-MoE without windows: no layer uses it
            return mask
        if not isinstance(mask, Documents) or mask.lens != docs.own:
            found = mask.lens if isinstance(mask, Documents) else "none"
            raise LorafoldError(
                f"packed documents: found lengths {found} in the attention mask, expected"
                f" {docs.own}; set packing to false to train without shared prefixes"
            )
        self._used = True
        return replace(docs, window=mask.window)


@contextmanager
def sharing_prefixes(
    model: PreTrainedModel, name: str = NAME, across: bool = False
) -> Iterator[PrefixSupport]:
    """Restricts the model's attention to each document, as `packed` does, and yields the model's
    support for shared prefixes.
    """
    if not isolates(model):
        yield PrefixSupport(packs=False, shares=False)
        return
    config = model.config.get_text_config()
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    chunk = config.attention_chunk_size if chunked else None  # Llama 4
    can_share = shares_prefixes(model)
    support = PrefixSupport(True, can_share, chunk, across and can_share)
    with attending(model, support.mask, name=name):
        yield support


def may_share(config: PreTrainedConfig) -> bool:
    """Whether the model has only full and sliding-window attention, and so can probably share
    prefixes.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    attends = getattr(text, "num_attention_heads", None) is not None
    return attends and kinds <= {"full_attention", "sliding_attention"}


def document_layout(
    support: PrefixSupport | None, lens: Tensor | None, device: torch.device
) -> AbstractContextManager[None]:
    """Context in which the model's attention uses the documents of a batch. lens (n, 2) contains
    the tokens of each document, and how many it shares with the previous one.
    """
    if lens is None or support is None:
        return nullcontext()
    lengths, starts = on_host(lens).t().tolist()
    return support.document_layout(Documents.with_shared_prefixes(lengths, starts, device))


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether rows have the same outputs with shared prefixes as alone, tested with rows that
    branch at two depths.
    """
    lens, starts = (16, 17, 17, 9, 11), (0, 9, 13, 0, 5)
    unshared = slice(starts[1], lens[0])  # the part of the first row that no other row shares
    ids = random_ids(model, sum(lens) - sum(starts) + unshared.stop - unshared.start)
    ids, replacement = ids[: unshared.start - unshared.stop], ids[unshared.start - unshared.stop :]
    support = PrefixSupport(packs=True, shares=True)
    docs = Documents.with_shared_prefixes(lens, starts, ids.device)
    assert docs.keys is not None

    try:
        with evaluating(model):
            rows = ids[docs.keys].split(lens)
            alone_logits = [packed_logits(model, row, Documents((len(row),))) for row in rows]
            with attending(model, support.mask), support.document_layout(docs):
                logits = packed_logits(model, ids, docs)
                changed = torch.cat([ids[: unshared.start], replacement, ids[unshared.stop :]])
                changed = packed_logits(model, changed, docs)
    except (AttributeError, TypeError, LorafoldError):
        return False  # the decoder does arithmetic on its masks, or uses other masks
    expected = torch.cat([y[start:] for y, start in zip(alone_logits, starts, strict=True)])
    rest = slice(unshared.stop, None)
    unmoved = near(model, changed[rest], logits[rest], units=1)
    return unmoved and near(model, logits, expected, units=8)
