"""Renders conversations with the model's chat template: whole, as prompts, and for training.

    render(messages, tokenizer, for_generation=True, tools=tools)     one text
    prompts(rows, tokenizer)                                          (prompt, reference) of rows

`data.trained_spans` finds what of a conversation is trained on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafold.data.control_tokens import as_text, variables_as_text
from lorafold.data.messages import Message, Tool
from lorafold.data.omissions import check_able, check_shown
from lorafold.data.references import references
from lorafold.data.shapes import CONVERSATIONS, Conversation
from lorafold.data.sources import Row
from lorafold.data.stored import Rows
from lorafold.data.template_forms import NONE, apply, form_of
from lorafold.data.trained_spans import Rendered, Rendering, Trained, render_trained
from lorafold.errors import LorafoldError
from lorafold.models.templates import opening

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
            " could not end; expected eos_token in tokenizer_config.json, or a chat template"
            " (chat_template.jinja beside it; lorafold train takes --chat-template)"
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
    variables: Mapping[str, Any] = NONE,
) -> str:
    """Render messages with the tokenizer's chat template, as `data.control_tokens` has texts.

    Raises LorafoldError if the template refuses the messages.

    Args:
        messages: The messages, in the form of `data.messages`.
        tokenizer: A tokenizer with a chat template.
        for_generation: Append the generation prompt, which opens the assistant's next turn.
        tools: The tools that the conversation offers, in OpenAI's form.
        variables: Further variables of the template, such as enable_thinking.
    """
    given = as_text(Conversation(list(messages), tools=tuple(tools)), tokenizer)
    return _applied(given, tokenizer, for_generation, variables)


def prompt_of(
    conversation: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    variables: Mapping[str, Any] = NONE,
) -> str:
    """The prompt for the next turn of a conversation, as `data.control_tokens` has texts.

    Raises LorafoldError if the template refuses the conversation or leaves something of it out.

    Args:
        tokenizer: A tokenizer with a chat template.
        variables: Further variables of the template, such as enable_thinking.
    """
    check_able(conversation, tokenizer)
    given = as_text(conversation, tokenizer)
    text = _applied(given, tokenizer, True, variables)
    check_shown(given, text, tokenizer)
    return text


def _applied(
    given: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    for_generation: bool,
    variables: Mapping[str, Any],
) -> str:
    formed = form_of(tokenizer, given.tools).of(given.messages)
    if variables:
        variables = variables_as_text(variables, tokenizer, given.tools)
    return apply(formed, tokenizer, given.tools, for_generation, variables)


def prompts(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, str]]:
    """Return (prompt text ready for generation, reference completion) for each row, as
    `data.references` has them.
    """
    given = Rows.of(list(rows)).given(CONVERSATIONS)
    return [(found.prompt, found.text) for found in references(given, tokenizer)]
