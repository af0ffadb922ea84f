"""Examples: the token ids of a row, with labels that say which tokens are trained on.

Tokens inside a trained span are their own labels; all others are labelled -100. An example is made
of its table when it is asked for, so that a million take no memory of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lorafold.data.arrow import Array, Lists, TableExamples, column, digests
from lorafold.data.completions import Completions
from lorafold.data.control_tokens import told_of
from lorafold.data.render import Rendering, Trained
from lorafold.data.rows import as_checked
from lorafold.data.shapes import CONVERSATIONS
from lorafold.data.sources import Row
from lorafold.data.stored import Part, Rows, parts_of
from lorafold.data.tokenizing import tokenized
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100  # torch's ignore_index
WHOLE = Rendering()  # every turn of the assistant, with its reasoning


@dataclass(frozen=True)
class Example:
    """A tokenized row: `ids` (T,) and unshifted `labels` (T,), where labels[t] is ids[t] or -100.

    The first label is -100, because nothing comes before the first token.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What `encode` made of the rows; `str` gives it as lines of text.

    `rows` counts all rows, `tokens` and `labelled` the tokens of the examples. `longest` is the
    length of the longest row in tokens, before cutting. `truncated` rows were cut at `max_length`
    tokens, `unlabelled` rows have no token to train on, and `turns_left_out` assistant turns are
    not trained on. `examples` are what the rows gave, and `reasoning_hidden` trained turns have a
    reasoning that the chat template leaves out. `marked` rows have control tokens in their
    contents, which are text.
    """

    rows: int
    tokens: int
    labelled: int
    longest: int
    max_length: int
    truncated: int
    unlabelled: int
    turns_left_out: int
    examples: int = 0
    reasoning_hidden: int = 0
    marked: int = 0

    def __str__(self) -> str:
        text = (
            f"{self.rows} rows, {self.tokens} tokens, {self.labelled} of them trained on; the"
            f" longest row has {self.longest}"
        )
        if self.truncated:
            text += f"\n{self.truncated} rows were cut at {self.max_length} tokens"
        if self.unlabelled:
            text += f"\n{self.unlabelled} rows have no token to train on and are left out"
        if self.turns_left_out:
            text += (
                f"\n{self.turns_left_out} assistant turns are not trained on: the chat template"
                " renders them differently at generation"
            )
        if self.examples > self.rows - self.unlabelled:
            text += (
                f"\n{self.examples} examples: a row gives several where the chat template rewrites"
                " earlier turns, or tokens would span their borders"
            )
        if self.reasoning_hidden:
            text += (
                f"\n{self.reasoning_hidden} assistant turns are trained on without their reasoning,"
                " or without what they say beside a call: the chat template leaves it out"
            )
        return text + told_of(self.marked)


@dataclass(frozen=True)
class Encoded:
    """The examples that have a token to train on, in the order of their rows, the report over all
    rows, and how many examples are from each source.
    """

    examples: "Examples"
    report: Report
    parts: tuple[Part, ...]


class Examples(TableExamples[Example]):
    """The examples of a table that have a token to train on; `Completions` made the table."""

    def __init__(self, table: "pa.Table", max_length: int) -> None:
        self._spans = Lists(table.column("spans"))
        lengths = np.minimum(Lists(table.column("ids")).lengths, max_length)
        found = labelled_counts(self._spans, lengths)
        super().__init__(table, max_length, np.flatnonzero(found))
        self.labelled = found[self._chosen]  # (n,), tokens that the loss counts

    def digests(self) -> Array:
        return digests(self._ids, self._spans)[self._chosen]

    def ends_lost(self) -> Array:
        return self._spans.lasts[self._chosen] > self._max_length

    def _example(self, entry: int) -> Example:
        return example_of(self._cut(entry), self._spans[entry].tolist())


def example_of(ids: Sequence[int], spans: Sequence[int]) -> Example:
    """The example of some ids.

    Args:
        ids: The token ids, (T,).
        spans: The starts and ends of n trained spans, (2n,); what is beyond the last id is left
            out.
    """
    labels = [NO_LOSS] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return Example(tuple(ids), (NO_LOSS, *labels[1:]))


def labelled_counts(spans: Lists, lengths: Array) -> Array:
    """How many tokens of each example the loss counts, (n,). The first token is none of them,
    because nothing comes before it.

    Args:
        spans: The starts and ends of the trained spans of each example, as lists of even length.
        lengths: The length to which each example is cut, (n,).
    """
    counts, first = [np.zeros(0, np.int64)], 0
    for ends, values in zip(spans.ends, spans.values, strict=True):
        border = (ends - ends[0]) // 2  # (n + 1,), where the spans of each example end
        start, end = values[ends[0] : ends[-1]].reshape(-1, 2).T
        length = np.repeat(lengths[first : first + len(border) - 1], np.diff(border))
        counted = np.maximum(0, np.minimum(end, length) - np.maximum(start, 1))
        counts.append(np.diff(np.concatenate([[0], np.cumsum(counted)])[border]))
        first += len(border) - 1
    return np.concatenate(counts)


def encode(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    console: "Console | None" = None,
    rendering: Rendering = WHOLE,
) -> Encoded:
    """Tokenize rows of conversations, prompts with completions, or plain text.

    Raises LorafoldError if rows are malformed, if the chat template refuses some, or if no row has
    a token to train on.

    Args:
        rows: The user's rows, all of one shape.
        tokenizer: A fast tokenizer. Conversations need its chat template; `ensure_chat_template`
            sets one where there is none.
        max_length: Longer rows are cut to this many tokens, at their end.
        console: For progress; None is quiet.
        rendering: What of a conversation is trained on.
    """
    rows = as_checked(rows, CONVERSATIONS)
    return encoded(tokenized(rows, Completions(tokenizer, rendering), console), rows, max_length)


def encoded(table: "pa.Table", rows: Rows, max_length: int) -> Encoded:
    """The examples of a table that `Completions` made.

    Args:
        rows: What it was made of.
        max_length: Longer rows are cut to this many tokens, at their end.

    Raises LorafoldError if no row has a token to train on.
    """
    examples = Examples(table, max_length)
    whole, row = Lists(table.column("ids")).lengths, column(table, "row")
    longest, truncated = int(whole.max()), len(np.unique(row[whole > max_length]))
    left_out = int(column(table, "left_out").sum())
    if not examples:
        cut = f"{truncated} were cut at max_length {max_length} (the longest has {longest} tokens)"
        lost = f"{left_out} assistant turns are left out, as the template renders them differently"
        found = [*[cut] * bool(truncated), *[f"{lost} at generation"] * bool(left_out)]
        raise LorafoldError(
            f"none of the {len(rows)} rows has a token to train on:"
            f" {', and '.join(found) or 'they have no answer of an assistant that may train'};"
            " expected answers within max_length"
        )
    report = Report(
        len(rows),
        int(examples.lengths.sum()),
        int(examples.labelled.sum()),
        longest,
        max_length,
        truncated,
        len(rows) - len(np.unique(examples.rows)),
        left_out,
        len(examples),
        int(column(table, "hidden").sum()),
        examples.marked,
    )
    return Encoded(examples, report, parts_of(examples.rows, rows.parts))


def encode_row(
    row: Row, tokenizer: "PreTrainedTokenizerBase", rendering: Rendering = WHOLE
) -> tuple[list[Example], Trained]:
    """The examples of one row, whole, and how many of its turns are left out or lack reasoning.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        rendering: What of a conversation is trained on.

    Raises LorafoldError if the chat template refuses the row.
    """
    encoder = Completions(tokenizer, rendering)
    given = Rows.of([row], encoder.takes).given(encoder.takes)
    found = encoder.encode(given, 0).to_pylist()
    if problem := found[0]["problem"]:
        raise LorafoldError(problem)
    examples = [example_of(entry["ids"], entry["spans"]) for entry in found]
    counts = (sum(entry[name] for entry in found) for name in ("left_out", "hidden"))
    return examples, Trained((), *counts)


def preview(example: Example, tokenizer: "PreTrainedTokenizerBase") -> "Text":
    """Return the example's text as the model sees it.

    Tokens that are trained on are bold and stand in ⟦ ⟧, which shows them without colour too.
    """
    from rich.text import Text

    text = Text()
    for trained, run in groupby(
        zip(example.ids, example.labels, strict=True), key=lambda pair: pair[1] != NO_LOSS
    ):
        piece = str(
            tokenizer.decode(
                [token for token, _ in run],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )
        shown, style = (f"⟦{piece}⟧", "bold green") if trained else (piece, "dim")
        text.append(shown, style=style)
    return text
