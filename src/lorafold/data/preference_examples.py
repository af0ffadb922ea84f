"""Preference examples: the tokens of a prompt once, followed by the tokens of its completions.

    ids = shared (s,) + branch 1 (b1,) + branch 2 (b2,)       position s + t for token t of a branch

PAIRS have two branches, chosen and rejected; JUDGED rows have one branch with a label. A branch
begins with the last shared token before the first trained token, so that each position predicts one
token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafold.data.arrow import TURNS, Array, Judgements, Lists, TableExamples, hash_rows, to_batch
from lorafold.data.chat_template import prefix_of
from lorafold.data.examples import NO_LOSS, WHOLE, CompletionEncoder, Example, example_of
from lorafold.data.formats import JUDGED, PAIRS, Conversation, PreferenceRow
from lorafold.data.json_input import Row, json_type
from lorafold.data.render import Rendering
from lorafold.data.row_store import Rows, parts_of, row_names
from lorafold.data.rows import to_rows
from lorafold.data.tokenizing import Encoded, Encoder, Report, tokenize_rows
from lorafold.errors import MAX_ITEMS, LorafoldError, listed

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BranchedRow:
    """A tokenized row: shared ids (s,), branches, the label of a single branch, and the branches'
    log-probabilities under the reference model.
    """

    shared: tuple[int, ...]
    branches: tuple[Example, ...]
    desirable: bool = True
    reference: tuple[float, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return sum((branch.ids for branch in self.branches), self.shared)

    @property
    def labels(self) -> tuple[int, ...]:
        return sum((branch.labels for branch in self.branches), (NO_LOSS,) * len(self.shared))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of computed tokens of each document. Shared tokens count for the first
        document only.
        """
        first, *others = (len(branch.ids) for branch in self.branches)
        return (len(self.shared) + first, *others)

    def some(self, chosen: slice) -> BranchedRow:
        return replace(self, branches=self.branches[chosen], reference=self.reference[chosen])

    def documents(self) -> list[Example]:
        before = (NO_LOSS,) * len(self.shared)
        return [Example(self.shared + b.ids, before + b.labels) for b in self.branches]


def split_completion(example: Example) -> BranchedRow:
    """Returns a row with one branch, which begins with the token before the first trained token."""
    trained = (place for place, label in enumerate(example.labels) if label != NO_LOSS)
    at = max(0, next(trained, 0) - 1)
    return BranchedRow(example.ids[:at], (Example(example.ids[at:], example.labels[at:]),))


@dataclass(eq=False)
class PreferenceEncoder(Encoder):
    """Encodes rows to the columns `row`, `ids` (T,), `starts` (k,) of the branches, `spans` (2n,),
    the starts and ends of trained spans, `desirable`, `marked`, `turns` and `problem`.
    """

    tokenizer: PreTrainedTokenizerBase
    row_content: str
    rendering: Rendering = field(default_factory=Rendering)

    def __post_init__(self) -> None:
        self._completions = CompletionEncoder(self.tokenizer, self.rendering)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self._completions.identity, "kind": self.row_content}

    def encode(self, contents: Sequence[Sequence[PreferenceRow]], first: int) -> pa.RecordBatch:
        documents = [
            Conversation([*one.prompt, *completion], len(one.prompt), one.tools)
            for row in contents
            for one in row
            for completion in one.completions.values()
        ]
        encoded = self._completions.encode(documents, 0).to_pylist()
        by_document = (list(of) for _, of in groupby(encoded, key=lambda entry: entry["row"]))
        entries = [
            {"row": n} | self._entry(one, list(islice(by_document, len(one.completions))))
            for n, row in enumerate(contents, first)
            for one in row
        ]
        lists, flags = ("ids", "starts", "spans"), ("desirable", "marked")
        return to_batch(entries, ("row",), lists, flags, (TURNS, "problem"))

    def _entry(self, one: PreferenceRow, documents: list[list[dict[str, Any]]]) -> dict[str, Any]:
        firsts = [entries[0] for entries in documents]
        ids = [entry["ids"] for entry in firsts]
        problem = self._problem(one, documents)
        if not problem and len(ids) == 2 and ids[0] == ids[1]:
            problem = "fields chosen and rejected: found the same text, expected different texts"
        columns = {
            "desirable": one.desirable is True,
            "marked": any(entry["marked"] for entry in firsts),
            "problem": problem,
        }
        if problem:
            return {"ids": [], "starts": [], "spans": [], TURNS: "", **columns}
        shared = max(0, min(len(prefix_of(*ids)), *(entry["spans"][0] for entry in firsts)) - 1)
        together, starts, spans = ids[0][:shared], [], []
        for entry in firsts:
            start = len(together)
            starts.append(start)
            spans += [place - shared + start for place in entry["spans"]]
            together = together + entry["ids"][shared:]
        turns = [entry[TURNS].splitlines() for entry in firsts]
        own = [turn for of in turns[1:] for turn in of[len(one.prompt) :]]
        lines = "\n".join([firsts[0][TURNS], *own])
        return {"ids": together, "starts": starts, "spans": spans, TURNS: lines, **columns}

    def _problem(self, one: PreferenceRow, documents: list[list[dict[str, Any]]]) -> str:
        if not isinstance(one.desirable, bool):
            return f"field label: found {json_type(one.desirable)}, expected true or false"
        for name, entries in zip(one.completions, documents, strict=True):
            if problem := str(entries[0]["problem"]):
                return problem
            if len(entries) > 1:
                return (
                    f"field {name}: found a completion of {len(entries)} texts, because the chat"
                    " template rewrites earlier turns or a token would cross the border of a turn;"
                    " expected a single assistant turn"
                )
            if not entries[0]["spans"]:
                return (
                    f"field {name}: found no token to train on, expected an assistant turn that the"
                    " chat template renders in the same way as at generation"
                )
        return ""


