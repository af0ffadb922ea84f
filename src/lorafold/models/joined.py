"""The chat template `none`, which joins the contents of the messages with nothing between them.

    <bos> content content <eos> content content <eos>      <bos> if the tokenizer begins texts with
                                                           it, <eos> after assistant turns

It is a Jinja template, saved with the tokenizer like any other, so that training, evaluation and
generation use the same text. Use it (`chat_template: none`) for base models, and for prompts that
contain all their formatting: generation continues directly after the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"  # its name in a recipe and on the command line; a file of that name is ./none
JOINED = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def joined(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template for this tokenizer.

    Raises LorafoldError if the tokenizer has no end-of-sequence token, without which no completion
    would end.
    """
    if tokenizer.eos_token is None:
        raise LorafoldError(
            f"chat template {NONE}: the tokenizer has no end-of-sequence token, so completions"
            " could not end; expected a template that ends them"
        )
    return opening(tokenizer) + JOINED


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the beginning of a template for this tokenizer: its beginning-of-sequence token, if it
    puts that before texts.
    """
    starts_with_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]
    return "{{ bos_token }}" if starts_with_bos else ""
