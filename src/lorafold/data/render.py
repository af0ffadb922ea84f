"""Renders conversations with the model's chat template: whole, as prompts, and for training.

    after(i) = render(messages[:i + 1]) = prompt(i) + the text that the model generates

Two invariants hold: the ids before a trained turn are the ids from which generation starts, and
only text that the model generates is trained. If `after(i)` is a prefix of a longer text, turn i
becomes a span of that text; otherwise it gets a separate example. If `after(i)` doesn't start with
the prompt, `rebuild_after_block` or `rebuild_rewritten` reconstructs the turn. A conversation is
rejected if the template leaves out a tool, a tool call, or a message that isn't the assistant's.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lorafold.data.chat_template import (
    ASSISTANT,
    NO_VARIABLES,
    PARTIAL_TAG,
    PROBE_KEY,
    PROBE_NAME,
    PROBE_TEXT,
    PROBE_TOOL,
    THINKING,
    TOOL_CALL,
    USER,
    WITH_NEXT,
    WITH_TURN,
    ReasoningBlock,
    Template,
    apply_template,
    prefix_of,
    template_of,
    tool_call,
    try_apply,
)
from lorafold.data.control_tokens import mark_as_text, mark_variables
from lorafold.data.formats import Conversation
from lorafold.data.messages import Message, Tool
from lorafold.errors import LorafoldError
from lorafold.models.built_in_templates import bos_expression, set_variables, variables_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
TextAndMarks = tuple[str, tuple[Span, ...] | None]
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif -%}"""
HELP = "use --chat-template FILE, or --chat-template tools for a template that supports tools"


def check_shown(
    conversation: Conversation,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    turns: Mapping[int, str] | None = None,
) -> None:
    """Raises if the template leaves out a tool, a tool call, or a message that isn't the
    assistant's. `turns` are the rendered turns with calls, by index.
    """
    messages, tools = conversation.messages, conversation.tools
    # (missing part, messages and tools in which a test value replaces it, test value)
    missing = []

    def lacks(what: str, n: int, change: Message, value: str) -> None:
        probed = [*messages[:n], messages[n] | change, *messages[n + 1 :]]
        missing.append((f"messages[{n}].{what}", probed, tools, value))

    for n, message in enumerate(messages):
        content = message.get("content")
        if message["role"] != "assistant" and content and content.strip() not in text:
            lacks(f"content ({message['role']})", n, {"content": PROBE_TEXT}, PROBE_TEXT)
        for number, call in enumerate(message.get("tool_calls", ())):
            if not _has_call((turns or {}).get(n, text), call):
                calls = [*message["tool_calls"]]
                calls[number] = call | tool_call(PROBE_NAME, {PROBE_KEY: PROBE_TEXT})
                for part, value in (("name", PROBE_NAME), ("arguments", PROBE_TEXT)):
                    lacks(f"tool_calls[{number}].{part}", n, {"tool_calls": calls}, value)
    if tools and not all(_has_tool(text, tool) for tool in tools):
        missing.append(("the tools", messages, (*tools, PROBE_TOOL), PROBE_KEY))
    for part, probed, offered, value in missing:
        if value not in try_apply(probed, tokenizer, offered):
            raise LorafoldError(
                f"the chat template does not render {part}, which would be lost; {HELP}"
            )


