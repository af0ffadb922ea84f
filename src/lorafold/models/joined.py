"""The chat template for data that has none: what is said, and nothing around it.

    <bos> content content <eos> content content <eos>      <bos> where the tokenizer begins texts
                                                           with it, <eos> after assistant turns

It is a Jinja template as any other, saved with the tokenizer, so that training, evaluation and
generation see the same. Use it (`chat_template: none`) for base models and for prompts that are
written out already: generation then goes on right behind the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"  # in a recipe and on the command line; a file of that name is ./none
JOINED = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def joined(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for this tokenizer.

    LorafoldError where it has no end-of-sequence token, without which no answer would ever end.
    """
    if tokenizer.eos_token is None:
        raise LorafoldError(
            f"chat template {NONE}: the tokenizer has no end-of-sequence token, so answers could"
            " not end; expected a template that ends them"
        )
    return opening(tokenizer) + JOINED


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template for this tokenizer begins with: its beginning-of-sequence token, if it puts
    that before texts.
    """
    starts_with_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]
    return "{{ bos_token }}" if starts_with_bos else ""
