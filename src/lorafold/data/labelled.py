"""Labelled texts to class numbers: `{"text": ..., "label": ...}` rows for `--objective classify`.

    classes = classes_of(rows)                          ("neg", "pos"), in sorted order; the class
                                                        number is the place in it
    encode_labelled(rows, tokenizer, 512, classes)      ids (T,) as the tokenizer gives them, and
                                                        one class number a row

The classes travel with what is trained: in a classifier's config, and in an adapter's
`lorafold.json`. Labels are compared as text, so that 1 and "1" are one class.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafold.data.rows import LISTED, Row, check_objective, check_rows
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledExample:
    """One row: `ids` (T,) and the number of its class."""

    ids: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class LabelledReport:
    """What became of the rows.

    Lengths in tokens, `longest` before cutting; `counts` are rows by class.
    """

    rows: int
    longest: int
    max_length: int
    truncated: int
    counts: dict[str, int]

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        cut = (
            f"\n{self.truncated} rows were cut at {self.max_length} tokens"
            if self.truncated
            else ""
        )
        return (
            f"{self.rows} rows of {len(self.counts)} classes ({shares}); the longest row has"
            f" {self.longest} tokens{cut}"
        )


@dataclass(frozen=True)
class LabelledData:
    """The examples, one a row and in their order, and the report."""

    examples: list[LabelledExample]
    report: LabelledReport


def classes_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of the rows, sorted: whole numbers by size, text by character.

    LorafoldError for rows without, or with one label only.
    """
    check_objective(rows, "classify")
    labels = {row["label"] for row in rows}
    numbers = all(isinstance(label, int) for label in labels)
    classes = tuple(map(str, sorted(labels))) if numbers else tuple(sorted(set(map(str, labels))))
    if len(classes) < 2:
        raise LorafoldError(
            f"data: field label: found {classes[0]!r} in every row, expected at least two classes"
        )
    return classes


def encode_labelled(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    classes: Sequence[str],
) -> LabelledData:
    """Token ids, at most `max_length` a row (the end is cut), and class numbers.

    Raises LorafoldError listing bad rows: labels that are none of the classes, texts without a
    token.
    """
    rows = check_rows(enumerate(rows, 1), "data")
    check_objective(rows, "classify")
    number_of = {name: number for number, name in enumerate(classes)}
    all_ids = tokenizer([row["text"] for row in rows], verbose=False).input_ids
    bad = [
        f"row {n}: field text: found no token in {row['text']!r}"
        for n, (row, ids) in enumerate(zip(rows, all_ids, strict=True), 1)
        if not ids
    ]
    strange = [
        (n, str(row["label"]))
        for n, row in enumerate(rows, 1)
        if str(row["label"]) not in number_of
    ]
    bad += [
        f"row {n}: field label: found {label!r}, expected one of {', '.join(classes)}"
        for n, label in strange
    ]
    if bad:
        more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise LorafoldError(f"data: {'; '.join(bad[:LISTED])}{more}")
    labels = [str(row["label"]) for row in rows]
    examples = [
        LabelledExample(tuple(ids[:max_length]), number_of[label])
        for ids, label in zip(all_ids, labels, strict=True)
    ]
    longest, truncated = max(map(len, all_ids)), sum(len(ids) > max_length for ids in all_ids)
    found = Counter(labels)
    return LabelledData(
        examples,
        LabelledReport(
            len(rows), longest, max_length, truncated, {name: found[name] for name in classes}
        ),
    )


def preview_labelled(
    example: LabelledExample, tokenizer: "PreTrainedTokenizerBase", classes: Sequence[str]
) -> "Text":
    """The text as the model sees it and, in ⟦ ⟧, the class to be learned."""
    from rich.text import Text

    text = str(
        tokenizer.decode(
            list(example.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )
    return Text(text, style="dim").append(f" ⟦{classes[example.label]}⟧", style="bold green")
