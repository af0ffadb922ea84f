"""Renders conversations with the model's chat template and finds the character spans to train on.

A trained span is an assistant turn with its end-of-turn token: the text that `render(messages[:i +
1])` adds to `render(messages[:i])` with the generation prompt, without trailing whitespace. A turn
is trained on only if both are prefixes of the whole rendering: where a template rewrites earlier
turns (for example drops their reasoning), the model would not see such a prefix at generation. If
the template marks its own spans with {% generation %}, those are the trained spans.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from lorafold.data.shapes import Conversation, Message, Row, shape_of
from lorafold.errors import LorafoldError
from lorafold.models.joined import opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif -%}"""
OWN_SPANS = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Rendered:
    """The text of one conversation, its trained character spans [start, end), and the number of
    assistant turns that are left out of training.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    left_out: int


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Give a tokenizer without a chat template a plain one; return the notice to print, or None if
    it has a template already.

    Raises LorafoldError if the tokenizer has no end-of-sequence token either, without which no
    completion would end.
    """
    if tokenizer.chat_template is not None:
        return None
    if tokenizer.eos_token is None:
        raise LorafoldError(
            "tokenizer: found neither a chat template nor an end-of-sequence token, so completions"
            " could not end; set a chat template with one (--chat-template)"
        )
    tokenizer.chat_template = opening(tokenizer) + PLAIN_TEMPLATE
    return (
        "the tokenizer has no chat template: using a plain one (### User: / ### Assistant:,"
        f" completions end with {tokenizer.eos_token})"
    )


def render(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", for_generation: bool = False
) -> str:
    """Render messages as text with the tokenizer's chat template.

    Raises LorafoldError if the template refuses the messages.

    Args:
        messages: The messages, each with role and content.
        tokenizer: A tokenizer with a chat template.
        for_generation: Append the generation prompt, which opens the assistant's next turn.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_generation
            )
        )
    except TemplateError as error:
        raise LorafoldError(
            f"the model's chat template refuses this conversation: {error}"
        ) from error


def render_trained(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    """Render a conversation and find the spans of its trained assistant turns."""
    messages, trained = conversation.messages, conversation.trained
    text = render(messages, tokenizer)
    turns = [i for i in range(trained, len(messages)) if messages[i]["role"] == "assistant"]
    if OWN_SPANS.search(tokenizer.get_chat_template()):
        marked = _own_spans(messages, tokenizer)
        spans = marked[max(0, len(marked) - len(turns)) :]  # the prompt's own turns come first
    else:
        spans = [span for i in turns if (span := _turn_span(messages, i, text, tokenizer))]
    return Rendered(text, tuple(spans), len(turns) - len(spans))


def prompts(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, str]]:
    """Return (prompt text ready for generation, reference completion) for each row.

    The reference of a conversation is its last assistant turn. The prompt text contains the
    template's special tokens: tokenize it with add_special_tokens=False. Raises LorafoldError for
    rows of plain text and for conversations without an assistant turn after a prompt.
    """
    pairs: list[tuple[str, str]] = []
    bad: list[str] = []
    for number, row in enumerate(rows, 1):
        shape = shape_of(row)
        messages = shape.conversation(row).messages if shape and shape.conversation else []
        last = max(
            (i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0
        )
        if last:
            pairs.append(
                (render(messages[:last], tokenizer, for_generation=True), messages[last]["content"])
            )
        else:
            bad.append(
                f"row {number}: found"
                f" {'no assistant turn after a prompt' if messages else 'plain text'}"
            )
    if bad:
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise LorafoldError(
            "data: evaluation by generation needs rows with a prompt and a reference completion:"
            f" {'; '.join(bad[:3])}{more}"
        )
    return pairs


def _turn_span(
    messages: list[Message], i: int, text: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, int] | None:
    if i == 0:
        return None  # the first message has no prompt before it
    before, after = (
        render(messages[:i], tokenizer, for_generation=True),
        render(messages[: i + 1], tokenizer),
    )
    stable = after.startswith(before) and text.startswith(after)
    return (len(before), max(len(before), len(after.rstrip()))) if stable else None


def _own_spans(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, int]]:
    encoded: Any = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans: list[tuple[int, int]] = []
    for marked, run in groupby(
        zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True),
        key=lambda pair: pair[0],
    ):
        if marked:
            offsets = [offset for _, offset in run]
            spans.append((offsets[0][0], offsets[-1][1]))
    return spans