class BranchedExamples(TableExamples[BranchedRow]):
    """Examples with branches. `lengths` (n,) are the numbers of computed tokens of each example,
    `tails` (n, k) those of each branch, and `full_lengths` (n, k) the lengths of the untruncated
    documents.
    """

    def __init__(self, table: pa.Table, max_length: int) -> None:
        super().__init__(table, max_length, np.arange(len(table)))
        self._starts, self._spans = (Lists(table.column(name)) for name in ("starts", "spans"))
        self._desirable: list[bool] = table.column("desirable").to_pylist()
        self.compared_by = self._ids, self._starts, self._spans, self._desirable
        pairs = zip(self._starts, self._ids.lengths.tolist(), strict=True)
        borders = np.array([[*starts.tolist(), length] for starts, length in pairs])
        shared, tails = borders[:, 0], np.diff(borders)  # (n,) and (n, k)
        self.shared = np.minimum(shared, max_length)
        self.tails = np.minimum(tails, max_length - self.shared[:, None])  # truncated
        self.full_lengths: Array = shared[:, None] + tails
        self.lengths = self.shared + self.tails.sum(1)

    @cached_property
    def ends_lost(self) -> Array:  # type: ignore[override]
        lost = np.any(self.full_lengths > self._max_length, axis=1)
        for n in np.flatnonzero(lost).tolist():
            starts, tails, spans = self._starts[n], self.tails[n], self._spans[n].reshape(-1, 2)
            of = np.searchsorted(starts, spans[:, 0], "right") - 1  # branch of each span
            lost[n] = np.any(spans[:, 1] - starts[of] > tails[of])
        return lost

    @cached_property
    def judgements(self) -> Judgements:  # type: ignore[override]
        """A judgement per pair: the subject is the unordered pair of answers, the verdict the
        chosen answer.
        """
        chosen, rejected = (hash_rows(self._documents(n)) for n in (0, 1))
        ordered = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
        contradiction = "swap the chosen and the rejected answer of an earlier row"
        subjects = hash_rows(*(of.tolist() for of in ordered))
        return Judgements(subjects, chosen < rejected, contradiction)

    def _documents(self, branch: int) -> Iterator[bytes]:
        for ids, starts in zip(self._ids, self._starts, strict=True):
            start, end = [*starts.tolist(), len(ids)][branch : branch + 2]
            yield ids[: starts[0]].tobytes() + ids[start:end].tobytes()

    @property
    def digest(self) -> str:
        digest = sha256(type(self).__name__.encode())
        lists = (self._ids, self._starts, self._spans)
        arrays = (array for of in lists for array in (*of.ends, *of.values))
        for array in (*arrays, self.shared, self.tails):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def item(self, index: int) -> BranchedRow:
        ids, starts = self._ids[index].tolist(), self._starts[index].tolist()
        spans, lengths = self._spans[index].reshape(-1, 2), self.tails[index].tolist()
        branches = []
        for (start, end), length in zip(pairwise([*starts, len(ids)]), lengths, strict=False):
            own = spans[(spans[:, 0] >= start) & (spans[:, 1] <= end)] - start
            branches.append(example_of(ids[start : start + length], own.flatten().tolist()))
        shared = tuple(ids[: int(self.shared[index])])
        return BranchedRow(shared, tuple(branches), self._desirable[index])


