"""Examples for `--objective classify`. Labels are compared as text, so 1 and "1" are the same
class.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafold.data.arrow import Judgements, Lists, TableExamples, column, hash_rows, to_batch
from lorafold.data.examples import NO_LOSS, decode_ids, tokenizer_identity
from lorafold.data.formats import LABELS, LabelledText
from lorafold.data.json_input import Row
from lorafold.data.row_store import Rows
from lorafold.data.rows import check_provided, to_rows
from lorafold.data.tokenizing import Encoded, Encoder, Report, tokenize_rows
from lorafold.errors import LorafoldError, listed, truncate_middle

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledExample:
    """The tokens `ids` (T,) of a text, and its class index."""

    ids: tuple[int, ...]
    label: int

    @property
    def labels(self) -> tuple[int, ...]:
        return (NO_LOSS,) * len(self.ids)


def classes_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Returns the labels of the rows, sorted by value if all are integers, otherwise as text."""
    known = Rows.of(rows, LABELS)
    check_provided(known.formats, LABELS)
    labels = {given.label for given in known.extract(LABELS)}
    if not all(isinstance(label, int) for label in labels):
        labels = set(map(str, labels))
    if len(labels) < 2:
        raise LorafoldError(
            f"data: field label: found {str(*labels)!r} in every row, expected at least two classes"
        )
    if len(labels) == len(known) and all(re.fullmatch(r"-?\d*\.\d+", str(n)) for n in labels):
        raise LorafoldError(
            f"data: field label: found another number in each row ({listed(sorted(labels))}),"
            " expected classes; lorafold does not train regression"
        )
    return tuple(map(str, sorted(labels)))


@dataclass(frozen=True, eq=False)
class LabelEncoder(Encoder):
    """Encodes rows to the columns `row`, `ids` (T,), `num_special` (number of special tokens at the
    end), `label` (class index) and `problem`.
    """

    tokenizer: "PreTrainedTokenizerBase"
    classes: tuple[str, ...]
    row_content = LABELS

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "labels", "classes": self.classes, **tokenizer_identity(self.tokenizer)}

    def encode(self, contents: Sequence[LabelledText], first: int) -> "pa.RecordBatch":
        encoded = self.tokenizer(
            [one.text for one in contents], verbose=False, return_special_tokens_mask=True
        )
        number_of = {name: number for number, name in enumerate(self.classes)}
        each = zip(contents, encoded.input_ids, encoded["special_tokens_mask"], strict=True)
        entries = [
            {
                "row": n,
                "ids": ids,
                "num_special": next((n for n, own in enumerate(reversed(special)) if not own), 0),
                "label": number_of.get(str(one.label), -1),
                "problem": self._problem(one, ids),
            }
            for n, (one, ids, special) in enumerate(each, first)
        ]
        return to_batch(entries, ("row", "num_special", "label"), ("ids",), texts=("problem",))

    def _problem(self, given: LabelledText, ids: Sequence[int]) -> str:
        if not ids:
            return f"field text: found no token in {given.text!r}, expected at least one"
        if (label := str(given.label)) in self.classes:
            return ""
        expected = listed(self.classes, max_chars=100)
        return f"field label: found {truncate_middle(repr(label), 80)}, expected one of {expected}"


class LabelledExamples(TableExamples[LabelledExample]):
    def __init__(self, table: "pa.Table", max_length: int, classes: Sequence[str]) -> None:
        super().__init__(table, max_length, np.arange(len(table)))
        self._labels = column(table, "label")  # (n,)
        self._num_special = column(table, "num_special")  # (n,)
        self.compared_by = self._ids, self._labels.tolist()
        counts = np.bincount(self._labels, minlength=len(classes)).tolist()
        self.counts = dict(zip(classes, counts, strict=True))  # number of examples per class

    @cached_property
    def judgements(self) -> Judgements:  # type: ignore[override]
        """A judgement per text, so that equal texts with different labels are contradictions."""
        contradiction = "have the same text as an earlier row, but another label"
        return Judgements(hash_rows(self._ids), self._labels, contradiction, self.counts)

    def item(self, index: int) -> LabelledExample:
        # truncation keeps special tokens at the end
        ids, most = self._ids[index].tolist(), self._max_length
        end = min(int(self._num_special[index]), most) if len(ids) > most else 0
        cut = (*ids[: most - end], *ids[len(ids) - end :])
        return LabelledExample(cut, int(self._labels[index]))


def encode_labelled(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    classes: Sequence[str],
    console: "Console | None" = None,
) -> Encoded:
    rows = to_rows(rows, LABELS)
    table = tokenize_rows(rows, LabelEncoder(tokenizer, tuple(classes)), console)
    return class_data(table, rows, max_length, classes)


def class_data(table: "pa.Table", rows: Rows, max_length: int, classes: Sequence[str]) -> Encoded:
    examples = LabelledExamples(table, max_length, classes)
    whole = Lists(table.column("ids")).lengths
    shares = ", ".join(f"{name} {count}" for name, count in examples.counts.items())
    line = (
        f"{len(rows)} rows of {len(classes)} classes ({shares}); the longest row has"
        f" {whole.max()} tokens"
    )
    return Encoded(examples, Report(line, max_length, int((whole > max_length).sum())), rows.parts)


def preview_labelled(
    example: LabelledExample, tokenizer: "PreTrainedTokenizerBase", classes: Sequence[str]
) -> "Text":
    from rich.text import Text

    text = Text(decode_ids(tokenizer, example.ids), style="dim")
    return text.append(f" ⟦{classes[example.label]}⟧", style="bold green")
