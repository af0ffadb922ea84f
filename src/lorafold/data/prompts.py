"""Prompts from rows, for generation and for reinforcement learning.

The prompt consists of all messages before a final assistant turn, which is the reference for
evaluation. Reward functions receive the other fields of the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorafold.data.arrow import Array, TableExamples, to_batch
from lorafold.data.chat_template import apply_template, template_of
from lorafold.data.control_tokens import is_marked, mark_as_text, rendered_ids
from lorafold.data.examples import tokenizer_identity
from lorafold.data.formats import (
    CONVERSATIONS,
    PROMPT_ONLY,
    PROMPTS,
    ROW_FORMATS,
    Conversation,
    RowFormat,
    format_of,
    formats_for,
)
from lorafold.data.json_input import Row
from lorafold.data.render import ConversationRenderings, check_shown, check_supported, prompt_of
from lorafold.data.row_store import Rows, parts_of
from lorafold.data.tokenizing import Encoded, Encoder, Report
from lorafold.errors import LorafoldError, listed

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

PROMPT_FORMATS = tuple(f for f in (*ROW_FORMATS, PROMPT_ONLY) if PROMPTS in f.provides)


NO_PROMPT = "found no message before the assistant turn, expected a prompt"


class Reference(NamedTuple):
    """An assistant turn's text, its rendered prompt, and the content of the message before it."""

    question: str
    prompt: str
    text: str