class MismatchedExamples(BranchedExamples):
    """Judged completions. The second branch of each example is the completion of the previous
    example (cyclically). KTO estimates its KL from these.
    """

    def __init__(self, table: pa.Table, max_length: int) -> None:
        super().__init__(table, max_length)
        other = np.roll(self.tails, 1, axis=0)
        self.tails = np.hstack([self.tails, np.minimum(other, max_length - self.shared[:, None])])
        self.lengths = self.shared + self.tails.sum(1)

    @cached_property
    def judgements(self) -> Judgements:  # type: ignore[override]
        text = "repeat the prompt and the completion of an earlier row with the opposite label"
        true = sum(self._desirable)
        labels = {"true": true, "false": len(self) - true}
        return Judgements(hash_rows(self._ids), np.array(self._desirable), text, labels)

    def item(self, index: int) -> BranchedRow:
        own, other = super().item(index), super().item((index or len(self)) - 1)
        [branch], [other_branch], length = own.branches, other.branches, int(self.tails[index, 1])
        ids = (branch.ids[:1] + other_branch.ids[1:])[:length]
        return replace(own, branches=(branch, Example(ids, other_branch.labels[:length])))


EXAMPLES: dict[str, type[BranchedExamples]] = {PAIRS: BranchedExamples, JUDGED: MismatchedExamples}


def encode_preferences(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    kind: str,
    console: Console | None = None,
    rendering: Rendering = WHOLE,
) -> Encoded:
    rows = to_rows(rows, kind)
    table = tokenize_rows(rows, PreferenceEncoder(tokenizer, kind, rendering), console)
    return preference_data(table, rows, max_length, kind)


def preference_data(table: pa.Table, rows: Rows, max_length: int, kind: str) -> Encoded:
    examples = EXAMPLES[kind](table, max_length)
    cut = np.any(examples.full_lengths > max_length, axis=1)
    check_truncated(rows, examples, max_length, cut)
    tails = examples.tails[:, : examples.full_lengths.shape[1]]
    columns = {"chosen": tails[:, 0], "rejected": tails[:, -1]}
    if tails.shape[1] == 1:
        good = np.array(table.column("desirable").to_pylist())
        names = ("desirable", "undesirable") if good[0] else ("undesirable", "desirable")
        columns = {name: tails[good == (name == "desirable"), 0] for name in names}
    means = [f"{name} {of.mean() - 1:.1f}" for name, of in columns.items() if len(of)]
    line = (
        f"{len(rows)} rows, {examples.lengths.sum()} tokens"
        f" ({(examples.shared[:, None] + examples.tails).sum()} if each completion had its own"
        f" prompt); mean completion length: {', '.join(means)} tokens; the longest sequence has"
        f" {examples.full_lengths.max()}"
    )
    report = Report(line, max_length, len(np.unique(examples.rows[cut])), examples.marked)
    return Encoded(examples, report, parts_of(np.unique(examples.rows), rows.parts))


def check_truncated(rows: Rows, examples: BranchedExamples, max_length: int, cut: Array) -> None:
    """Raises if truncation leaves nothing to compare in an example. `cut` (n,) marks truncated
    examples.
    """
    bad = {}
    for n in np.flatnonzero(cut).tolist():
        row, own = int(examples.rows[n]), examples[n].branches[: examples.full_lengths.shape[1]]
        if any(set(branch.labels) == {NO_LOSS} for branch in own):
            bad[row] = "no trained token of a completion remains"
        elif len(own) == 2 and own[0] == own[1]:
            bad[row] = "chosen and rejected become equal"
    if bad:
        first = zip(row_names(rows.origins.places([*bad][:MAX_ITEMS])), bad.values(), strict=False)
        lines = listed((f"{name}: {what}" for name, what in first), "; ", count=len(bad))
        raise LorafoldError(
            f"data: truncation to max_length {max_length} leaves nothing to compare: {lines};"
            " raise max_length, or remove these rows"
        )
