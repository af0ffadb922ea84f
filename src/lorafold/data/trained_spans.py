"""What of a conversation is trained on: the texts of its examples, and the spans in them.

    prompt(i) = render(messages[:i], with the generation prompt)
    after(i)  = render(messages[:i + 1]) = prompt(i) + what the model shall generate

**The law**: the ids before a trained turn are those that generation starts from, and nothing that
the template supplies is trained on. So a trained turn begins where its prompt ends. Turns whose
`after` is a prefix of a longer text are spans of that text; a template that rewrites earlier turns
(drops their reasoning, say) has an example of its own for each turn. Where `after` does not begin
with the prompt, `data.prompt_mismatch` looks for the form that generation has; a turn without one
is left out and counted. If the template marks its own spans with {% generation %}, what lies
outside them is not trained on.

A turn ends with a token at which generation stops (`data.endings`). Where the template writes it
with the next message, `after` goes on through it; where it writes none, the tokenizer's own stands
there, and each turn has an example of its own, since no later prompt has that token.
"""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from lorafold.data.control_tokens import as_text
from lorafold.data.endings import WITH_NEXT, WITH_TURN, ending_of, specials_of, through_special
from lorafold.data.messages import Message
from lorafold.data.omissions import check_able, check_shown, hidden
from lorafold.data.prompt_mismatch import after_block, after_rewriting
from lorafold.data.reasoning import block_of
from lorafold.data.shapes import Conversation
from lorafold.data.template_forms import ASKED, KNOWN, apply, attempt, form_of, template_of
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_SPANS = re.compile(r"\{%[-+]?\s*generation\b")
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendering:
    """What of a conversation is trained on: all turns of the assistant or the last, with their
    reasoning or without, and with an end that the template does not write with the turn (auto) or
    without (none).
    """

    train_on: Literal["all", "last"] = "all"
    mask_reasoning: bool = False
    end_of_turn: Literal["auto", "none"] = "auto"


@dataclass(frozen=True)
class Rendered:
    """The text of one example and its trained character spans [start, end). `turns` are the
    characters at which its trained turns begin: the text before one is what generation starts from,
    so that the tokens are to be cut there.
    """

    text: str
    spans: tuple[Span, ...]
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trained:
    """The examples of one conversation. `left_out` assistant turns are not trained on, and the
    text of `hidden` trained turns lacks their reasoning, or what they say beside a call, since the
    template leaves it out. `turns` are the indices of the messages that are trained on.
    """

    renderings: tuple[Rendered, ...]
    left_out: int = 0
    hidden: int = 0
    turns: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TrainedTurn:
    """One assistant turn: a text that ends with it, where it starts and ends in that text, and the
    spans that the template marks, or None if it marks none anywhere.
    """

    text: str
    start: int
    end: int
    marks: tuple[Span, ...] | None

    @property
    def said(self) -> str:
        """What generation makes of it."""
        return self.text[self.start : self.end]


@lru_cache(maxsize=KNOWN)
def marks_own(template: str) -> bool:
    """Whether a chat template marks its own spans."""
    return bool(OWN_SPANS.search(template))


