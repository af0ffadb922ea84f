"""A conversation with one model under any of the adapters that it carries.

    with Chat(model, tokenizer, {"sql": "adapter1"}, system="You are brief.") as chat:
        turn = chat.ask("Which users signed up today?")
        answer = "".join(chat.answer(turn, chat.active))    it streams: a piece of text a token
        chat.keep(turn, answer)

Each turn renders the system message, the history and the question through the chat template. Where
that leaves no room for an answer in the model's context, the oldest turns are left out of what the
model sees; the system message never is, and `save` writes all turns. One engine answers them all:
the model is in memory once, and each answer is a request under the adapters that give it. Nothing
here reads from or prints to a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lorafold.core.attach import only
from lorafold.data.control_tokens import ids_of
from lorafold.data.render import render
from lorafold.data.rows import read_rows
from lorafold.data.shapes import Message
from lorafold.engine import Engine, Request, Sampling
from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_text
from lorafold.generation import GREEDY, end_tokens, pieces, table_left, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, NONE, ALL = "base", "none", "all"  # words that mean something where an adapter is named


@dataclass(frozen=True)
class Turn:
    """One question, ready to be answered.

    `prompt` is the rendered text, `room` the most tokens that the answer may have. The model sees
    the history from message `first` on, and `dropped` turns of it are left out for the first time.
    """

    text: str
    prompt: str
    room: int
    first: int
    dropped: int


class Chat:
    """The history, who answers next, and the limits of an answer. The model is the engine's until
    `close`, which gives it back as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Mapping[str, str],
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
    ) -> None:
        """Begin a conversation in which all adapters are active, one over the other."""
        self.model, self.tokenizer, self.adapters = model, tokenizer, dict(adapters)
        self.system, self.max_new_tokens, self.sampling = system, max_new_tokens, sampling
        self.active: tuple[str, ...] = tuple(self.adapters)
        self.both = False
        self.context = context_of(model)
        self.reset()
        self._ends, length = end_tokens(model, tokenizer), self.context or sys.maxsize
        with ExitStack() as stack:
            stack.enter_context(only(model))
            self._engine = stack.enter_context(Engine(model, tokenizer, slots=1, length=length))
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Give the model back."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget what was said. The system message and the choice of adapters stay."""
        self.messages: list[Message] = []  # user and assistant in turn
        self._first = 0  # the first message that the model still sees

    def switch(self, name: str) -> None:
        """Let one adapter answer from now on, or `none` (the bare base), or `all` of them.

        LorafoldError for a name that is none of these.
        """
        choices = {NONE: (), ALL: tuple(self.adapters), **{n: (n,) for n in self.adapters}}
        if name not in choices:
            raise LorafoldError(f"no adapter {name}; expected {', '.join([*self.adapters, NONE])}")
        self.active = choices[name]

    def speakers(self) -> list[tuple[str, ...]]:
        """The adapters under which the next question is answered, once each; () is the base.

        The last one's answer is the one to keep.
        """
        return [(), self.active] if self.both and self.active else [self.active]

    def ask(self, text: str) -> Turn:
        """Make the next prompt, with as much of the history as fits.

        An answer has room for `max_new_tokens` tokens or half of the context, whichever is less,
        before old turns are kept. LorafoldError if the question alone is too long, or the chat
        template refuses the conversation.
        """
        first, question = self._first, {"role": "user", "content": text}
        if self.context is None:
            return Turn(text, self._render(first, question), self.max_new_tokens, first, 0)
        while True:
            prompt = self._render(first, question)
            used = len(ids_of(prompt, self.tokenizer))
            left = self.context - used
            if left >= min(self.max_new_tokens, self.context // 2) or first >= len(self.messages):
                break
            first += 2
        if left < 1:
            system = " and the system message" * (self.system is not None)
            raise LorafoldError(
                f"this message{system}: found {used} tokens, expected fewer than"
                f" {self.context}, the model's context; it was not sent"
            )
        dropped = (first - self._first) // 2
        return Turn(text, prompt, min(self.max_new_tokens, left), first, dropped)

    def answer(self, turn: Turn, names: Sequence[str]) -> Generator[str, None, None]:
        """The answer under these adapters, a piece of text a token. The history is left as it is.

        Close the iterator if you stop before its end, so that the answer is not computed further.
        """
        adapter = "/".join(names) or None  # a name that the user says has no slash
        if adapter and adapter not in self._engine.adapters.names():
            self._engine.adopt(adapter, [self.adapters[name] for name in names])
        sampling = replace(self.sampling, seed=self.sampling.seed + len(self.messages) // 2)
        ids = tokens_of(self.tokenizer, turn.prompt)
        yield from pieces(
            self._engine, Request("answer", ids, turn.room, adapter, sampling, self._ends)
        )

    def keep(self, turn: Turn, answer: str) -> None:
        """Add the question and its answer to the history."""
        self.messages.append({"role": "user", "content": turn.text})
        self.messages.append({"role": "assistant", "content": answer})
        self._first = turn.first

    def conversation(self) -> list[Message]:
        """Every message so far, the system message first if there is one."""
        return [*self._system(), *self.messages]

    def save(self, path: str | Path) -> int:
        """Add the conversation to a JSONL file, as a row that `lorafold train` reads; the file is
        replaced in one step. Returns how many rows it has now.

        LorafoldError if nothing was said yet, the name does not end in .jsonl, or the file exists
        and holds anything but rows of messages.
        """
        file = Path(path).expanduser()
        if not self.messages:
            raise LorafoldError(f"{path} was not written: nothing has been said yet")
        if file.suffix != ".jsonl":
            raise LorafoldError(f"{path}: expected a name that ends in .jsonl")
        rows = list(read_rows(str(file))) if file.exists() else []
        if any("messages" not in row for row in rows):
            raise LorafoldError(f"{path}: found rows without messages, expected messages in each")
        rows.append({"messages": self.conversation()})
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return len(rows)

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _render(self, first: int, question: Message) -> str:
        messages = [*self._system(), *self.messages[first:], question]
        return render(messages, self.tokenizer, for_generation=True)


def context_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model was made for, or None where its config sets no limit; of a table of
    positions those that the virtual tokens of what is active leave.
    """
    given = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [given if isinstance(given, int) and given > 0 else None, table_left(model)]
    return min((n for n in limits if n is not None), default=None)


def label(names: Sequence[str]) -> str:
    """What to call whoever answers under these adapters."""
    return " + ".join(names) or BASE


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """The last component of each path, with -2, -3, ... where it is taken or means something else.
    """
    names: list[str] = []
    for path in paths:
        own = os.path.basename(os.path.abspath(Path(path).expanduser()))
        numbered = chain([own], (f"{own}-{n}" for n in count(2)))
        names.append(next(name for name in numbered if name not in (*names, BASE, NONE, ALL)))
    return names
