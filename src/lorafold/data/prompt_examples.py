"""Examples of prompts, which a policy completes by itself.

    prompts(rows, tokenizer, 512)       ids (T,) of each prompt, ready for generation

A prompt is what comes before the last turn of the assistant, or all of a row without one. Its row
goes with it: whatever else that holds is for the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafold.data.arrow import TableExamples, batch_of
from lorafold.data.control_tokens import MARKED, ids_of, is_marked
from lorafold.data.examples import identity_of
from lorafold.data.render import prompt_of
from lorafold.data.row_store import Rows
from lorafold.data.shapes import PROMPTS, Conversation, Shape, shape_of, shapes_for
from lorafold.data.tokenizing import Encoded, Encoder, with_counts
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

ASKED = ("prompt", "messages", "conversations")  # the keys of a row that hold its prompt


@dataclass(frozen=True)
class TokenizedPrompt:
    """A tokenized prompt: `ids` (T,), its row, and where that is, for messages."""

    ids: tuple[int, ...]
    row: Mapping[str, Any]
    where: str

    @property
    def asked(self) -> Any:
        """The row's field `prompt`, a text or messages; the messages before the answer of a row
        whose shape has no such field.
        """
        if "prompt" in self._shape.keys:
            return self.row["prompt"]
        return [dict(message) for message in self.conversation.messages]

    @property
    def conversation(self) -> Conversation:
        """The prompt as messages, with the tools of its row."""
        found: Conversation = self._shape.given(PROMPTS, dict(self.row))
        return found

    @property
    def answer(self) -> str | None:
        """The text of the row's own answer, if it has one."""
        said = self._shape.conversation(dict(self.row)).messages[len(self.conversation.messages) :]
        return said[-1].get("content") or None if said else None

    @property
    def besides(self) -> dict[str, Any]:
        """The other fields of the row, and its answer as one, unless it has a field `answer`."""
        found = {key: value for key, value in self.row.items() if key not in ASKED}
        if found.get("answer") is None and self.answer is not None:
            found["answer"] = self.answer
        return found

    @property
    def _shape(self) -> Shape:
        shape = shape_of(dict(self.row), shapes_for(PROMPTS))
        assert shape is not None  # of a row that was checked
        return shape


@dataclass(frozen=True)
class PromptReport:
    """What became of the rows."""

    rows: int
    longest: int
    marked: int

    def __str__(self) -> str:
        first = f"{self.rows} prompts; the longest has {self.longest} tokens"
        return with_counts(first, (self.marked, MARKED))


@dataclass(frozen=True, eq=False)
class PromptEncoder(Encoder):
    """Makes examples of prompts. Columns: `row`, `ids` (T,), `marked` whether control tokens in its
    contents are text, and `problem`.
    """

    tokenizer: PreTrainedTokenizerBase
    takes = PROMPTS

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "prompts", **identity_of(self.tokenizer)}

    def encode(self, given: Sequence[Conversation], first: int) -> pa.RecordBatch:
        entries = [{"row": n} | self._prompt(one) for n, one in enumerate(given, first)]
        return batch_of(entries, ("row",), ("ids",), ("marked",), ("problem",))

    def _prompt(self, given: Conversation) -> dict[str, Any]:
        text, ids, problem = "", [], ""
        try:
            if not given.messages:
                what = "found no message before the assistant's turn, expected a prompt"
                raise LorafoldError(what)
            text = prompt_of(given, self.tokenizer)
            ids = ids_of(text, self.tokenizer)
            problem = "" if ids else "found a prompt without tokens"
        except LorafoldError as error:
            text, problem = "", str(error)
        return {"ids": ids, "marked": is_marked(text), "problem": problem}


class PromptExamples(TableExamples[TokenizedPrompt]):
    """The examples of a table that `PromptEncoder` made."""

    def __init__(self, table: pa.Table, rows: Rows) -> None:
        super().__init__(table, np.iinfo(np.int32).max, np.arange(len(table)))
        self._rows, self.told_by = rows, (self._ids,)

    def example(self, entry: int) -> TokenizedPrompt:
        number = int(self.rows[entry])
        [place] = self._rows.origins.places([number])
        return TokenizedPrompt(tuple(self._ids[entry].tolist()), self._rows[number], str(place))


def prompt_data(table: pa.Table, rows: Rows, most: int) -> Encoded:
    """The examples of a table that `PromptEncoder` made, each of `most` tokens at most."""
    examples = PromptExamples(table, rows)
    longest = int(examples.lengths.max(initial=0))
    if longest > most:
        raise LorafoldError(
            f"{examples[int(examples.lengths.argmax())].where}: found a prompt of {longest} tokens,"
            f" expected at most {most}, which max_length leaves beside max_new_tokens"
        )
    report = PromptReport(len(examples), longest, examples.marked)
    return Encoded(examples, report, rows.parts)
