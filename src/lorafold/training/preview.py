"""The preview of a run, in the terminal and as an HTML page: its first rows as the model sees them,
with the trained tokens marked, and problems found in the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from lorafold.data.examples import NO_LOSS, EncodingReport, Example, encode_row
from lorafold.data.formats import CONVERSATIONS, Conversation
from lorafold.data.json_input import Row
from lorafold.data.messages import Message, Tool
from lorafold.data.row_checks import Findings, describe_template
from lorafold.data.row_store import Rows
from lorafold.data.stream import RowStream
from lorafold.files.html_page import render_page, write_page
from lorafold.files.terminal import print_lines
from lorafold.objectives.objective import Data, Objective, examples_of
from lorafold.peft.adapter_directory import open_all
from lorafold.recipe.resolve_settings import ignored_note
from lorafold.training.inputs import (
    RunRequest,
    objective_of,
    prepare_tokenizer,
    rendering_of,
    tokenize_rows,
    train_and_eval_rows,
    with_max_length,
)

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

MAX_CHECKED_BYTES = 4_000_000  # bytes of rows up to which a preview tokenizes everything


@dataclass(frozen=True)
class PreviewExample:
    """One example of a row. The trained parts of `text` are bold."""

    heading: str
    conversation: Conversation
    text: Text

    @property
    def tools(self) -> list[str]:
        return [*map(_tool_line, self.conversation.tools)]

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [(turn["role"], _turn_text(turn)) for turn in self.conversation.messages]

    @property
    def schemas(self) -> str:
        return json.dumps(self.conversation.tools, indent=1, ensure_ascii=False)

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Yields the parts of the text, and whether each is trained."""
        for piece, style, _ in self.text.render(Console(), end=""):
            trained = bool(style and style.bold)
            bracketed = trained and piece.endswith("⟧")
            yield piece[:-1].replace("⟦", "", 1) if bracketed else piece, trained


def show(
    request: RunRequest, console: Console, rows: int = 3, html: Path | None = None
) -> Findings:
    """Prints the first rows with the trained tokens marked, and returns the findings about the
    data.
    """
    if note := ignored_note(request.recipe):
        print_lines(console, note)
    saved = open_all(request.adapters)
    request = with_max_length(request, saved, console)
    objective = objective_of(request, saved)
    tokenizer, _ = prepare_tokenizer(request, objective, console, saved)
    findings = _findings(request, objective, tokenizer, console)
    first, rendering = request.first_rows(rows), rendering_of(request.recipe)
    train = examples_of(objective, first, tokenizer, request.recipe.max_length, rendering=rendering)
    examples = list(_previewed(request, first, train, objective, tokenizer))
    template = [] if tokenizer.chat_template is None else describe_template(tokenizer).lines
    for example in examples:
        console.rule()
        print_lines(
            console,
            example.heading,
            *(f"  tool: {line}" for line in example.tools),
            *(f"  {role}: {text}" for role, text in example.turns),
        )
        console.print(example.text)
    if html is not None:
        roles = [(role, f"{n:,}", f"{t:,}") for role, (n, t) in findings.roles.items()]
        body = render_page(
            "training/preview.html",
            findings=findings, roles=roles, summary=template, examples=examples,
        )  # fmt: skip
        write_page(f"Preview of {request.source}", body, html)
        print_lines(console, f"page: {html}")
    return findings


def _findings(
    request: RunRequest, objective: Objective, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Findings:
    """The findings about all rows, or only about the first ones if tokenizing all would take long.
    """
    limit = ""
    if not isinstance(request.rows, RowStream):
        train, held_out = train_and_eval_rows(request)
        rows, eval_rows = _first_rows(train), None if held_out is None else _first_rows(held_out)
        request = replace(request, rows=rows, eval_rows=eval_rows)
        if rows is not train or eval_rows is not held_out:
            limit = f"only the first rows are checked ({len(rows):,} to train on); a run checks all"
            print_lines(console, f"data: {limit}")
    *_, findings = tokenize_rows(request, tokenizer, objective, console)
    if not findings.lines:
        print_lines(console, f"data: {findings.nothing}")
    return replace(findings, unseen=limit or findings.unseen)


def _first_rows(rows: Sequence[Row]) -> Sequence[Row]:
    n = max(1, len(rows) * MAX_CHECKED_BYTES // max(1, Rows.of(rows).digest_and_size[1]))
    if n >= len(rows):
        return rows
    return rows.select(np.arange(n)) if isinstance(rows, Rows) else rows[:n]


def _previewed(
    request: RunRequest, rows: Sequence[Row], train: Data, objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[PreviewExample]:
    if not isinstance(train.report, EncodingReport):
        for number, example in enumerate(train.examples, 1):
            heading = f"example {number}: {len(example.ids)} tokens"
            yield PreviewExample(heading, Conversation([]), objective.preview(example, tokenizer))
        return
    limit = request.recipe.max_length
    conversations = Rows.of(rows).extract(CONVERSATIONS)
    for number, (row, conversation) in enumerate(zip(rows, conversations, strict=True), 1):
        examples, trained = encode_row(row, tokenizer, rendering_of(request.recipe))
        left_out = f"; {trained.left_out} turns are left out" if trained.left_out else ""
        for n, example in enumerate(examples, 1):
            cut = Example(example.ids[:limit], example.labels[:limit])
            part = f", example {n} of {len(examples)}" if len(examples) > 1 else ""
            num_trained = sum(label != NO_LOSS for label in cut.labels)
            truncated = f", cut at {limit}" if len(example.ids) > limit else ""
            heading = (
                f"row {number}{part}: {num_trained} of {len(example.ids)} tokens are trained"
                f" on{truncated}{left_out}"
            )
            yield PreviewExample(heading, conversation, objective.preview(cut, tokenizer))


def _tool_line(tool: Tool) -> str:
    function = tool["function"]
    parameters = function.get("parameters") or {}
    names = ", ".join(parameters.get("properties") or ())
    return f"{function['name']}({names}) {function.get('description') or ''}".rstrip()


def _turn_text(message: Message) -> str:
    parts = []
    if thought := message.get("reasoning_content"):
        parts.append(f"thinks: {_short(thought)}")
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        parts.append(f"calls {function['name']} {_short(arguments)}")
    if content := message.get("content"):
        parts.append(_short(content))
    return " | ".join(parts)


def _short(text: str, length: int = 72) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
