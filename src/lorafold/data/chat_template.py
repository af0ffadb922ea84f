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
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import cached_property, lru_cache, partial
from itertools import product
from os.path import commonprefix
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from jinja2.exceptions import SecurityError, TemplateError
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
THINKING: Message = {"reasoning_content": THOUGHT}
SYSTEM: Message = {"role": "system", "content": PROBE_TEXT}
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
PARTS_AS_JSON = re.compile(r"""["']thinking["']""")
PARTIAL_TAG = re.compile(r"[<\[][^>\]\s]*\Z")  # an incomplete tag at the end of a common prefix
WITH_TURN: Final = "with the turn"
WITH_NEXT: Final = "with the next message"
NOWHERE: Final = "not at all"
PARTS = "parts"  # reasoning as a part of the content, of type thinking
# where templates read reasoning: under a name (transformers copies reasoning_content to thinking),
# as a part, or in front of the content ({} is the reasoning)
REASONING_FORMS = ("reasoning_content", "reasoning", "thought", PARTS,
                   "{}\n</think>\n\n", "<think>\n{}\n</think>\n\n")  # fmt: skip
Written = Literal["with the turn", "with the next message", "not at all"]


def tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


PROBE_ARGUMENTS = {PROBE_KEY: PROBE_TEXT}
TOOL_CALL: Message = {
    "role": "assistant",
    "tool_calls": [tool_call(PROBE_NAME, PROBE_ARGUMENTS) | {"id": "probe0000"}],
}
RESULT: Message = {"role": "tool", "content": NEXT, "name": PROBE_NAME, "tool_call_id": "probe0000"}


@dataclass(frozen=True)
class MessageForm:
    """How the template expects messages: arguments of calls as JSON text (`text`), `content` next
    to calls even if empty (`empty`), content as a list of parts (`parts`), and reasoning in one of
    `REASONING_FORMS` (`reasoning`).
    """

    text: bool = False
    empty: bool = False
    parts: bool = False
    reasoning: str = REASONING_FORMS[0]

    def of(self, messages: Sequence[Message]) -> list[Message]:
        formatted = []
        for message in messages:
            if calls := message.get("tool_calls"):
                message = dict(message)
                if self.empty:
                    message.setdefault("content", "")
                if self.text:
                    message["tool_calls"] = [_with_text(tool_call) for tool_call in calls]
            thought, content = message.get("reasoning_content"), message.get("content")
            if self.parts and isinstance(content, str):
                message = message | {"content": [{"type": "text", "text": content}]}
            if thought and self.reasoning == PARTS:
                text = [{"type": "text", "text": content}] if content else []
                parts = [{"type": "thinking", "thinking": thought}, *text]
                message = message | {"content": parts}
            elif thought and "{}" not in self.reasoning:
                message = message | {self.reasoning: thought}
            elif thought and not calls:
                content = self.reasoning.replace("{}", thought) + str(content)
                message = message | {"content": content}
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


DEFAULT_BLOCK = ReasoningBlock("<think>", "</think>", False, True, "\n", "\n</think>\n\n")


