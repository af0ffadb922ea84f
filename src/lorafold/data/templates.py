"""What chat templates take differently, found out by rendering a probe once per template.

Some take a call's arguments as an object, others as JSON text; some a message of calls without
content, others with an empty one; some content as text, others as a list of parts. The first form
is taken whose rendering has the arguments, and not as Python prints them or quoted twice.

The reasoning block of an assistant turn: how a chat template encloses it, where it is in a text.

    block = block_of(tokenizer)                 its opening and closing, as in <think> and </think>
    block.end(text, prompt)                     where the block ends that the text begins with, or 0

The block is found by rendering a probe with reasoning and without. A template that shows none is
taken to have <think> and </think>, which rows may have in their contents.

How a chat template ends a turn of the assistant, found by rendering a probe once per template.

    with the turn               ... answer<end>\n
    with the next message       ... answer<user>\nnext          what opens that one ends it
    not at all                  ... answer

A model stops at a token, so an end is the special token behind the answer, the last one if several
follow upon each other. Where a template writes none with the turn, its rendering lacks what
generation has to produce: the token that the next message begins with is trained as the end, or the
tokenizer's own end token.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lorafold.data.messages import Message, Tool
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE: Mapping[str, Any] = MappingProxyType({})
KNOWN = 16  # templates whose form is remembered
DATE = "strftime_now"  # what transformers gives templates to ask with
DATED = re.compile(rf"{DATE}\s*\(")
ASKING = re.compile(rf"""{DATE}\s*\(\s*(["'])(.*?)\1\s*\)""")
NAME, KEY, VALUE = "probe_function", "probe_key", "probe value"
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


@dataclass(frozen=True)
class Form:
    """How a template takes messages: `text`: arguments as JSON text; `empty`: an empty content
    beside calls; `parts`: content as a list of parts.
    """

    text: bool = False
    empty: bool = False
    parts: bool = False

    def of(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, as `data.messages` has them, in this form."""
        return [self._of(message) for message in messages]

    def _of(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls and not self.parts:
            return message
        found = dict(message)
        if calls:
            if self.empty:
                found.setdefault("content", "")
            if self.text:
                found["tool_calls"] = [_with_text(call) for call in calls]
        if self.parts and isinstance(found.get("content"), str):
            found["content"] = [{"type": "text", "text": found["content"]}]
        return found


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call in OpenAI's form."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] = ()) -> str:
    """The text of the chat template that renders with these tools."""
    return str(tokenizer.get_chat_template(tools=list(tools) or None))


def apply(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
    for_generation: bool = False,
    variables: Mapping[str, Any] = NONE,
) -> str:
    """The text of messages that are in the template's form.

    Args:
        tokenizer: A tokenizer with a chat template.
        tools: The tools that the conversation offers.
        for_generation: Append the generation prompt, which opens the assistant's next turn.
        variables: Further variables of the template, such as enable_thinking.

    Raises LorafoldError if the template refuses the messages.
    """
    try:
        return _rendered(list(messages), tokenizer, list(tools) or None, for_generation, variables)
    except TemplateError as error:
        raise LorafoldError(
            f"the model's chat template refuses this conversation: {error}"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise LorafoldError(
            f"the model's chat template can't render this conversation: {type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        ) from error


def _rendered(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Any,
    for_generation: bool,
    variables: Mapping[str, Any],
) -> str:
    if not tokenizer.is_fast:  # it may have a way of its own
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=for_generation, **variables
        )
        return str(text)
    # what apply_chat_template calls, without the checks that `data.messages` has done: two thirds
    # of the time
    special: Any = tokenizer.special_tokens_map
    rendered: Any = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        add_generation_prompt=for_generation,
        **special | dict(variables),
    )
    return str(rendered[0][0])


def attempt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
    for_generation: bool = False,
) -> str:
    """As `apply`, with an empty text where the template refuses the messages.

    Args:
        tokenizer: A tokenizer with a chat template.
        tools: The tools that the conversation offers.
        for_generation: Append the generation prompt.
    """
    try:
        return apply(messages, tokenizer, tools, for_generation)
    except LorafoldError:
        return ""


def is_dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the date, so that it renders otherwise tomorrow."""
    return bool(DATED.search(str(tokenizer.chat_template)))


def day_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The date of today, as 2026-11-28, where the chat template asks for it; else empty."""
    return date.today().isoformat() if is_dated(tokenizer) else ""


def on_day(tokenizer: PreTrainedTokenizerBase, day: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a chat template that writes one date, where the template itself has the
    form of the date: it `is_dated` still where a form is a variable.

    Args:
        tokenizer: It stays as it is.
        day: The date, as 2026-11-28; empty where the template asks for none.
    """

    def written(found: re.Match[str]) -> str:
        return json.dumps(datetime.fromisoformat(day).strftime(found[2]))

    if not day:
        return tokenizer
    fixed, template = copy.copy(tokenizer), tokenizer.chat_template
    named = template if isinstance(template, dict) else {"": template}
    texts = {name: ASKING.sub(written, text) for name, text in named.items()}
    fixed.chat_template = texts if isinstance(template, dict) else texts[""]
    return fixed


def form_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] = ()) -> Form:
    """The form in which the tokenizer's chat template takes messages."""
    return _form_of(template_of(tokenizer, tools), tokenizer)


@lru_cache(maxsize=KNOWN)
def _form_of(template: str, tokenizer: PreTrainedTokenizerBase) -> Form:
    parts = _needs_parts(tokenizer)
    if "tool_calls" not in template:
        return Form(parts=parts)
    message = {"role": "assistant", "tool_calls": [call(NAME, {KEY: VALUE})]}
    forms = [Form(text, empty, parts) for text, empty in product((False, True), repeat=2)]
    shown = (_shown(attempt(form.of([ASKED, message]), tokenizer, [PROBE_TOOL])) for form in forms)
    return next((form for form, good in zip(forms, shown, strict=True) if good), Form(parts=parts))


def _needs_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template shows content as a list of parts only."""
    text = str(ASKED["content"])
    shown = (text in attempt(Form(parts=p).of([ASKED]), tokenizer) for p in (False, True))
    return tuple(shown) == (False, True)


def _shown(text: str) -> bool:
    """Whether the text has the probe's arguments, not as Python prints them or as a quoted text."""
    arguments = {KEY: VALUE}
    after = text.rpartition(NAME)[2]
    odd = json.dumps(json.dumps(arguments))[1:-1] in after or str(arguments) in after
    return KEY in after and VALUE in after and not odd


def common(*texts: str) -> str:
    """The beginning that texts have in common."""
    columns = zip(*texts, strict=False)
    length = next((n for n, found in enumerate(columns) if len(set(found)) > 1), None)
    return min(texts, key=len) if length is None else texts[0][:length]


def _with_text(given: dict[str, Any]) -> dict[str, Any]:
    function = given["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return given | {"function": function | {"arguments": text}}


THOUGHT, WORD = "probe thought", "probe answer"
OPENED = re.compile(r"([<\[])(\w+)([>\]])\s*\Z")  # a tag that the generation prompt leaves open

CUT = re.compile(r"[<\[][^>\]\s]*\Z")  # the beginning of a tag, which others have in common


@dataclass(frozen=True)
class Block:
    """What stands before and after the reasoning of a turn, without surrounding whitespace.

    `shown` is whether the chat template shows the reasoning of the last turn, `spaced` whether the
    whitespace after the closing belongs to the block; `lead` and `between` are what stands before
    the reasoning and behind it, the opening left out.
    """

    opening: str
    closing: str
    shown: bool
    spaced: bool
    lead: str
    between: str

    @classmethod
    def of_tags(cls, opening: str, closing: str) -> Block:
        """The block of a template that shows no reasoning, with tags on lines of their own."""
        return cls(opening, closing, False, True, "\n", f"\n{closing}\n\n")

    def end(self, text: str, prompt: str) -> int:
        """The length of the block at the beginning of a turn, with whitespace after it; 0 without
        one. The opening may stand at the end of the prompt.
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
        if not self.spaced:
            return end
        return end + len(text[end:]) - len(text[end:].lstrip())


def block_of(tokenizer: PreTrainedTokenizerBase) -> Block:
    """How the tokenizer's chat template encloses reasoning."""
    return _block_of(template_of(tokenizer), tokenizer)


@lru_cache(maxsize=KNOWN)
def _block_of(template: str, tokenizer: PreTrainedTokenizerBase) -> Block:
    usual = Block.of_tags("<think>", "</think>")
    form = Form(parts=form_of(tokenizer).parts)
    said = {"role": "assistant", "content": WORD}
    texts = [
        attempt(form.of([ASKED, turn]), tokenizer)
        for turn in (said | {"reasoning_content": THOUGHT}, said)
    ]
    prompt = attempt(form.of([ASKED]), tokenizer, for_generation=True)
    if THOUGHT not in texts[0] or WORD not in texts[0]:
        return usual
    header = CUT.sub("", common(*texts, prompt))
    # a tag that the prompt leaves open is part of the block
    if opened := OPENED.search(header):
        header = header[: opened.start()]
    thoughtful, plain = (text[len(header) :] for text in texts)
    # the answer may have a header of its own, which belongs to no block
    without = thoughtful.removesuffix(plain) if plain else thoughtful
    for block in (without, thoughtful.partition(WORD)[0]):
        opening, _, closing = block.partition(THOUGHT)
        if opening.strip() and closing.strip() and WORD not in block:
            lead = opening[len(opening.rstrip()) :]
            spaced = closing != closing.rstrip()
            return Block(opening.strip(), closing.strip(), True, spaced, lead, closing)
    return usual


WORD, NEXT = "probe answer", "probe next"
CALL = "probe0000"
WITH_TURN: Final = "with the turn"
WITH_NEXT: Final = "with the next message"
NOWHERE: Final = "not at all"


@dataclass(frozen=True)
class Ending:
    """Where a template ends a turn.

    written: With what the end is written.
    text: The end; where nothing writes one, the tokenizer's end token, empty if it has none.
    tokens: The ids of the special tokens that end a turn, whoever speaks next.
    """

    written: Literal["with the turn", "with the next message", "not at all"]
    text: str
    tokens: frozenset[int]


def ending_of(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """How the tokenizer's chat template ends a turn."""
    return _ending_of(template_of(tokenizer), tokenizer, len(tokenizer))


def specials_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What matches the special tokens of a tokenizer in a text."""
    return _specials(tokenizer, len(tokenizer))


def through_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of a text up to its first special token, and that token; empty without one."""
    found = specials_of(tokenizer).search(text)
    return text[: found.end()] if found else ""


def _through_all(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The same through all special tokens that follow upon the first, with or without white space.
    """
    end = 0
    for found in specials_of(tokenizer).finditer(text):
        if end and text[end : found.start()].strip():
            break
        end = found.end()
    return text[:end]


@lru_cache(maxsize=KNOWN)
def _ending_of(template: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Ending:
    form = form_of(tokenizer)
    said = form.of([ASKED, {"role": "assistant", "content": WORD}])
    behind = attempt(said, tokenizer).rpartition(WORD)[2]
    if end := _through_all(behind, tokenizer):
        return Ending(WITH_TURN, end, _ids([end], tokenizer))
    following = attempt([*said, *form.of([{"role": "user", "content": NEXT}])], tokenizer)
    between = following.rpartition(NEXT)[0].rpartition(WORD)[2]
    if end := through_special(between, tokenizer):
        return Ending(WITH_NEXT, end, _ids([end, _before_result(tokenizer)], tokenizer))
    end = _own_end(tokenizer)
    return Ending(NOWHERE, end, _ids([end], tokenizer))


def _before_result(tokenizer: PreTrainedTokenizerBase) -> str:
    """What ends a call where its result comes next; empty if the template shows no such thing."""
    calls = [call(NAME, {KEY: VALUE}) | {"id": CALL}]
    result: Message = {"role": "tool", "content": NEXT, "name": NAME, "tool_call_id": CALL}
    form = form_of(tokenizer, [PROBE_TOOL])
    called = form.of([ASKED, {"role": "assistant", "tool_calls": calls}])
    text = attempt(called, tokenizer, [PROBE_TOOL]).rstrip()
    longer = attempt([*called, *form.of([result])], tokenizer, [PROBE_TOOL])
    between = longer[len(text) :].partition(NEXT)[0] if longer.startswith(text) and text else ""
    return through_special(between, tokenizer)


def _own_end(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.special_tokens_map.get("eos_token") or "")


def _ids(ends: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    last = (tokenizer(end, add_special_tokens=False).input_ids[-1:] for end in ends if end)
    return frozenset(int(i) for ids in last for i in ids)


@lru_cache(maxsize=KNOWN)
def _specials(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    named = {token.content for token in added if token.special} | {_own_end(tokenizer)}
    known = sorted(filter(None, named), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or r"(?!)")
