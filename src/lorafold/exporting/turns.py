"""What a chat template writes around the turns of a plain chat, found by rendering.

    system given     before S between u a_open a u_open u ... end
    none given       start            u a_open a u_open u ... end

    S, u, a     what the system, the user and the assistant say: probes
    end         closes the last turn of the user, and opens the assistant's

The marks are read off three renderings, and then every conversation of `CHATS` is rendered by them
and by the template. Where a template has its system message in the last turn of the user instead of
the first, it is `late`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafold.data.messages import Message
from lorafold.data.render import render
from lorafold.errors import LorafoldError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

S, U, A, V = "probe rule", "probe question", "probe answer", "probe second"
ROLES = {"s": "system", "u": "user", "a": "assistant"}
CHATS = ("u", "su", "uau", "suau", "uauau", "suauau")
SAID = (
    "Line one.\nLine two: {{ 3 }} \"x\" 'y' <b>",
    "Grüße, 世界 🚀 & 100%",
    "What is 12 + 30?",
    "{% if x %} \\n $y",
    "No.",
    "And then?",
)


@dataclass(frozen=True)
class Turns:
    """The marks above. `system` is None for a template that takes no system message."""

    start: str
    system: tuple[str, str] | None
    a_open: str
    u_open: str
    end: str
    late: bool = False

    def text(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation that begins with the user, or with a system message."""
        first = messages[0]["content"] if messages[0]["role"] == "system" else None
        said = [str(m["content"]) for m in messages if m["role"] != "system"]
        before, between = self.system or ("", "")
        if self.late and first is not None:
            said[-1] = f"{before}{first}{between}{said[-1]}"
        opened = self.start if self.late or first is None else f"{before}{first}{between}"
        parts = [opened, said[0]]
        for n, text in enumerate(said[1:], 1):
            parts += [self.a_open if n % 2 else self.u_open, text]
        return "".join([*parts, self.end])


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The marks of a tokenizer's chat template.

    Raises LorafoldError for a template that writes a plain chat in a way that no marks say.
    """

    def written(messages: Sequence[Message]) -> str:
        return render(messages, tokenizer, for_generation=True)

    start, end = _around(written(_chat("u", [U])), [U])
    _, a_open, u_open, _ = _around(written(_chat("uau", [U, A, V])), [U, A, V])
    plain = Turns(start, None, a_open, u_open, end)
    given = _or_refused(written, _chat("su", [S, U]))
    tried = [plain]
    if given is not None:
        before, between, _ = _around(given, [S, U])
        tried = [Turns(start, (before, between), a_open, u_open, end)]
        if before.startswith(start):
            late = (before.removeprefix(start), between)
            tried.append(Turns(start, late, a_open, u_open, end, late=True))
    wrong: dict[Turns, str] = {}
    for found in tried:
        wrong[found] = _first_wrong(found, written)
        if not wrong[found]:
            return found
    raise LorafoldError(
        "the model's chat template can't be said in Ollama's language: it writes"
        f" {wrong[tried[0]]}; --to gguf-model has the template itself, which llama.cpp's server"
        " applies"
    )


def adds(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a template has beside plain chat, a sentence each."""
    template = str(tokenizer.chat_template)
    found = []
    if beside := [what for what, word in BESIDE.items() if re.search(word, template)]:
        found.append(
            f"the template for Ollama is plain chat: it has no {' and no '.join(beside)}, which the"
            " model's own has"
        )
    spaced = f" {U} "
    if spaced not in render(_chat("u", [spaced]), tokenizer, for_generation=True):
        found.append("the model's template trims what is said, which Ollama's language can't")
    if re.search(r"strftime_now\s*\(", template):
        found.append("the model's template writes today's date, and Ollama's keeps that of today")
    return found


BESIDE = {"tools": r"\btools\b", "reasoning": r"reasoning_content|enable_thinking|<think>"}


def _chat(roles: str, said: Sequence[str]) -> list[Message]:
    return [{"role": ROLES[r], "content": text} for r, text in zip(roles, said, strict=True)]


def _around(text: str, said: Sequence[str]) -> list[str]:
    """The parts of a text between what was said. Raises LorafoldError unless each is there once."""
    parts = []
    for one in said:
        before, found, text = text.partition(one)
        if not found or one in text:
            raise LorafoldError(
                f"the model's chat template does not write {one!r}, said in a plain chat,"
                " once and in its place"
            )
        parts.append(before)
    return [*parts, text]


def _or_refused(written: Callable[[Sequence[Message]], str], chat: list[Message]) -> str | None:
    """What a template writes of a conversation; None if it refuses it or leaves out its rule."""
    try:
        text = written(chat)
    except LorafoldError:
        return None
    return text if S in text else None


def _first_wrong(found: Turns, written: Callable[[Sequence[Message]], str]) -> str:
    """Which conversation a template writes otherwise than the marks, or nothing."""
    for roles in CHATS:
        if roles.startswith("s") and found.system is None:
            continue
        chat = _chat(roles, SAID[: len(roles)])
        made: Any = found.text(chat)
        if (own := written(chat)) != made:
            at = next(
                (n for n, (a, b) in enumerate(zip(own, made, strict=False)) if a != b),
                min(len(own), len(made)),
            )
            said = "-".join(ROLES[r] for r in roles)
            return f"{shortened(repr(own[max(at - 20, 0) : at + 20]), 60)} in a chat of {said}"
    return ""
