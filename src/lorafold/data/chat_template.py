r"""Analyses chat templates by rendering probes, once per template: the form of messages (`form`),
the block of reasoning (`block`), and where the end of an assistant turn is written:

    with the turn               ... answer<end>\n
    with the next message       ... answer<user>\nnext          the next message's start is the end
    not at all                  ... answer                      the tokenizer's end token is trained

The end is the last of the consecutive special tokens after the answer.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property, lru_cache, partial
from os.path import commonprefix
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lorafold.data.messages import Message, Tool
from lorafold.errors import LorafoldError
from lorafold.models.built_in_templates import rewrite_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE: Mapping[str, Any] = MappingProxyType({})
KNOWN = 16  # cached templates
DATE = "strftime_now"  # transformers' function for templates
DATED = re.compile(rf"{DATE}\s*\(")
ASKING = re.compile(rf"""{DATE}\s*\(\s*(["'])(.*?)\1\s*\)""")
NAME, KEY, VALUE = "probe_function", "probe_key", "probe value"
THOUGHT, WORD, NEXT = "probe thought", "probe answer", "probe next"
PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": "Some text."}},
            "required": [KEY],
        },
    },
}
ASKED: Message = {"role": "user", "content": "probe question"}
SAID: Message = {"role": "assistant", "content": WORD}
SYSTEM: Message = {"role": "system", "content": VALUE}
OWN_SPANS = re.compile(r"\{%[-+]?\s*generation\b")
OPENED = re.compile(r"([<\[])(\w+)([>\]])\s*\Z")  # an open tag at the end of a prompt
CUT = re.compile(r"[<\[][^>\]\s]*\Z")  # an incomplete tag at the end of a common prefix
WITH_TURN: Final = "with the turn"
WITH_NEXT: Final = "with the next message"
NOWHERE: Final = "not at all"
Written = Literal["with the turn", "with the next message", "not at all"]


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLED: Message = {
    "role": "assistant",
    "tool_calls": [call(NAME, {KEY: VALUE}) | {"id": "probe0000"}],
}
RESULT: Message = {"role": "tool", "content": NEXT, "name": NAME, "tool_call_id": "probe0000"}


@dataclass(frozen=True)
class MessageForm:
    """Arguments as JSON `text`, `empty` content beside calls, content as lists of `parts`."""

    text: bool = False
    empty: bool = False
    parts: bool = False

    def of(self, messages: Sequence[Message]) -> list[Message]:
        formed = []
        for message in messages:
            if calls := message.get("tool_calls"):
                message = dict(message)
                if self.empty:
                    message.setdefault("content", "")
                if self.text:
                    message["tool_calls"] = [_with_text(call) for call in calls]
            if self.parts and isinstance(message.get("content"), str):
                message = message | {"content": [{"type": "text", "text": message["content"]}]}
            formed.append(message)
        return formed


@dataclass(frozen=True)
class Block:
    """The stripped texts around reasoning; `lead` and `between` include whitespace. `shown`: the
    template shows the last turn's reasoning. `spaced`: whitespace after the closing belongs to the
    block.
    """

    opening: str
    closing: str
    shown: bool
    spaced: bool
    lead: str
    between: str

    @classmethod
    def of_tags(cls, opening: str, closing: str) -> Block:
        """For a template that shows no reasoning; tags are on their own lines."""
        return cls(opening, closing, False, True, "\n", f"\n{closing}\n\n")

    def end(self, text: str, prompt: str) -> int:
        """Returns the length of the block at the start of a turn, or 0. The opening may be in the
        prompt.
        """
        start = len(text) - len(text.lstrip())
        if text.startswith(self.opening, start):
            start += len(self.opening)
        elif not prompt.rstrip().endswith(self.opening):
            return 0
        at = text.find(self.closing, start)
        if at < 0:
            return 0
        end = at + len(self.closing)
        return end + (len(text[end:]) - len(text[end:].lstrip())) * self.spaced


USUAL = Block.of_tags("<think>", "</think>")


@dataclass(frozen=True)
class Ending:
    """Where the end of a turn is written, its text (or the tokenizer's end token), and the ids of
    all tokens that end a turn.
    """

    written: Written
    text: str
    tokens: frozenset[int]