class Drawing:
    """The renderings of one conversation."""

    def __init__(self, conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer, self.tools = tokenizer, conversation.tools
        self.messages = conversation.messages
        self.form = form_of(tokenizer, self.tools)
        self.formed = self.form.of(self.messages)
        self.marks_own = marks_own(template_of(tokenizer, self.tools))

    @cached_property
    def whole(self) -> tuple[str, tuple[Span, ...] | None]:
        """The text of all messages, and the template's own marks in it."""
        return self._draw(self.formed)

    def prompt(self, i: int) -> str:
        """The text that the generation of turn i starts from."""
        return apply(self.formed[:i], self.tokenizer, self.tools, for_generation=True)

    def turn(self, i: int) -> TrainedTurn | None:
        """Turn i as generation would have it, or None where the template has no such form."""
        if i == 0:
            return None  # the first message has no prompt before it
        prompt, message = self.prompt(i), self.formed[i]
        text, marks = self.whole if i == len(self.formed) - 1 else self._draw(self.formed[: i + 1])
        if text.startswith(prompt):
            return _turn(text, prompt, marks)
        if message.get("reasoning_content"):
            bare = {k: v for k, v in message.items() if k != "reasoning_content"}
            plain, plain_marks = self._draw([*self.formed[:i], bare])
            if plain.startswith(prompt):
                return _turn(plain, prompt, plain_marks)
        reasoning = message.get("reasoning_content", "")
        said = self.messages[i].get("content", "")
        block, specials = block_of(self.tokenizer), specials_of(self.tokenizer)
        joined = after_block(prompt, text, (reasoning, said), block, specials)
        if joined is None:
            before = attempt(self.formed[:i], self.tokenizer, self.tools)
            joined = after_rewriting(prompt, text, before, said)
        if joined is None or marks == ():
            return None
        return _turn(joined, prompt, None if marks is None else ((len(prompt), len(joined)),))

    def ended(self, i: int, turn: TrainedTurn) -> TrainedTurn:
        """Turn i with its end."""
        text, ending = turn.text[: turn.end], ending_of(self.tokenizer)
        if ending.written == WITH_TURN:
            return turn
        end = ending.text
        if ending.written == WITH_NEXT:
            follows = [m for m in self.formed[i + 1 : i + 2] if m["role"] in ("user", "tool")]
            [next_one] = follows or self.form.of([ASKED])
            longer = attempt([*self.formed[: i + 1], next_one], self.tokenizer, self.tools)
            if longer.startswith(text):
                end = through_special(longer[len(text) :], self.tokenizer) or end
        marks = turn.marks
        if marks is not None and any(last > turn.start for _, last in marks):
            marks = (*marks, (len(text), len(text) + len(end)))
        return TrainedTurn(text + end, turn.start, len(text) + len(end), marks)

    def _draw(self, messages: list[Message]) -> tuple[str, tuple[Span, ...] | None]:
        if not self.marks_own:
            return apply(messages, self.tokenizer, self.tools), None
        from transformers.utils.chat_template_utils import render_jinja_template

        special: Any = self.tokenizer.special_tokens_map
        try:
            found: Any = render_jinja_template(
                [messages],
                tools=list(self.tools) or None,
                chat_template=template_of(self.tokenizer, self.tools),
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **special,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            apply(messages, self.tokenizer, self.tools)  # tells what is wrong in one line
            raise LorafoldError(f"the model's chat template: {error}") from error
        [text], [marks] = found
        return text, tuple((start, end) for start, end in marks)


def render_trained(
    conversation: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    rendering: Rendering = Rendering(),
) -> Trained:
    """Render a conversation and find the spans of its trained assistant turns.

    A conversation of which nothing is trained on gives its whole text, without spans.

    Args:
        conversation: The messages, and from which on they are trained on.
        tokenizer: A tokenizer with a chat template.
        rendering: What of them is trained on.

    Raises LorafoldError if the template refuses the conversation, or does not show its tools, a
    call, or what is said by anyone but the assistant.
    """
    check_able(conversation, tokenizer)
    conversation = as_text(conversation, tokenizer)
    drawing, messages = Drawing(conversation, tokenizer), conversation.messages
    whole, _ = drawing.whole
    turns = conversation.turns
    turns = turns[-1:] if rendering.train_on == "last" else turns
    called = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    drawn = {i: drawing.turn(i) for i in {*turns, *called}}
    calls = {i: turn.said for i in called if (turn := drawn[i]) is not None}
    check_shown(conversation, whole, tokenizer, calls)
    found: list[tuple[str, list[Span], list[int]]] = [(whole, [], [])]  # the longest text first
    left_out = lost = 0
    kept = set[int]()
    for i in reversed(turns):
        turn = drawn[i]
        if turn is None:
            left_out += 1
            continue
        lost += hidden(messages, i, turn.said)
        turn = turn if rendering.end_of_turn == "none" else drawing.ended(i, turn)
        spans = _spans(turn, rendering, tokenizer)
        if not spans:
            left_out += 1
            continue
        home = next((entry for entry in found if entry[0].startswith(turn.text)), None)
        if home is None:
            home = (turn.text, [], [])
            if turn.text.startswith(whole):  # and has its end
                found[0] = home
            else:
                found.append(home)
        kept.add(i)
        home[1].extend(spans)
        home[2].append(turn.start)
    renderings = [
        Rendered(text, tuple(sorted(spans)), tuple(sorted(starts)))
        for text, spans, starts in found
        if spans
    ]
    shown = tuple(renderings[::-1]) or (Rendered(whole, ()),)
    return Trained(shown, left_out, lost, frozenset(kept))


def _turn(text: str, prompt: str, marks: tuple[Span, ...] | None) -> TrainedTurn:
    # whitespace after the token that ends a turn is the template's
    return TrainedTurn(text, len(prompt), max(len(prompt), len(text.rstrip())), marks)


def _spans(
    turn: TrainedTurn, rendering: Rendering, tokenizer: "PreTrainedTokenizerBase"
) -> list[Span]:
    """The trained spans of a turn."""
    start, end = turn.start, turn.end
    if rendering.mask_reasoning:
        start += block_of(tokenizer).end(turn.text[start:end], turn.text[:start])
    if turn.marks is None:
        return [(start, end)] if start < end else []
    # a mark may go on to the end of the line, behind the token that ends the turn
    cut = ((max(start, first), min(len(turn.text), last)) for first, last in turn.marks)
    return [(first, last) for first, last in cut if first < last]
