r"""Analyses chat templates by rendering test conversations, once per template.

The result contains the form of messages (`form`), the reasoning block (`block`), and how the end of
an assistant turn is rendered:

    with the turn               ... answer<end>\n
    with the next message       ... answer<user>\nnext          the next message's start is the end
    not at all                  ... answer                      the tokenizer's end token is trained

An end with the turn extends to the last of the consecutive special tokens after the answer.
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

NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
DATE = "strftime_now"  # a function that transformers passes to templates
USES_DATE = re.compile(rf"{DATE}\s*\(")
DATE_CALL = re.compile(rf"""{DATE}\s*\(\s*(["'])(.*?)\1\s*\)""")
PROBE_NAME, PROBE_KEY, PROBE_TEXT = "probe_function", "probe_key", "probe value"
THOUGHT, PROBE_ANSWER, NEXT = "probe thought", "probe answer", "probe next"
PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {PROBE_KEY: {"type": "string", "description": "Some text."}},
            "required": [PROBE_KEY],
        },
    },
}
USER: Message = {"role": "user", "content": "probe question"}
ASSISTANT: Message = {"role": "assistant", "content": PROBE_ANSWER}
SYSTEM: Message = {"role": "system", "content": PROBE_TEXT}
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
OPEN_TAG = re.compile(r"([<\[])(\w+)([>\]])\s*\Z")  # an open tag at the end of a prompt
PARTIAL_TAG = re.compile(r"[<\[][^>\]\s]*\Z")  # an incomplete tag at the end of a common prefix
WITH_TURN: Final = "with the turn"
WITH_NEXT: Final = "with the next message"
NOWHERE: Final = "not at all"
Written = Literal["with the turn", "with the next message", "not at all"]


def tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL_CALL: Message = {
    "role": "assistant",
    "tool_calls": [tool_call(PROBE_NAME, {PROBE_KEY: PROBE_TEXT}) | {"id": "probe0000"}],
}
RESULT: Message = {"role": "tool", "content": NEXT, "name": PROBE_NAME, "tool_call_id": "probe0000"}


@dataclass(frozen=True)
class MessageForm:
    """How the template expects messages: arguments of calls as JSON text (`text`), `content` next
    to calls even if empty (`empty`), and content as a list of parts (`parts`).
    """

    text: bool = False
    empty: bool = False
    parts: bool = False

    def of(self, messages: Sequence[Message]) -> list[Message]:
        formatted = []
        for message in messages:
            if calls := message.get("tool_calls"):
                message = dict(message)
                if self.empty:
                    message.setdefault("content", "")
                if self.text:
                    message["tool_calls"] = [_with_text(tool_call) for tool_call in calls]
            if self.parts and isinstance(message.get("content"), str):
                message = message | {"content": [{"type": "text", "text": message["content"]}]}
            formatted.append(message)
        return formatted