@dataclass(frozen=True)
class Ending:
    """How the end of a turn is rendered, its text (or the tokenizer's end token), the ids of all
    tokens that end a turn, and the text that the template adds after the last turn.
    """

    written: Written
    text: str
    tokens: frozenset[int]
    tail: str


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
        special = "|".join(map(re.escape, known)) or r"(?!)"
        self.specials = re.compile(special)
        # <think>, <|think|> or <|open|>think<|sep|> at the end of a prompt
        self.open_mark = re.compile(rf"(?:(?:{special})\w+)?(?:{special}|[<\[][\w:]+[>\]])\s*\Z")
        self.has_generation = bool(GENERATION.search(self.text))  # contains {% generation %} blocks

    @cached_property
    def form(self) -> MessageForm:
        question = str(USER["content"])
        shown = [
            question in try_apply([USER], self.tokenizer, form=MessageForm(parts=p))
            for p in (False, True)
        ]
        forms = [MessageForm(n > 1, n % 2 > 0, shown == [False, True]) for n in range(4)]
        quoted = json.dumps(json.dumps(PROBE_ARGUMENTS))[1:-1]
        working = []
        for form in forms if "tool_calls" in self.text else ():
            text = try_apply([USER, TOOL_CALL], self.tokenizer, [PROBE_TOOL], form=form)
            after = text.rpartition(PROBE_NAME)[2]
            is_quoted = quoted in after or str(PROBE_ARGUMENTS) in after
            if PROBE_KEY in after and PROBE_TEXT in after and not is_quoted:
                working.append(form)
        # the history may need more than the last turn
        history = partial(try_apply, [USER, TOOL_CALL, RESULT], self.tokenizer, [PROBE_TOOL])
        form = next((f for f in working if history(form=f)), (*working, *forms)[0])
        # a prompt may ask for <think>, or open it; if it closes it, the turn has no reasoning
        prompt = try_apply([USER], self.tokenizer, for_generation=True, form=form).rstrip()
        asks = "<think>" in prompt and not prompt.endswith("</think>")
        readings = REASONING_FORMS[: None if asks else -2]
        for reasoning, turn in product(readings, (ASSISTANT, TOOL_CALL)):
            thinking = replace(form, reasoning=reasoning)
            text = try_apply([USER, turn | THINKING], self.tokenizer, form=thinking)
            wanted = f"<think>\n{THOUGHT}" if "{}" in reasoning else THOUGHT
            if wanted in text and not PARTS_AS_JSON.search(text):
                return thinking
        return form

    @cached_property
    def block(self) -> ReasoningBlock:
        prompt = try_apply([USER], self.tokenizer, for_generation=True)
        for turn in (ASSISTANT, TOOL_CALL):
            texts = [try_apply([USER, t], self.tokenizer) for t in (turn | THINKING, turn)]
            answer = turn.get("content") or PROBE_NAME
            if THOUGHT not in texts[0] or answer not in texts[0]:
                continue
            header = PARTIAL_TAG.sub("", prefix_of(*texts, prompt))
            given = prompt[len(header) :].strip()
            # an open tag or token at the prompt's end is part of the block
            opens_before = texts[0][len(header) :].lstrip().startswith(THOUGHT)
            if opens_before and not given[:1].isalnum() and (mark := self.open_mark.search(header)):
                header, given = header[: mark.start()], given.removeprefix(mark[0])
            with_reasoning, plain = (text[len(header) :] for text in texts)
            # a header before the answer doesn't belong to the block
            without = with_reasoning.removesuffix(plain) if plain else with_reasoning
            last = with_reasoning.partition(answer)[0]
            if turn == TOOL_CALL:  # the prompt may close the block
                last = f"{with_reasoning.partition(THOUGHT)[0]}{THOUGHT}{given}"
            for block in (without, last):
                opening, _, closing = block.partition(THOUGHT)
                # the prompt may open the block with words that are only in the prompt
                opens = opening.strip() or given
                if opens and closing.strip() not in ("", opens) and answer not in block:
                    lead = opening[len(opening.rstrip()) :]
                    spaced = closing != closing.rstrip()
                    return ReasoningBlock(opens, closing.strip(), True, spaced, lead, closing)
        return DEFAULT_BLOCK

    @cached_property
    def ending(self) -> Ending:
        after_answer = try_apply([USER, ASSISTANT], self.tokenizer).rpartition(PROBE_ANSWER)[2]
        following = try_apply([USER, ASSISTANT, USER | {"content": NEXT}], self.tokenizer)
        between = following.rpartition(NEXT)[0].rpartition(PROBE_ANSWER)[2]
        # to the EOS token, or to the last of the special tokens that are consecutive or that are
        # also there before the next message
        at = 0
        for special in self.specials.finditer(after_answer):
            is_shared = between.startswith(after_answer[: special.end()])
            is_apart = after_answer[at : special.start()].strip() and not is_shared
            if at and (is_apart or after_answer[:at].endswith(self.eos or "\0")):
                break
            at = special.end()
        written: Written = WITH_TURN
        ends = [after_answer[:at]]
        if not at:
            written, ends = NOWHERE, [self.eos]
            if end := self.through_special(between):
                written, ends = WITH_NEXT, [end, self.end_before_result]
        each = [self.tokenizer(end, add_special_tokens=False).input_ids for end in ends if end]
        tokens = frozenset(int(ids[-1]) for ids in each if len(ids))
        return Ending(written, ends[0], tokens, after_answer[at:].rstrip() * (at > 0))

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

    @cached_property
    def end_before_result(self) -> str:
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
        sandbox = " (transformers renders templates in a sandbox)"
        raise LorafoldError(
            f"the model's chat template rejects this conversation: {error}"
            f"{sandbox * isinstance(error, SecurityError)}"
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
    for offered in (tools, tools or [PROBE_TOOL]):  # some templates need tools
        with suppress(LorafoldError):
            return apply_template(form.of(messages), tokenizer, offered, for_generation)
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
