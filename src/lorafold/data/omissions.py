"""Refuses a conversation of which the chat template leaves out a part: its tools, a call, the
content of a message.

Nearly always every part is found in the text as it stands. Where one is not, it is rendered once
more with a probe in its place, since a template may trim, quote or spell a part in its own way.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lorafold.data.messages import Message
from lorafold.data.shapes import Conversation
from lorafold.data.template_forms import (
    ASKED,
    KEY,
    KNOWN,
    NAME,
    PROBE_TOOL,
    VALUE,
    apply,
    attempt,
    call,
    form_of,
    template_of,
)
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELP = "--chat-template FILE takes another template, and --chat-template tools one with tools"


def check_shown(
    conversation: Conversation,
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    turns: Mapping[int, str] | None = None,
) -> None:
    """Raise LorafoldError if the text lacks a part of the conversation.

    Args:
        text: Its rendering.
        tokenizer: The tokenizer whose chat template rendered it.
        turns: What the template adds for a message with calls, by its number, where that is known.
    """
    for part, probed, probe in _missing(conversation, text, turns or {}):
        form = form_of(tokenizer, probed.tools)
        try:
            again = apply(form.of(probed.messages), tokenizer, probed.tools)
        except LorafoldError:
            again = ""
        if probe not in again:
            raise LorafoldError(
                f"the chat template does not show {part}, so it would be lost; {HELP}"
            )


def check_able(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise LorafoldError if the conversation has tools, or calls, and the chat template shows none
    in any conversation.
    """
    called = any("tool_calls" in message for message in conversation.messages)
    if not conversation.tools and not called:
        return
    template = template_of(tokenizer, conversation.tools)
    if conversation.tools and not _shows_tools(template, tokenizer):
        raise LorafoldError(f"the chat template does not show the row's tools; {HELP}")
    if called and not _shows_calls(template, tokenizer):
        raise LorafoldError(f"the chat template does not show calls (tool_calls); {HELP}")


@lru_cache(maxsize=KNOWN)
def _shows_tools(template: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template shows a probe tool, with a system message or without."""
    form, system = form_of(tokenizer, [PROBE_TOOL]), {"role": "system", "content": VALUE}
    asked = (form.of([ASKED]), form.of([system, ASKED]))
    return any(KEY in attempt(m, tokenizer, [PROBE_TOOL], for_generation=True) for m in asked)


@lru_cache(maxsize=KNOWN)
def _shows_calls(template: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template shows a probe call, as the last message or in an earlier one."""
    said: list[Message] = [
        {"role": "assistant", "tool_calls": [call(NAME, {KEY: VALUE}) | {"id": "probe0000"}]},
        {"role": "tool", "content": VALUE, "name": NAME, "tool_call_id": "probe0000"},
        {"role": "assistant", "content": VALUE},
    ]
    form = form_of(tokenizer)
    texts = (attempt(form.of([ASKED, *said[:n]]), tokenizer) for n in (1, 3))
    return any(NAME in text.replace(VALUE, "") for text in texts)


def _missing(
    conversation: Conversation, text: str, turns: Mapping[int, str]
) -> Iterator[tuple[str, Conversation, str]]:
    """(a part that is not in the text, the conversation with a probe in its place, the probe)."""
    messages, trained, tools = conversation.messages, conversation.trained, conversation.tools

    def at(index: int, **changed: Any) -> Conversation:
        probed = [*messages[:index], messages[index] | changed, *messages[index + 1 :]]
        return Conversation(probed, trained, tools)

    for index, message in enumerate(messages):
        content = message.get("content")
        if message["role"] != "assistant" and content and content.strip() not in text:
            what = f"messages[{index}].content ({message['role']})"
            yield what, at(index, content=VALUE), VALUE
        for number, given in enumerate(message.get("tool_calls", ())):
            where = f"messages[{index}].tool_calls[{number}]"
            if not _has_call(turns.get(index, text), given):
                calls = list(message["tool_calls"])
                calls[number] = given | call(NAME, {KEY: VALUE})
                for what, probe in ((f"{where}: its name", NAME), (f"{where}: arguments", VALUE)):
                    yield what, at(index, tool_calls=calls), probe
    if tools and not all(_has_tool(text, tool) for tool in tools):
        probed = Conversation(messages, trained, (*tools, PROBE_TOOL))
        yield "the row's tools", probed, KEY


def _has_tool(text: str, tool: dict[str, Any]) -> bool:
    """Whether the text has a tool's name and its description, or that of its first argument."""
    function = tool["function"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    named = properties if isinstance(properties, dict) else ()
    said = [part for part in (function.get("description"), *named) if part][:1]
    return bool(said) and all(_has_text(text, value) for value in (function["name"], *said))


def _has_call(text: str, given: dict[str, Any]) -> bool:
    function = given["function"]
    return function["name"] in text and all(
        key in text and (not isinstance(value, str) or _has_text(text, value.strip()))
        for key, value in function["arguments"].items()
    )


def _has_text(text: str, value: Any) -> bool:
    """Whether a text stands in another one, as it is or as in JSON."""
    value = str(value)
    return (
        value in text
        or json.dumps(value, ensure_ascii=False)[1:-1] in text
        or json.dumps(value)[1:-1] in text
    )


def hidden(messages: list[Message], index: int, turn: str) -> bool:
    """Whether the turn's text lacks the reasoning that its message has, or what it says beside its
    calls.

    Args:
        index: The turn's message.
    """
    message = messages[index]
    thought, said = (str(message.get(k) or "").strip() for k in ("reasoning_content", "content"))
    beside = said if message.get("tool_calls") else ""
    return thought not in turn or not _has_text(turn, beside)
