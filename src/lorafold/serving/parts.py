"""What a completion says, told apart as it comes: reasoning, content, calls of tools.

    reader = PartReader(tokenizer, prompt, tools)
    reader.add("Let me see. <tool_")        [("content", "Let me see.")]
    reader.finish()                         the rest, and the calls

Text is held back while it may be the beginning of a mark, and from the first call on, so that
nothing is ever taken back. A call that can't be read is content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafold.data.calls import grammar_of, parse_calls, special_words
from lorafold.data.messages import Tool
from lorafold.data.templates import template_of
from lorafold.errors import LorafoldError

REASONING, CONTENT = "reasoning_content", "content"
Part = tuple[str, str]  # the field of a message, and what is added to it


class PartReader:
    """One completion.

    Args:
        tokenizer: the model's, whose chat template has the marks.
        prompt: the rendered prompt, which may open the reasoning.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, tools: Sequence[Tool]
    ) -> None:
        self._tokenizer, self._tools, self._held = tokenizer, tools, ""
        self.length = 0  # of what was added
        block = template_of(tokenizer).block
        self._opening, self._closing = block.opening, block.closing
        opened = prompt.rstrip().endswith(block.opening)
        self._state = "thinking" if opened else "start" if block.shown else "saying"
        grammar = grammar_of(tokenizer) if tools else None
        words = special_words(tokenizer)
        self._call = grammar.without(words).before.strip() if grammar else ""
        self._all = bool(grammar) and not self._call  # calls have no mark: all may be one

    @property
    def field(self) -> str:
        """The field of the message that is being said, empty for calls."""
        if self._state == "calling":
            return ""
        return REASONING if self._state == "thinking" else CONTENT

    def add(self, piece: str) -> list[Part]:
        """The parts that a piece of text completes."""
        self._held += piece
        self.length += len(piece)
        parts: list[Part] = []
        if self._state == "start":
            text = self._held.lstrip()
            if text.startswith(self._opening):
                self._state, self._held = "thinking", text[len(self._opening) :].lstrip()
            elif text and not self._opening.startswith(text):
                self._state = "saying"
        if self._state == "thinking":
            before, found, after = self._held.partition(self._closing)
            if found:
                parts.append((REASONING, before.rstrip()))
                self._state, self._held = "saying", after.lstrip()
            else:
                parts.append((REASONING, self._take(self._closing)))
        if self._state == "saying" and not self._all:
            at = self._held.find(self._call) if self._call else -1
            if at >= 0:
                parts.append((CONTENT, self._held[:at].rstrip()))
                self._state, self._held = "calling", self._held[at:]
            else:
                parts.append((CONTENT, self._take(self._call)))
        return [part for part in parts if part[1]]

    def finish(self) -> tuple[list[Part], list[dict[str, Any]]]:
        """The parts that are left, and the calls, in OpenAI's form with arguments as objects."""
        calls: list[dict[str, Any]] = []
        if self._state == "calling" or self._all:
            try:
                calls = parse_calls(self._held, self._tokenizer, self._tools)
            except (LorafoldError, RecursionError, MemoryError):  # nested without end
                calls = []
        if calls or not self._held:
            return [], calls
        return [(REASONING if self._state == "thinking" else CONTENT, self._held)], []

    def _take(self, mark: str) -> str:
        """What can't be the beginning of a mark any more, nor whitespace before one."""
        text = self._held
        if not mark:
            self._held = ""
            return text
        n = next(
            (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])),
            0,
        )
        said = text[: len(text) - n].rstrip()
        self._held = text[len(said) :]
        return said