@dataclass(eq=False)
class Template:
    text: str
    tokenizer: PreTrainedTokenizerBase
    size: int  # the tokenizer's length

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder
        self.added = frozenset(added)  # ids of added tokens
        named = {token.content for token in added.values() if token.special}
        self.eos = str(self.tokenizer.special_tokens_map.get("eos_token") or "")
        known = sorted(filter(None, {*named, self.eos}), key=len, reverse=True)
        self.specials = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        self.marks_own = bool(OWN_SPANS.search(self.text))  # it has {% generation %} blocks

    @cached_property
    def form(self) -> MessageForm:
        question = str(ASKED["content"])
        shown = [
            question in attempt([ASKED], self.tokenizer, form=MessageForm(parts=p))
            for p in (False, True)
        ]
        parts = shown == [False, True]
        if "tool_calls" in self.text:
            arguments = {KEY: VALUE}
            message = {"role": "assistant", "tool_calls": [call(NAME, arguments)]}
            quoted = json.dumps(json.dumps(arguments))[1:-1]
            for form in (MessageForm(n > 1, n % 2 > 0, parts) for n in range(4)):
                text = attempt([ASKED, message], self.tokenizer, [PROBE_TOOL], form=form)
                after = text.rpartition(NAME)[2]
                odd = quoted in after or str(arguments) in after
                if KEY in after and VALUE in after and not odd:
                    return form
        return MessageForm(parts=parts)

    @cached_property
    def block(self) -> Block:
        turns = (SAID | {"reasoning_content": THOUGHT}, SAID)
        texts = [attempt([ASKED, turn], self.tokenizer) for turn in turns]
        prompt = attempt([ASKED], self.tokenizer, for_generation=True)
        if THOUGHT not in texts[0] or WORD not in texts[0]:
            return USUAL
        header = CUT.sub("", common(*texts, prompt))
        # an open tag at the end of the prompt is part of the block
        if opened := OPENED.search(header):
            header = header[: opened.start()]
        thoughtful, plain = (text[len(header) :] for text in texts)
        # a header before the answer doesn't belong to the block
        without = thoughtful.removesuffix(plain) if plain else thoughtful
        for block in (without, thoughtful.partition(WORD)[0]):
            opening, _, closing = block.partition(THOUGHT)
            if opening.strip() and closing.strip() and WORD not in block:
                lead = opening[len(opening.rstrip()) :]
                spaced = closing != closing.rstrip()
                return Block(opening.strip(), closing.strip(), True, spaced, lead, closing)
        return USUAL

    @cached_property
    def ending(self) -> Ending:
        behind = attempt([ASKED, SAID], self.tokenizer).rpartition(WORD)[2]
        at = 0
        for special in self.specials.finditer(behind):
            if at and behind[at : special.start()].strip():
                break
            at = special.end()  # through all consecutive special tokens
        written: Written = WITH_TURN
        ends = [behind[:at]]
        if not at:
            following = attempt([ASKED, SAID, {"role": "user", "content": NEXT}], self.tokenizer)
            between = following.rpartition(NEXT)[0].rpartition(WORD)[2]
            written, ends = NOWHERE, [self.eos]
            if end := self.through_special(between):
                written, ends = WITH_NEXT, [end, self._before_result()]
        each = [self.tokenizer(end, add_special_tokens=False).input_ids for end in ends if end]
        return Ending(written, ends[0], frozenset(int(ids[-1]) for ids in each if len(ids)))

    @cached_property
    def shows_tools(self) -> bool:
        conversations = ([ASKED], [SYSTEM, ASKED])
        return any(KEY in attempt(c, self.tokenizer, [PROBE_TOOL], True) for c in conversations)

    @cached_property
    def shows_calls(self) -> bool:
        after = [RESULT | {"content": VALUE}, {"role": "assistant", "content": VALUE}]
        texts = (attempt([ASKED, CALLED, *after[:n]], self.tokenizer) for n in (0, 2))
        return any(NAME in text.replace(VALUE, "") for text in texts)

    def through_special(self, text: str) -> str:
        """Returns the text through its first special token, or an empty text."""
        special = self.specials.search(text)
        return text[: special.end()] if special else ""

    def _before_result(self) -> str:
        text = attempt([ASKED, CALLED], self.tokenizer, [PROBE_TOOL]).rstrip()
        longer = attempt([ASKED, CALLED, RESULT], self.tokenizer, [PROBE_TOOL])
        follows = longer[len(text) :] if longer.startswith(text) and text else ""
        return self.through_special(follows.partition(NEXT)[0])


_known = lru_cache(maxsize=KNOWN)(Template)


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] = ()) -> Template:
    text = str(tokenizer.get_chat_template(tools=list(tools) or None))
    return _known(text, tokenizer, len(tokenizer))


def _with_text(given: dict[str, Any]) -> dict[str, Any]:
    function = given["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return given | {"function": function | {"arguments": text}}


def apply(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
    for_generation: bool = False,
    variables: Mapping[str, Any] = NONE,
) -> str:
    given: Any = list(tools) or None
    prompt: Any = {"tools": given, "add_generation_prompt": for_generation}
    try:
        if not tokenizer.is_fast:  # it may override the method
            prompt |= {"tokenize": False, **variables}
            return str(tokenizer.apply_chat_template(list(messages), **prompt))
        # apply_chat_template without its checks, which `data.messages` has done, takes two thirds
        # of the time
        template = tokenizer.get_chat_template(tools=given)
        special: Any = tokenizer.special_tokens_map | dict(variables)
        rendered: Any = render_jinja_template(
            [list(messages)], chat_template=template, **prompt, **special
        )
        return str(rendered[0][0])
    except TemplateError as error:
        raise LorafoldError(
            f"the model's chat template rejects this conversation: {error}"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise LorafoldError(
            f"the model's chat template can't render this conversation: {type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        ) from error


def attempt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
    for_generation: bool = False,
    form: MessageForm | None = None,
) -> str:
    """Renders messages in the form of `data.messages`; empty on errors."""
    form = form or template_of(tokenizer, tools).form
    try:
        return apply(form.of(messages), tokenizer, tools, for_generation)
    except LorafoldError:
        return ""


def day_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns today's ISO date if the template uses it, or an empty text."""
    return date.today().isoformat() if DATED.search(str(tokenizer.chat_template)) else ""


def on_day(tokenizer: PreTrainedTokenizerBase, day: str) -> PreTrainedTokenizerBase:
    """Fixes the date that the template writes; no change for an empty date."""
    if not day:
        return tokenizer
    fixed, form = copy.copy(tokenizer), datetime.fromisoformat(day).strftime
    rewrite_templates(fixed, partial(ASKING.sub, lambda match: json.dumps(form(match[2]))))
    return fixed


def common(*parts: Any) -> Any:
    return commonprefix(parts)  # noqa: RUF071  (by characters, as is wanted)