def references(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[Reference]:
    """Returns the last assistant turn of each conversation with its prompt. The turn's text is its
    content or, for tool calls, the rendered text without special tokens and reasoning. The prompt
    contains special tokens, so tokenize it with add_special_tokens=False.
    """
    result, bad = [], []
    for number, conversation in enumerate(conversations, 1):
        turns = replace(conversation, trained=0).turns
        if not turns or not turns[-1]:
            what = "no assistant turn after a prompt" if conversation.messages else "plain text"
            bad.append(f"row {number}: found {what}")
            continue
        try:
            result.append(reference_of(conversation, turns[-1], tokenizer))
        except LorafoldError as error:
            raise LorafoldError(f"data: row {number}: {error}") from error
    if bad:
        raise LorafoldError(
            "data: evaluation by generation needs rows with a prompt and a reference completion:"
            f" {listed(bad, '; ')}"
        )
    return result


def without_reasoning(text: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        return text
    return text[template_of(tokenizer).block.end(text, prompt) :]


def reference_of(
    conversation: Conversation, last: int, tokenizer: PreTrainedTokenizerBase
) -> Reference:
    messages = conversation.messages[: last + 1]
    check_supported(conversation, tokenizer)
    given = mark_as_text(Conversation(messages, 0, conversation.tools), tokenizer)
    renderings = ConversationRenderings(given, tokenizer)
    prompt = apply_template(renderings.formatted[:last], tokenizer, given.tools, True)
    question, message = messages[last - 1].get("content", ""), messages[last]
    if not message.get("tool_calls"):
        check_shown(replace(given, messages=given.messages[:last]), prompt, tokenizer)
        return Reference(question, prompt, message.get("content", ""))
    turn = renderings.turn(last)
    if turn is None:
        raise LorafoldError(
            f"messages[{last}]: the chat template renders this turn differently at generation, so"
            " it can't be a reference completion; leave this row out"
        )
    check_shown(given, turn.text, tokenizer)
    ids = rendered_ids(without_reasoning(turn.completion, prompt, tokenizer), tokenizer)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Reference(question, prompt, str(text))


class PromptRow(NamedTuple):
    text: str
    reference: str | None


def _conversation(row: Row) -> Conversation:
    row_format = format_of(row, PROMPT_FORMATS)
    return Conversation([]) if row_format is None else row_format.extract(CONVERSATIONS, row)


def questions_in(row: Row) -> list[str]:
    """Returns the prompts in a row as text, case-folded and without surrounding whitespace: the
    messages before each assistant turn, and all messages if the last one is not the assistant's.
    """
    messages = _conversation(row).messages
    keys = [json.dumps([m["role"], str(m.get("content", "")).strip().casefold()]) for m in messages]
    ends = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
    if messages and messages[-1]["role"] != "assistant":
        ends.append(len(messages))
    return ["\n".join(keys[:n]) for n in ends]


def prompts_of(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, name: str
) -> list[PromptRow]:
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            conversation = _conversation(row)
            last = len(conversation.messages) - 1
            if last >= 0 and conversation.messages[last]["role"] != "assistant":
                prompts.append(PromptRow(prompt_of(conversation, tokenizer), None))
                continue
            if last < 1:
                raise LorafoldError(NO_PROMPT)
            reference = reference_of(conversation, last, tokenizer)
            prompts.append(PromptRow(reference.prompt, reference.text))
        except LorafoldError as error:
            raise LorafoldError(f"{name}: row {number}: {error}") from error
    return prompts


PROMPT_KEYS = ("prompt", "messages", "conversations")  # keys that may contain the prompt


@dataclass(frozen=True)
class TokenizedPrompt:
    """`ids` (T,) are the tokens of the row's prompt, and `room` is the number of tokens by which
    the longest accepted prompt is longer. `where` names the row in messages.
    """

    ids: tuple[int, ...]
    row: Mapping[str, Any]
    where: str
    room: int = 0

    @property
    def question(self) -> Any:
        if "prompt" in self._format.keys:
            return self.row["prompt"]
        return [dict(message) for message in self.conversation.messages]

    @property
    def conversation(self) -> Conversation:
        return self._format.extract(PROMPTS, dict(self.row))

    @property
    def answer(self) -> str | None:
        said = self._format.conversation(dict(self.row)).messages[len(self.conversation.messages) :]
        return said[-1].get("content") or None if said else None

    @property
    def other_fields(self) -> dict[str, Any]:
        """The row's fields except the prompt. They include `answer` if the row has a reference."""
        fields = {key: value for key, value in self.row.items() if key not in PROMPT_KEYS}
        if fields.get("answer") is None and self.answer is not None:
            fields["answer"] = self.answer
        return fields

    @property
    def _format(self) -> RowFormat:
        row_format = format_of(dict(self.row), formats_for(PROMPTS))
        assert row_format is not None  # the row was checked
        return row_format


@dataclass(frozen=True, eq=False)
class PromptEncoder(Encoder):
    """Encodes rows to the columns `row`, `ids` (T,), `marked` and `problem`."""

    tokenizer: PreTrainedTokenizerBase
    row_content = PROMPTS

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "prompts", **tokenizer_identity(self.tokenizer)}

    def encode(self, contents: Sequence[Conversation], first: int) -> pa.RecordBatch:
        entries = [{"row": n} | self._prompt(one) for n, one in enumerate(contents, first)]
        return to_batch(entries, ("row",), ("ids",), ("marked",), ("problem",))

    def _prompt(self, given: Conversation) -> dict[str, Any]:
        try:
            if not given.messages:
                raise LorafoldError(NO_PROMPT)
            text = prompt_of(given, self.tokenizer)
            ids = rendered_ids(text, self.tokenizer)
        except LorafoldError as error:
            return {"ids": [], "marked": False, "problem": str(error)}
        problem = "" if ids else "found a prompt without tokens, expected at least one"
        return {"ids": ids, "marked": is_marked(text), "problem": problem}


class PromptExamples(TableExamples[TokenizedPrompt]):
    def __init__(self, table: pa.Table, rows: Rows, max_tokens: int, indices: Array) -> None:
        super().__init__(table, np.iinfo(np.int32).max, indices)
        self._rows, self._max_tokens, self.compared_by = rows, max_tokens, (self._ids,)

    def item(self, index: int) -> TokenizedPrompt:
        number = int(self.rows[index])
        [place] = self._rows.origins.places([number])
        ids = tuple(self._ids[self.indices[index]].tolist())
        return TokenizedPrompt(ids, self._rows[number], str(place), self._max_tokens - len(ids))


def prompt_data(table: pa.Table, rows: Rows, max_tokens: int, drops: bool = False) -> Encoded:
    """Drops prompts of more than `max_tokens` tokens, or raises if there are any."""
    examples = PromptExamples(table, rows, max_tokens, np.arange(len(table)))
    lengths, dropped = examples.lengths, ""
    if (longest := int(lengths.max(initial=0))) > max_tokens:
        kept = np.flatnonzero(lengths <= max_tokens)
        if not (drops and len(kept)):
            raise LorafoldError(
                f"{examples[int(lengths.argmax())].where}: found a prompt of {longest} tokens,"
                f" expected at most {max_tokens} (max_length minus max_new_tokens); raise"
                " max_length, or drop such prompts (long_prompts=dropped)"
            )
        dropped = f"; left out {len(lengths) - len(kept)} longer than {max_tokens} tokens"
        examples = PromptExamples(table, rows, max_tokens, kept)
        longest = int(examples.lengths.max())
    line = f"{len(examples)} prompts; the longest has {longest} tokens{dropped}"
    parts = parts_of(examples.rows, rows.parts)
    return Encoded(examples, Report(line, marked=examples.marked), parts)
