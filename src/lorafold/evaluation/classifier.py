"""How good a classifier is on held-out texts: loss and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.data.labelled import LabelledExample, encode_labelled
from lorafold.data.shapes import Row
from lorafold.errors import LorafoldError
from lorafold.evaluation.held_out import by_row, progress_bar
from lorafold.evaluation.intervals import loss_interval, mean_loss, wilson
from lorafold.evaluation.result import Answer, Evaluation
from lorafold.step.classification import Classification

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    *,
    console: Console | None = None,
) -> Evaluation:
    """`evaluate` for rows of text and label.

    Args:
        model: A sequence classifier whose config names the classes (`id2label`).
        max_length: Longer texts are cut to this many tokens.
        console: For progress and a report of what was cut; None is quiet.

    Raises LorafoldError for a label that is not one of the model's classes, and for a model whose
    config has no padding token.
    """
    names: dict[int, str] = model.config.id2label  # type: ignore[assignment]
    classes = [names[number] for number in sorted(names)]
    data = encode_labelled(rows, tokenizer, max_length, classes)
    if console and data.report.truncated:
        console.print(str(data.report), highlight=False)
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None:
        raise LorafoldError(
            "the model's config: field pad_token_id: found null, expected the id of the token that"
            " pads short texts"
        )

    def measured(loss: Classification, some: Sequence[LabelledExample]) -> Sequence[Tensor]:
        arguments = loss.collate(some, loss.device)
        arguments.pop("labels")
        return list(loss.logits(**arguments).cpu())

    loss_of = partial(Classification, model, pad_id)
    with progress_bar(console, "rows") as step:
        found = by_row(model, data.examples, loss_of, measured, step)
    logits = torch.stack(found)  # (n, C)
    targets = torch.tensor([e.label for e in data.examples])  # (n,)
    sums = [(value, 1) for value in F.cross_entropy(logits, targets, reduction="none").tolist()]
    chosen = [classes[i] for i in logits.argmax(1).tolist()]
    answers = tuple(
        Answer(row["text"], str(row["label"]), name) for row, name in zip(rows, chosen, strict=True)
    )
    hits = int((logits.argmax(1) == targets).sum())
    n = len(rows)
    return Evaluation(
        mean_loss(sums), loss_interval(sums), hits / n, wilson(hits, n), n, answers,
        losses=tuple(sums),
    )  # fmt: skip
