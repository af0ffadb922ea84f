"""Packed rows whose documents share their first tokens, such as two completions of one prompt.

    with branching(model) as branches:
        docs = Documents.branching(shared=[100], branches=[[40, 31]], device=model.device)
        with branches.over(docs):
            losses, counts = document_losses(model, labels, inputs, document, n)

A row is its s shared tokens and then each branch, at positions 0 to s - 1, s to s + c - 1, s to s +
r - 1 ... Each branch attends to the shared tokens and to itself, so the shared tokens are computed
once. transformers' mask functions see in the positions where documents end, but not what they
share. So the mask function is told the layout of the batch, and where it finds the documents that
the layout's positions imply, it returns the layout in their place. The backward may come after the
block, with gradient checkpointing too, since the masks are arguments of the checkpointed layers.

The last shared token has one hidden state and can predict one token only: let each branch begin
with the last token of the prompt, and share the tokens before it. Use it for preference training
and wherever several completions of a prompt are scored. A prompt of 128 tokens and two completions
of 64 are 256 tokens instead of 384.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.core.evaluating import evaluating
from lorafold.errors import LorafoldError
from lorafold.ops.documents import Documents
from lorafold.step.documents import (
    NAME,
    attending,
    document_mask,
    isolates,
    near,
    packed_logits,
    random_ids,
)


class Branching:
    """How far a model goes, and what tells its attention the layout of a batch.

    packs: Packed documents do not influence each other.
    shares: They may share their first tokens as well.
    longest: The most tokens of a document that shares; None for any number. Where attention has
        chunks, tokens after a border see none before it, shared or not, which no layout says.
    """

    def __init__(self, packs: bool, shares: bool, longest: int | None = None) -> None:
        self.packs, self.shares, self.longest = packs, shares, longest
        self._docs: Documents | None = None
        self._used = False

    @contextmanager
    def over(self, docs: Documents) -> Iterator[None]:
        """Let every forward of the model inside the `with` block be over these documents.

        Raises LorafoldError if the model's batch has other documents, or its attention none.
        """
        self._docs, self._used = docs, False
        try:
            yield
            if not self._used:
                raise LorafoldError(
                    "packed documents: found no attention of the model that was told the layout of"
                    f" the batch, expected documents of {docs.own} own tokens; train without"
                    " shared prompts"
                )
        finally:
            self._docs = None

    def mask(self, **protocol: Any) -> Documents | Tensor | None:
        """Return the layout that was told for a batch of its tokens, else what `document_mask`
        returns, such as a mask (B, 1, Tq, Tk); a function of transformers' mask protocol.

        Raises LorafoldError if the mask's documents are not those of the layout.
        """
        found, docs = document_mask(**protocol), self._docs
        if docs is None or protocol["batch_size"] * protocol["q_length"] != sum(docs.own):
            return found
        if not isinstance(found, Documents) or found.lens != docs.own:
            seen = found.lens if isinstance(found, Documents) else "a mask that is not of documents"
            raise LorafoldError(
                f"packed documents: found {seen}, expected documents of {docs.own} own tokens, as"
                " the layout of the batch has them; train without shared prompts"
            )
        self._used = True
        return replace(docs, window=found.window)


@contextmanager
def branching(model: PreTrainedModel, name: str = NAME) -> Iterator[Branching]:
    """Keep the model's attention inside documents, as `packed` does, until the `with` block ends,
    and yield how far that goes: the model is unchanged if its documents would influence each other.

    Args:
        name: Its own among the models whose attention is kept so at a time: transformers has one
            function of masks for each name.
    """
    if not isolates(model):
        yield Branching(packs=False, shares=False)
        return
    found = Branching(packs=True, shares=shares(model), longest=chunk_of(model))
    with attending(model, found.mask, name=name):
        yield found


def chunk_of(model: PreTrainedModel) -> int | None:
    """The tokens of a chunk in which the model's attention stays, as that of Llama 4 does; None if
    it has no chunks.
    """
    config = model.config.get_text_config()
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return config.attention_chunk_size if chunked else None


def shares(model: PreTrainedModel) -> bool:
    """Test, with two short rows of two branches, whether the model computes a branch as it computes
    the shared tokens and the branch alone. The model and the random state stay unchanged.
    """
    (s, a, b), (t, c, d) = first, second = (9, 7, 8), (5, 4, 6)
    ids = random_ids(model, sum(first) + sum(second) + a)
    *parts, other = ids.split([*first, *second, a])
    branches = Branching(packs=True, shares=True)
    docs = Documents.branching([s, t], [[a, b], [c, d]], ids.device)

    def together(parts: list[Tensor]) -> Tensor:
        with branches.over(docs):
            return packed_logits(model, torch.cat(parts), docs)

    def alone(prompt: Tensor, branch: Tensor, own: int) -> Tensor:
        row = torch.cat([prompt, branch])
        return packed_logits(model, row, Documents((len(row),)))[-own:]

    try:
        with evaluating(model):
            expected = torch.cat(
                [
                    alone(parts[0], parts[1], s + a),
                    alone(parts[0], parts[2], b),
                    alone(parts[3], parts[4], t + c),
                    alone(parts[3], parts[5], d),
                ]
            )
            with attending(model, branches.mask):
                found, changed = together(parts), together([parts[0], other, *parts[2:]])
    except (AttributeError, TypeError, LorafoldError):
        return False  # the decoder computes with its masks, or has others than the documents'
    rest = slice(s + a, None)
    return near(model, changed[rest], found[rest], units=1) and near(
        model, found, expected, units=8
    )
