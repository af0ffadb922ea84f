"""Examples for classification: `{"text": ..., "label": ...}` rows for `--objective classify`.

    classes = classes_of(rows)                          ("neg", "pos"), sorted; a class's number is
                                                        its index
    encode_labelled(rows, tokenizer, 512, classes)      ids (T,) as the tokenizer gives them, and
                                                        one class number a row

The classes are saved in a classifier's config and in an adapter's `lorafold.json`. Labels are
compared as text, so that 1 and "1" are one class.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafold.data.rows import LISTED, check_objective, check_rows
from lorafold.data.sources import Row
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledExample:
    """A tokenized row: `ids` (T,) and the number of its class."""

    ids: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class LabelledReport:
    """What `encode_labelled` made of the rows; `str` gives it as lines of text.

    `longest` is the length of the longest row in tokens, before cutting; `truncated` rows were cut
    at `max_length` tokens; `counts` gives the number of rows of each class.
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
    """One example for each row, in the order of the rows, and the report."""

    examples: list[LabelledExample]
    report: LabelledReport


def classes_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the labels of the rows, sorted: whole numbers by size, text by character.

    Raises LorafoldError if the rows have no labels, or only one.
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
    """Tokenize labelled texts and turn their labels into class numbers.

    Raises LorafoldError that lists the bad rows: those whose label is none of the classes and those
    whose text has no token.

    Args:
        rows: Rows of text and label.
        tokenizer: The model's tokenizer.
        max_length: Longer rows are cut to this many tokens, at their end.
        classes: The classes; a class's number is its index.
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
    """Return the example's text as the model sees it and, in ⟦ ⟧, the class to predict.

    Args:
        example: The tokenized row.
        tokenizer: The tokenizer that made it.
        classes: The classes, by number.
    """
    from rich.text import Text

    text = str(
        tokenizer.decode(
            list(example.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )
    return Text(text, style="dim").append(f" ⟦{classes[example.label]}⟧", style="bold green")