@dataclass(frozen=True)
class ReasoningBlock:
    """The tags around reasoning, stripped of whitespace; `lead` is the whitespace before the
    reasoning, and `between` the text from the reasoning to the answer. `shown`: the template
    renders the last turn's reasoning. `spaced`: whitespace after the closing tag belongs to the
    block.
    """

    opening: str
    closing: str
    shown: bool
    spaced: bool
    lead: str
    between: str

    @classmethod
    def of_tags(cls, opening: str, closing: str) -> ReasoningBlock:
        """Returns the block of a template that renders no reasoning, with each tag on a separate
        line.
        """
        return cls(opening, closing, False, True, "\n", f"\n{closing}\n\n")

    def end(self, text: str, prompt: str) -> int:
        """Returns the length of the block at the start of a turn, or 0. The prompt may contain the
        opening tag.
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


DEFAULT_BLOCK = ReasoningBlock.of_tags("<think>", "</think>")


@dataclass(frozen=True)
class Ending:
    """How the end of a turn is rendered, its text (or the tokenizer's end token), and the ids of
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
        self.has_generation = bool(GENERATION.search(self.text))  # contains {% generation %} blocks

    @cached_property
    def form(self) -> MessageForm:
        question = str(USER["content"])
        shown = [
            question in try_apply([USER], self.tokenizer, form=MessageForm(parts=p))
            for p in (False, True)
        ]
        parts = shown == [False, True]
        if "tool_calls" in self.text:
            arguments = {PROBE_KEY: PROBE_TEXT}
            message = {"role": "assistant", "tool_calls": [tool_call(PROBE_NAME, arguments)]}
            quoted = json.dumps(json.dumps(arguments))[1:-1]
            for form in (MessageForm(n > 1, n % 2 > 0, parts) for n in range(4)):
                text = try_apply([USER, message], self.tokenizer, [PROBE_TOOL], form=form)
                after = text.rpartition(PROBE_NAME)[2]
                is_quoted = quoted in after or str(arguments) in after
                if PROBE_KEY in after and PROBE_TEXT in after and not is_quoted:
                    return form
        return MessageForm(parts=parts)

    @cached_property
    def block(self) -> ReasoningBlock:
        turns = (ASSISTANT | {"reasoning_content": THOUGHT}, ASSISTANT)
        texts = [try_apply([USER, turn], self.tokenizer) for turn in turns]
        prompt = try_apply([USER], self.tokenizer, for_generation=True)
        if THOUGHT not in texts[0] or PROBE_ANSWER not in texts[0]:
            return DEFAULT_BLOCK
        header = PARTIAL_TAG.sub("", prefix_of(*texts, prompt))
        # an open tag at the prompt's end is part of the block
        if opened := OPEN_TAG.search(header):
            header = header[: opened.start()]
        with_reasoning, plain = (text[len(header) :] for text in texts)
        # a header before the answer doesn't belong to the block
        without = with_reasoning.removesuffix(plain) if plain else with_reasoning
        for block in (without, with_reasoning.partition(PROBE_ANSWER)[0]):
            opening, _, closing = block.partition(THOUGHT)
            if opening.strip() and closing.strip() and PROBE_ANSWER not in block:
                lead = opening[len(opening.rstrip()) :]
                spaced = closing != closing.rstrip()
                return ReasoningBlock(opening.strip(), closing.strip(), True, spaced, lead, closing)
        return DEFAULT_BLOCK

    @cached_property
    def ending(self) -> Ending:
        after_answer = try_apply([USER, ASSISTANT], self.tokenizer).rpartition(PROBE_ANSWER)[2]
        at = 0
        for special in self.specials.finditer(after_answer):
            if at and after_answer[at : special.start()].strip():
                break
            at = special.end()  # to the last of the consecutive special tokens
        written: Written = WITH_TURN
        ends = [after_answer[:at]]
        if not at:
            following = try_apply([USER, ASSISTANT, USER | {"content": NEXT}], self.tokenizer)
            between = following.rpartition(NEXT)[0].rpartition(PROBE_ANSWER)[2]
            written, ends = NOWHERE, [self.eos]
            if end := self.through_special(between):
                written, ends = WITH_NEXT, [end, self._end_before_result()]
        each = [self.tokenizer(end, add_special_tokens=False).input_ids for end in ends if end]
        return Ending(written, ends[0], frozenset(int(ids[-1]) for ids in each if len(ids)))

    @cached_property
    def shows_tools(self) -> bool:
        probes = ([USER], [SYSTEM, USER])
        return any(PROBE_KEY in try_apply(c, self.tokenizer, [PROBE_TOOL], True) for c in probes)

    @cached_property
    def shows_calls(self) -> bool:
        after = [RESULT | {"content": PROBE_TEXT}, ASSISTANT | {"content": PROBE_TEXT}]
        texts = (try_apply([USER, TOOL_CALL, *after[:n]], self.tokenizer) for n in (0, 2))
        return any(PROBE_NAME in text.replace(PROBE_TEXT, "") for text in texts)

    def through_special(self, text: str) -> str:
        """Returns the text up to and including its first special token, or ""."""
        special = self.specials.search(text)
        return text[: special.end()] if special else ""

    def _end_before_result(self) -> str:
        text = try_apply([USER, TOOL_CALL], self.tokenizer, [PROBE_TOOL]).rstrip()
        longer = try_apply([USER, TOOL_CALL, RESULT], self.tokenizer, [PROBE_TOOL])
        follows = longer[len(text) :] if longer.startswith(text) and text else ""
        return self.through_special(follows.partition(NEXT)[0])


_cached_template = lru_cache(maxsize=16)(Template)


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] = ()) -> Template:
    text = str(tokenizer.get_chat_template(tools=list(tools) or None))
    return _cached_template(text, tokenizer, len(tokenizer))


def _with_text(tool_call: dict[str, Any]) -> dict[str, Any]:
    function = tool_call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return tool_call | {"function": function | {"arguments": text}}


def apply_template(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
    for_generation: bool = False,
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> str:
    tool_list: Any = list(tools) or None
    prompt: Any = {"tools": tool_list, "add_generation_prompt": for_generation}
    try:
        if not tokenizer.is_fast:  # it may override the method
            prompt |= {"tokenize": False, **variables}
            return str(tokenizer.apply_chat_template(list(messages), **prompt))
        # this omits the checks of apply_chat_template, a third of its time, because `data.messages`
        # has done them
        template = tokenizer.get_chat_template(tools=tool_list)
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


def try_apply(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
    for_generation: bool = False,
    form: MessageForm | None = None,
) -> str:
    """Renders messages in the template's form. Returns "" if rendering fails."""
    form = form or template_of(tokenizer, tools).form
    try:
        return apply_template(form.of(messages), tokenizer, tools, for_generation)
    except LorafoldError:
        return ""


def date_used(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns today's ISO date if the template renders it, else ""."""
    return date.today().isoformat() if USES_DATE.search(str(tokenizer.chat_template)) else ""


def with_date(tokenizer: PreTrainedTokenizerBase, day: str) -> PreTrainedTokenizerBase:
    """Returns a copy of the tokenizer whose template renders the date `day`, unless it is ""."""
    if not day:
        return tokenizer
    fixed, form = copy.copy(tokenizer), datetime.fromisoformat(day).strftime
    rewrite_templates(fixed, partial(DATE_CALL.sub, lambda match: json.dumps(form(match[2]))))
    return fixed


def prefix_of(*parts: Any) -> Any:
    return commonprefix(parts)  # noqa: RUF071  (compares characters)
