"""What chat templates take differently, found out by rendering a probe once per template.

Some take a call's arguments as an object, others as JSON text; some a message of calls without
content, others with an empty one; some content as text, others as a list of parts. The first form
is taken whose rendering has the arguments, and not as Python prints them or quoted twice.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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


def template_of(tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Tool] = ()) -> str:
    """The text of the chat template that renders with these tools."""
    return str(tokenizer.get_chat_template(tools=list(tools) or None))


def apply(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
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
    tokenizer: "PreTrainedTokenizerBase",
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
    tokenizer: "PreTrainedTokenizerBase",
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


def is_dated(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template asks for the date, so that it renders otherwise tomorrow."""
    return bool(DATED.search(str(tokenizer.chat_template)))


def day_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The date of today, as 2026-11-28, where the chat template asks for it; else empty."""
    return date.today().isoformat() if is_dated(tokenizer) else ""


def on_day(tokenizer: "PreTrainedTokenizerBase", day: str) -> "PreTrainedTokenizerBase":
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


def form_of(tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Tool] = ()) -> Form:
    """The form in which the tokenizer's chat template takes messages."""
    return _form_of(template_of(tokenizer, tools), tokenizer)


@lru_cache(maxsize=KNOWN)
def _form_of(template: str, tokenizer: "PreTrainedTokenizerBase") -> Form:
    parts = _needs_parts(tokenizer)
    if "tool_calls" not in template:
        return Form(parts=parts)
    message = {"role": "assistant", "tool_calls": [call(NAME, {KEY: VALUE})]}
    forms = [Form(text, empty, parts) for text, empty in product((False, True), repeat=2)]
    shown = (_shown(attempt(form.of([ASKED, message]), tokenizer, [PROBE_TOOL])) for form in forms)
    return next((form for form, good in zip(forms, shown, strict=True) if good), Form(parts=parts))


def _needs_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
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
