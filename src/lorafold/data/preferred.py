"""Turns rows of preferences into examples, with a report.

    data = encode_preferred(rows, tokenizer, 1024, "pairs", console)

`"pairs"` have a chosen and a rejected completion, `"judged"` rows one completion with a label (or
both of a pair, the chosen one labelled true).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorafold.data.arrow import Array
from lorafold.data.branches import Branched, BranchedExamples, Branches, MismatchedExamples
from lorafold.data.control_tokens import told_of
from lorafold.data.examples import WHOLE
from lorafold.data.origins import named
from lorafold.data.render import Rendering
from lorafold.data.rows import as_checked
from lorafold.data.shapes import JUDGED, PAIRS
from lorafold.data.sources import Row
from lorafold.data.stored import Part, Rows, parts_of
from lorafold.data.tokenizing import tokenized
from lorafold.errors import LISTED, LorafoldError, listed

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

EXAMPLES: dict[str, type[BranchedExamples]] = {PAIRS: BranchedExamples, JUDGED: MismatchedExamples}


@dataclass(frozen=True)
class PreferenceReport:
    """What `encode_preferred` made of the rows; `str` gives it as lines of text.

    `tokens` are those that a step computes, with each prompt once, and `apart` those of the
    documents if every completion had a prompt of its own. `means` are the mean lengths of the
    completions in tokens, those of the chosen and the rejected ones. `longest` is the length of the
    longest document before cutting, and `truncated` rows were cut. `marked` have control tokens in
    their contents, which are text.
    """

    rows: int
    tokens: int
    apart: int
    means: dict[str, float]
    longest: int
    max_length: int
    truncated: int
    marked: int = 0

    def __str__(self) -> str:
        lengths = ", ".join(f"{name} {mean:.1f}" for name, mean in self.means.items())
        text = (
            f"{self.rows} rows, {self.tokens} tokens ({self.apart} if each completion had its own"
            f" prompt); completions have on average {lengths} tokens; the longest document has"
            f" {self.longest}"
        )
        if self.truncated:
            text += f"\n{self.truncated} rows were cut at {self.max_length} tokens"
        return text + told_of(self.marked)


@dataclass(frozen=True)
class PreferredData:
    """The examples in the order of their rows, the report, and how many examples are from each
    source.
    """

    examples: Sequence[Branched]
    report: PreferenceReport
    parts: tuple[Part, ...]


def encode_preferred(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    kind: str,
    console: "Console | None" = None,
    rendering: Rendering = WHOLE,
) -> PreferredData:
    """Tokenize rows of preferences, each prompt once.

    Raises LorafoldError that lists the bad rows: those that the chat template refuses, that have no
    token to train on, or whose completions are equal, also within `max_length`.

    Args:
        rows: The user's rows, of a shape that suits `kind`.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Longer documents (a prompt with one completion) are cut to this many tokens.
        kind: pairs or judged.
        console: For progress; None is quiet.
        rendering: What of a completion is trained on.
    """
    rows = as_checked(rows, kind)
    return preferred(
        tokenized(rows, Branches(tokenizer, kind, rendering), console), rows, max_length, kind
    )


def preferred(table: "pa.Table", rows: Rows, max_length: int, kind: str) -> PreferredData:
    """The examples of a table that `Branches` made.

    Args:
        table: The ids of prompts and completions.
        rows: What it was made of.
        max_length: Longer documents are cut to this many tokens.
        kind: pairs or judged.

    Raises LorafoldError for rows of which nothing is left to compare within `max_length`.
    """
    examples = EXAMPLES[kind](table, max_length)
    cut: Array = np.any(examples.whole > max_length, axis=1)
    refuse_cut(rows, examples, max_length, cut)
    of = np.array(_names(table, examples.whole.shape[1]))  # (n, k), the name of each completion
    own = examples.own[:, : of.shape[1]]
    report = PreferenceReport(
        len(rows),
        int(examples.lengths.sum()),
        int((examples.shared[:, None] + examples.own).sum()),
        {name: float(own[of == name].mean()) - 1 for name in dict.fromkeys(of.flatten().tolist())},
        int(examples.whole.max()),
        max_length,
        len(np.unique(examples.rows[cut])),
        examples.marked,
    )
    return PreferredData(examples, report, parts_of(examples.rows, rows.parts))


def refuse_cut(rows: Rows, examples: BranchedExamples, max_length: int, cut: Array) -> None:
    """Raise LorafoldError for rows of which nothing is left to compare.

    Args:
        rows: What the examples were made of.
        max_length: To which they are cut.
        cut: Which of them are cut, (n,).
    """
    bad: dict[int, str] = {}
    for n in np.flatnonzero(cut).tolist():
        example, row = examples[n], int(examples.rows[n])
        own = example.branches[: examples.whole.shape[1]]
        if any(set(branch.labels) == {-100} for branch in own):
            bad[row] = "no token of a completion is left"
        elif len(own) == 2 and own[0] == own[1]:
            bad[row] = "chosen and rejected are equal"
    if bad:
        first = zip(named(rows.origins.places([*bad][:LISTED])), bad.values(), strict=False)
        told = listed((f"{name}: {what}" for name, what in first), "; ", count=len(bad))
        raise LorafoldError(
            f"data: within max_length {max_length}: {told}; raise max_length, or leave"
            " these rows out"
        )


def _names(table: "pa.Table", k: int) -> list[list[str]]:
    """The name of each of the k completions of every example."""
    if k == 2:
        return [["chosen", "rejected"]] * len(table)
    judged = table.column("desirable").to_pylist()
    return [["desirable" if good else "undesirable"] for good in judged]