def check_supported(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    tools, template = conversation.tools, template_of(tokenizer, conversation.tools)
    has_calls = any("tool_calls" in message for message in conversation.messages)
    if tools and not template.shows_tools:
        raise LorafoldError(f"the chat template does not render the tools; {HELP}")
    if has_calls and not template.shows_calls:
        missing = "the chat template does not render tool calls (tool_calls)"
        try:
            apply_template(template.form.of(conversation.messages), tokenizer, tools)
        except LorafoldError as error:
            missing += f": {error}"
        raise LorafoldError(f"{missing}; {HELP}")


def _has_tool(text: str, tool: dict[str, Any]) -> bool:
    function = tool["function"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    arguments = properties if isinstance(properties, dict) else ()
    details = [part for part in (function.get("description"), *arguments) if part][:1]
    return bool(details) and all(_has_text(text, value) for value in (function["name"], *details))


def _has_call(text: str, call: dict[str, Any]) -> bool:
    function = call["function"]
    return function["name"] in text and all(
        key in text and (not isinstance(value, str) or _has_text(text, value.strip()))
        for key, value in function["arguments"].items()
    )


def _has_text(text: str, value: Any) -> bool:
    value = str(value)
    forms = (value, *(json.dumps(value, ensure_ascii=a)[1:-1] for a in (False, True)))
    return any(form in text for form in forms)


def hidden(message: Message, turn: str) -> bool:
    thought, content = (str(message.get(k) or "").strip() for k in ("reasoning_content", "content"))
    return thought not in turn or not _has_text(turn, content if message.get("tool_calls") else "")


@dataclass(frozen=True)
class Rendering:
    """Options for training on conversations: the assistant turns to train, whether to exclude
    reasoning, and whether to add an end token that the template doesn't render.
    """

    train_on: Literal["all", "last"] = "all"
    mask_reasoning: bool = False
    end_of_turn: Literal["auto", "none"] = "auto"


@dataclass(frozen=True)
class Rendered:
    """A text and its trained character spans [start, end). `turns` are the starts of trained turns,
    at which tokenization may split the text.
    """

    text: str
    spans: tuple[Span, ...]
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainedRenderings:
    """The texts to train on for one conversation, the number of assistant turns that are left out,
    the number of trained turns with a hidden part, and the indices of the trained messages.
    """

    renderings: tuple[Rendered, ...]
    left_out: int = 0
    hidden: int = 0
    turns: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TrainedTurn:
    """A text that ends with an assistant turn. `start` and `end` are the turn's characters,
    `completion` is the text that the model generates, and `marks` are the spans of `{% generation
    %}` blocks (None if the template has none).
    """

    text: str
    start: int
    end: int
    completion: str
    marks: tuple[Span, ...] | None


class ConversationRenderings:
    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.tools = tokenizer, conversation.tools
        self.messages = conversation.messages
        self.template = template_of(tokenizer, self.tools)
        self.without_tools = template_of(tokenizer)
        self.formatted = self.template.form.of(self.messages)

    def render_marked(self, messages: list[Message]) -> TextAndMarks:
        """Renders messages. Also returns the spans of `{% generation %}` blocks, or None."""
        if not self.template.has_generation:
            return apply_template(messages, self.tokenizer, self.tools), None
        special: Any = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=list(self.tools) or None,
                chat_template=self.template.text,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **special,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            apply_template(messages, self.tokenizer, self.tools)  # raises a one-line message
            raise LorafoldError(f"the chat template's generation blocks fail: {error}") from error
        [text], [marks] = rendered
        return text, tuple(map(tuple, marks))

    def turn(self, i: int, whole: TextAndMarks | None = None) -> TrainedTurn | None:
        """Returns turn i as the model generates it, or None if it can't be reconstructed."""
        if i == 0:
            return None  # the first message has no prompt
        prompt = apply_template(self.formatted[:i], self.tokenizer, self.tools, for_generation=True)
        is_last = i == len(self.formatted) - 1
        after, marks = whole if whole and is_last else self.render_marked(self.formatted[: i + 1])
        text, reasoning = after, self.messages[i].get("reasoning_content", "")
        block, bare_text = self.without_tools.block, text.removeprefix(prompt)
        lost = prompt.rstrip().endswith(block.opening) and reasoning.strip() not in bare_text
        if lost or not text.startswith(prompt):
            completion = self.messages[i].get("content", "")
            joined = rebuild_after_block(prompt, after, (reasoning, completion), block)
            if joined is None:
                before = try_apply(self.messages[:i], self.tokenizer, self.tools)
                joined = rebuild_rewritten(prompt, after, before, completion)
            if joined is None or marks == ():
                return None
            text, marks = joined, marks and ((len(prompt), len(joined)),)
        # text and whitespace after the end token belong to the template
        if tail := self.without_tools.ending.tail:
            text = text.rstrip().removesuffix(tail)
        start, end = len(prompt), max(len(prompt), len(text.rstrip()))
        return TrainedTurn(text, start, end, text[start:end], marks)

    def end(self, i: int, turn: TrainedTurn) -> str:
        """Returns the end of a turn that the template doesn't render with the turn."""
        ending, text = self.without_tools.ending, turn.text[: turn.end]
        if ending.text and text.endswith(ending.text):
            return ""
        follows = [m for m in self.messages[i + 1 : i + 2] if m["role"] in ("user", "tool")]
        if ending.written == WITH_NEXT:
            following = [*self.messages[: i + 1], *(follows or [USER])]
            longer = try_apply(following, self.tokenizer, self.tools)
            if longer.startswith(text):
                return self.without_tools.through_special(longer[len(text) :]) or ending.text
            if follows and follows[0]["role"] == "tool":
                return self.without_tools.end_before_result or ending.text
        return ending.text


def render_trained(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering = Rendering(),
) -> TrainedRenderings:
    """Returns the texts to train on, each with the spans of its trained assistant turns. If no turn
    can be trained, returns the whole text without spans.
    """
    check_supported(conversation, tokenizer)
    conversation = mark_as_text(conversation, tokenizer)
    renderings, messages = ConversationRenderings(conversation, tokenizer), conversation.messages
    marked_whole = whole, _ = renderings.render_marked(renderings.formatted)
    turns = conversation.turns
    turns = turns[-1:] if rendering.train_on == "last" else turns
    call_turns = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    trained_turns = {i: renderings.turn(i, marked_whole) for i in {*turns, *call_turns}}
    calls = {i: turn.completion for i in call_turns if (turn := trained_turns[i]) is not None}
    check_shown(conversation, whole, tokenizer, calls)
    examples: list[tuple[str, list[Span], list[int]]] = [(whole, [], [])]  # the whole text first
    num_hidden, trained = 0, set[int]()
    for i in reversed(turns):
        turn = trained_turns[i]
        if turn is None:
            continue
        if messages[i].keys() & {"reasoning_content", "tool_calls"}:
            num_hidden += hidden(messages[i], turn.completion)
        text, start, end, marks = turn.text, turn.start, turn.end, turn.marks
        if rendering.end_of_turn == "auto" and renderings.without_tools.ending.written != WITH_TURN:
            text = text[:end] + renderings.end(i, turn)
            if marks is not None and any(last > start for _, last in marks):
                marks = (*marks, (end, len(text)))
            end = len(text)
        if rendering.mask_reasoning:
            start += renderings.without_tools.block.end(text[start:end], text[:start])
        # a generation block may extend past the end token to the end of the line
        marks = ((start, end),) if marks is None else marks
        cut = ((max(start, first), min(end, last)) for first, last in marks)
        if not (spans := [(first, last) for first, last in cut if first < last]):
            continue
        example = next((one for one in examples if one[0].startswith(text)), None)
        if example is None:
            example = (text, [], [])
            if text.startswith(whole):  # the whole conversation and its end token
                examples[0] = example
            else:
                examples.append(example)
        trained.add(i)
        example[1].extend(spans)
        example[2].append(turn.start)
    shown = tuple(
        Rendered(text, tuple(sorted(spans)), tuple(sorted(starts)))
        for text, spans, starts in reversed(examples)
        if spans
    ) or (Rendered(whole, ()),)
    return TrainedRenderings(shown, len(turns) - len(trained), num_hidden, frozenset(trained))


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not hasattr(tokenizer, "chat_template"):
        raise LorafoldError(f"tokenizer: found {tokenizer!r:.80}, expected a loaded tokenizer")
    if tokenizer.chat_template is not None:
        return None
    if tokenizer.eos_token is None:
        raise LorafoldError(
            "tokenizer: found neither a chat template nor an EOS token, so generation would not"
            " stop; set eos_token in tokenizer_config.json, or add a chat template"
            " (chat_template.jinja in the same directory, or --chat-template of lorafold train)"
        )
    tokenizer.chat_template = bos_expression(tokenizer) + PLAIN_TEMPLATE
    return (
        "the tokenizer has no chat template: using a plain template (### User: / ### Assistant:,"
        f" completions end with {tokenizer.eos_token})"
    )


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    for_generation: bool = False,
    tools: Sequence[Tool] = (),
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> str:
    """Renders messages, with control tokens in them as text. `variables` are passed to the
    template, for example enable_thinking.
    """
    conversation = mark_as_text(Conversation(list(messages), tools=tuple(tools)), tokenizer)
    formatted = template_of(tokenizer, conversation.tools).form.of(conversation.messages)
    if variables:
        variables = mark_variables(variables, tokenizer, conversation.tools)
    return apply_template(formatted, tokenizer, conversation.tools, for_generation, variables)


def prompt_of(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> str:
    """Renders the prompt of the next turn, and checks it with `check_shown`."""
    check_supported(conversation, tokenizer)
    text = render(conversation.messages, tokenizer, True, conversation.tools, variables)
    check_shown(mark_as_text(conversation, tokenizer), text, tokenizer)
    return text


THINKS = "think|reason|thought"  # a pattern of names


def helpful_kwargs(
    tokenizer: PreTrainedTokenizerBase,
    helps: Callable[[PreTrainedTokenizerBase], bool],
    names: str = "",
) -> str:
    """Returns the --template-kwargs that help, or ""."""
    with suppress(LorafoldError):
        variables = [name for name in variables_of(tokenizer) if re.search(names, name)]
        for name, value in product(sorted(variables), (False, True, "high")):
            with_value = copy.copy(tokenizer)
            set_variables(with_value, {name: value})
            if helps(with_value):
                return f"--template-kwargs {name}={str(value).lower()}"
    return ""


@lru_cache(maxsize=16)
def reasoning_kwargs(template: Template) -> str:
    """Returns the --template-kwargs with which the template renders more reasoning, or ""."""

    def num_hidden(tokenizer: PreTrainedTokenizerBase) -> int:
        found = 2
        for turn in (ASSISTANT, TOOL_CALL):
            with suppress(LorafoldError):
                trained = render_trained(Conversation([USER, turn | THINKING]), tokenizer)
                found += trained.hidden + trained.left_out - 1
        return found

    least = num_hidden(template.tokenizer)
    return helpful_kwargs(template.tokenizer, lambda other: num_hidden(other) < least, THINKS)


def rebuild_after_block(
    prompt: str, after: str, turn: tuple[str, str], block: ReasoningBlock
) -> str | None:
    """Reconstructs a turn whose prompt ends with a reasoning block: the prompt, then reasoning,
    closing tag and answer if the block is open, or only the answer if it is closed. Returns None if
    that is impossible. `turn` is (reasoning, content).
    """
    opening, closing, (reasoning, content) = block.opening, block.closing, turn
    inside = prompt.rstrip().removesuffix(closing).rstrip()
    at, is_closed = len(inside.removesuffix(opening)), inside != prompt.rstrip()
    answer = after[at:]
    stripped = answer.lstrip()
    found = is_closed or inside.endswith(opening)
    if not found or not after.startswith(prompt[:at]) or not stripped:
        return None
    inner, closed, rest = stripped.removeprefix(opening).partition(closing)
    written = stripped.startswith(opening) or (reasoning and inner.strip() == reasoning.strip())
    if closed and written:
        reasoning, answer = reasoning or inner, rest
    elif stripped.startswith(closing):
        if not is_closed and not reasoning.strip():
            return prompt + stripped  # an empty block
        answer = stripped.removeprefix(closing)
    elif closing in content:
        reasoning = reasoning or content.partition(closing)[0].rpartition(opening)[2]
    if is_closed:
        return prompt + answer.removeprefix(prompt[len(prompt.rstrip()) :])
    lead, between = block.lead, block.between
    if not block.shown and stripped.startswith(opening + closing):
        lead, between = "", closing  # as the template writes an empty block
    rest_of_prompt = prompt[at + len(opening) :]
    first = lead.removeprefix(rest_of_prompt) if lead.startswith(rest_of_prompt) else ""
    spaced = between != between.rstrip()
    return f"{prompt}{first}{reasoning.strip()}{between}{answer.lstrip() if spaced else answer}"


CONTEXT = 24  # characters of the previous message that locate the turn


def rebuild_rewritten(prompt: str, after: str, before: str, content: str) -> str | None:
    """Reconstructs a turn after which the template renders earlier messages differently: the
    prompt, then the text that follows the generation prompt in `after`, or that follows `before`,
    the prompt without the generation prompt. Returns None if it is not found.
    """
    if not prompt.startswith(before) or len(prompt) == len(before):
        return None
    header, end = prompt[len(before) :], prompt[max(0, len(before) - CONTEXT) :]
    end = end if end in after else header
    at = after.rfind(end) + len(end)
    rest = after[at:]
    if at < len(prefix_of(prompt, after)) or not after[:at].endswith(end):  # an earlier turn's
        rest = after.removeprefix(before)
        if rest == after or PARTIAL_TAG.sub("", prefix_of(header, rest)):
            return None
    return prompt + rest if rest.strip() and content.strip() in rest else None
