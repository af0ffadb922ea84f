"""A conversation with one model and any of its adapters.

    with Chat(model, tokenizer, {"sql": "adapter1"}, system="You are brief.") as chat:
        turn = chat.ask("Which users signed up today?")
        answer = "".join(chat.answer(turn, chat.active))    yields text for each token
        chat.keep(turn, answer)

If a prompt would leave too little room for the answer in the model's context, `ask` omits the
oldest turns from it; `save` still writes them. If an active adapter was trained on single questions
(`single`), each question starts a new conversation, unless `continued` is set.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lorafold.core.attach import only
from lorafold.data.control_tokens import rendered_ids
from lorafold.data.formats import Message
from lorafold.data.render import render
from lorafold.data.rows import read_rows
from lorafold.engine import Engine, Request, Sampling
from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_text
from lorafold.generation import GREEDY, end_tokens, positions_left, prompt_ids, text_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, NONE, ALL = "base", "none", "all"  # reserved: no adapter may have these names


@dataclass(frozen=True)
class Turn:
    """A user message and its rendered prompt."""

    text: str
    prompt: str
    room: int  # maximum tokens of the answer
    first: int  # index of the first history message in the prompt
    dropped: int  # number of turns that earlier prompts contained and this prompt omits
    afresh: bool = False  # whether it starts a new conversation


class Chat:
    """A conversation whose next answer uses the adapters in `active`, initially all. `adapters`
    maps the user's names to adapter names on the model, and `single` has the user's names of
    adapters that were trained on single questions. No other code may use the model until `close`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Mapping[str, str],
        *,
        single: Collection[str] = (),
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
    ) -> None:
        self.model, self.tokenizer, self.adapters = model, tokenizer, dict(adapters)
        self.system, self.max_new_tokens, self.sampling = system, max_new_tokens, sampling
        self.active: tuple[str, ...] = tuple(self.adapters)
        self.single, self.both, self.continued = frozenset(single), False, False
        given = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = [given if isinstance(given, int) and given > 0 else None, positions_left(model)]
        self.context = min((n for n in limits if n is not None), default=None)
        self.reset()
        self._ends, length = end_tokens(model, tokenizer), self.context or sys.maxsize
        with ExitStack() as stack:
            stack.enter_context(only(model))
            self._engine = stack.enter_context(Engine(model, tokenizer, slots=1, length=length))
            # also runs on garbage collection and at exit
            self._close = weakref.finalize(self, stack.pop_all().close)

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        self.messages: list[Message] = []  # user and assistant alternate
        self._first = 0  # index of the first message in prompts
        self._starts = [0]  # indices of the first messages of conversations

    @property
    def afresh(self) -> bool:
        """Whether each question starts a new conversation."""
        return not self.continued and not self.single.isdisjoint(self.active)

    def switch(self, name: str) -> None:
        """Selects the adapters of further answers: one name, `none` (the base model) or `all`."""
        choices = {NONE: (), ALL: tuple(self.adapters), **{n: (n,) for n in self.adapters}}
        if name not in choices:
            raise LorafoldError(f"found no adapter {name}, expected one of {', '.join(choices)}")
        self.active = choices[name]

    def speakers(self) -> list[tuple[str, ...]]:
        """Returns the adapters for each answer to the next message, () for the base model. If there
        are two answers, only the second should be kept.
        """
        return [(), self.active] if self.both and self.active else [self.active]

    def ask(self, text: str) -> Turn:
        """Renders the next prompt. Its history leaves room for `max_new_tokens` tokens, or for half
        of the context if that is less.
        """
        afresh, context = self.afresh and bool(self.messages), self.context or sys.maxsize
        start = first = len(self.messages) if afresh else self._first
        while True:
            messages = [*self.conversation(first), {"role": "user", "content": text}]
            prompt = render(messages, self.tokenizer, for_generation=True)
            used = len(rendered_ids(prompt, self.tokenizer))
            left = context - used
            if left >= min(self.max_new_tokens, context // 2) or first >= len(self.messages):
                break
            first += 2
        if left < 1:
            system = " and the system message" * (self.system is not None)
            raise LorafoldError(
                f"this message{system}: found {used} tokens, expected fewer than the model's"
                f" context length, {context}; the message was not sent"
            )
        room, dropped = min(self.max_new_tokens, left), (first - start) // 2
        return Turn(text, prompt, room, first, dropped, afresh)

    def answer(self, turn: Turn, names: Sequence[str]) -> Generator[str, None, None]:
        """Yields the answer's text, token by token. Closing the generator cancels the request."""
        adapter = "/".join(names) or None  # the user's names have no slash
        if adapter and adapter not in self._engine.adapters.names():
            self._engine.adopt(adapter, [self.adapters[name] for name in names])
        sampling = replace(self.sampling, seed=self.sampling.seed + len(self.messages) // 2)
        ids = prompt_ids(self.tokenizer, turn.prompt)
        yield from text_pieces(
            self._engine, Request("answer", ids, turn.room, adapter, sampling, self._ends)
        )

    def keep(self, turn: Turn, answer: str) -> None:
        self._starts += [len(self.messages)] * turn.afresh
        self.messages.append({"role": "user", "content": turn.text})
        self.messages.append({"role": "assistant", "content": answer})
        self._first = turn.first

    def conversation(self, first: int = 0, end: int | None = None) -> list[Message]:
        """Returns the system message, if any, and the messages from index `first` to `end`."""
        if self.system is None:
            return self.messages[first:end]
        return [{"role": "system", "content": self.system}, *self.messages[first:end]]

    def save(self, path: str | Path) -> int:
        """Appends the conversation to a JSONL file as a training row, atomically; if questions were
        asked afresh, as a row each. Returns the number of rows in the file.
        """
        file = Path(path).expanduser()
        if not self.messages:
            raise LorafoldError(f"{path} was not written: the conversation is empty")
        if file.suffix != ".jsonl":
            raise LorafoldError(f"{path}: expected a file name that ends in .jsonl")
        rows = list(read_rows(str(file))) if file.exists() else []
        if any("messages" not in row for row in rows):
            raise LorafoldError(f"{path}: found rows without the field messages; use another file")
        borders = pairwise([*self._starts, len(self.messages)])
        rows += [{"messages": self.conversation(first, end)} for first, end in borders]
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return len(rows)


def label(names: Sequence[str]) -> str:
    return " + ".join(names) or BASE


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """Returns the last component of each path, with -2, -3, ... if it is taken or reserved."""
    names: list[str] = []
    for path in paths:
        last = os.path.basename(os.path.abspath(Path(path).expanduser()))
        numbered = chain([last], (f"{last}-{n}" for n in count(2)))
        names.append(next(name for name in numbered if name not in (*names, BASE, NONE, ALL)))
    return names
