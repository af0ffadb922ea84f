"""Renders conversations with the model's chat template: whole, as prompts, and for training.

    render(messages, tokenizer, for_generation=True, tools=tools)     one text
    prompts(rows, tokenizer)                                          (prompt, reference) of rows

`data.trained` finds what of a conversation is trained on.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lorafold.data.forms import apply, form_of
from lorafold.data.messages import Message, Tool
from lorafold.data.reasoning import block_of
from lorafold.data.shapes import Conversation, shape_of
from lorafold.data.shown import check_shown
from lorafold.data.sources import Row
from lorafold.data.trained import Drawing, Rendered, Rendering, Trained, render_trained
from lorafold.errors import LorafoldError
from lorafold.models.joined import opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "Rendering", "Trained", "render_trained"]

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif -%}"""


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
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    for_generation: bool = False,
    tools: Sequence[Tool] = (),
) -> str:
    """Render messages as text with the tokenizer's chat template.

    Raises LorafoldError if the template refuses the messages.

    Args:
        messages: The messages, in the form of `data.messages`.
        tokenizer: A tokenizer with a chat template.
        for_generation: Append the generation prompt, which opens the assistant's next turn.
        tools: The tools that the conversation offers, in OpenAI's form.
    """
    formed = form_of(tokenizer, tools).of(messages)
    return apply(formed, tokenizer, tools, for_generation)


def prompts(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, str]]:
    """Return (prompt text ready for generation, reference completion) for each row.

    The reference of a conversation is its last assistant turn: the content or, where the turn has
    calls, the text that the template renders for it, without special tokens and reasoning. The
    prompt text contains the template's special tokens: tokenize it with add_special_tokens=False.
    Raises LorafoldError for rows of plain text and for conversations without an assistant turn
    after a prompt.
    """
    pairs: list[tuple[str, str]] = []
    bad: list[str] = []
    for number, row in enumerate(rows, 1):
        shape = shape_of(row)
        found = shape.conversation(row) if shape and shape.conversation else Conversation([])
        messages = found.messages
        last = max(
            (i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0
        )
        if last:
            pairs.append(_pair(found, last, tokenizer))
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


def _pair(
    conversation: Conversation, last: int, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str]:
    """The prompt and the reference of a conversation's turn."""
    messages, drawing = conversation.messages, Drawing(conversation, tokenizer)
    prompt = drawing.prompt(last)
    if not messages[last].get("tool_calls"):
        if conversation.tools or any(m["role"] != "assistant" for m in messages[:-1]):
            check_shown(Conversation(messages[:last], 0, conversation.tools), prompt, tokenizer)
        return prompt, messages[last].get("content", "")
    turn = drawing.turn(last)
    if turn is None:
        raise LorafoldError(
            f"messages[{last}]: the chat template renders this turn differently at generation"
        )
    check_shown(Conversation(messages[: last + 1], 0, conversation.tools), turn.text, tokenizer)
    said = turn.text[turn.start : turn.end]
    said = said[block_of(tokenizer).end(said, prompt) :]
    ids = tokenizer(said, add_special_tokens=False, verbose=False).input_ids
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return prompt, str(text)
