"""A tokenizer from a directory: its files as they were written, and never an empty one in the place
of one that is not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError, NoTokenizer
from lorafold.io.loading import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafold.io.models import ModelSource

# what a tokenizer is read from, but for vocabularies that its class alone has names for
TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template.*",
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# one of these holds the words, unless a tokenizer needs none
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tekken.json", "*.model", "*.tiktoken", "*.spm"),
    *("*.bpe", "vocab*", "merges.txt"),
)


def read_tokenizer(
    source: ModelSource, what: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, called `what` in messages.

    Where there is no vocabulary, transformers makes an empty tokenizer of some classes and fails
    with others: both are NoTokenizer here.
    """
    source.intact(*TOKENIZER_FILES)
    has_words = any(any(source.path.glob(pattern)) for pattern in VOCABULARIES)
    missing = NoTokenizer(f"{what}: it has no tokenizer (found no file with a vocabulary)")
    try:
        with loading(what):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=trust_remote_code
            )
    except LorafoldError as error:
        if has_words:
            raise
        raise missing from error
    names = list((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    if names and not has_words:
        raise missing
    source.intact(*(name for name in names if name not in TOKENIZER_FILES))
    return tokenizer
