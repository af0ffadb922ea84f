"""Pre-tokenization rules of GGUF files (`tokenizer.ggml.pre`) that transformers lacks.

    "a  12"        GPT-2: a, Ġ, Ġ12      smollm: a, ĠĠ, 1, 2      deepseek-v3: a, Ġ, Ġ, 12

For a rule that it lacks, transformers splits text as GPT-2 does. The rules here follow llama.cpp,
which defines their names.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BYTE_LEVEL = "gpt2"  # the type of vocabulary to which the rules apply
TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
AS_GPT2, EACH_DIGIT, WHOLE_WORDS, PREFERRED_NAMES = (
    TABLES[key].split() for key in ("as_gpt2", "each_digit", "whole_words", "preferred")
)


def whole_pattern(pattern: str) -> str:
    """The pattern with the parts that it names."""
    return re.sub(r"<(\w+)>", lambda name: whole_pattern(TABLES["parts"][name[1]]), pattern)


GPT2 = whole_pattern("<gpt2>")
RULES = {
    name: tuple(map(whole_pattern, patterns))
    for names, patterns in TABLES["rules"].items()
    for name in names.split()
}


def set_pre_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kind: str, pre: str | None, what: str
) -> None:
    """Sets a tokenizer's pre-tokenizer to the rule named in its GGUF file."""
    from tokenizers.pre_tokenizers import ByteLevel

    if kind != BYTE_LEVEL:
        return
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, ByteLevel):  # transformers has no rule for it
        backend.pre_tokenizer = _pre_tokenizer(tokenizer, backend.pre_tokenizer, pre, what)
    if pre in WHOLE_WORDS:
        backend.model.ignore_merges = True


def pre_tokenizer_of(pre: str) -> PreTokenizer | None:
    """The pre-tokenizer with this name, or None if neither transformers nor lorafold has it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    as_gpt2 = ByteLevel(add_prefix_space=False)
    if pre in AS_GPT2:
        return as_gpt2
    if pre in EACH_DIGIT:
        return Sequence([Digits(individual_digits=True), as_gpt2])
    known = {name: (rule,) for name, rule in GGUF_PRE_TOKENIZER_SPLITS.items()} | RULES
    if pre not in known:
        return None
    splits = [Split(Regex(rule), behavior="isolated") for rule in known[pre]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer_names() -> tuple[str, ...]:
    """The names that `pre_tokenizer_of` supports, preferred names first."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    others = (*RULES, *GGUF_PRE_TOKENIZER_SPLITS, *sorted(EACH_DIGIT), *sorted(AS_GPT2))
    return tuple(dict.fromkeys((*PREFERRED_NAMES, *others)))


def _pre_tokenizer(
    tokenizer: PreTrainedTokenizerBase, as_gpt2: PreTokenizer, pre: str | None, what: str
) -> PreTokenizer:
    from tokenizers.pre_tokenizers import Digits, Sequence

    if pre in AS_GPT2:
        return as_gpt2
    if pre and (known := pre_tokenizer_of(pre)) is not None:
        return known
    each_digit = Sequence([Digits(individual_digits=True), as_gpt2])
    if pre not in (None, "", "default"):
        raise LorafoldError(
            f"{what}: unsupported pre-tokenizer {pre} (tokenizer.ggml.pre); any other would split"
            " text into other tokens than in training, so use the model in Hugging Face's format,"
            " which includes the tokenizer"
        )
    learned = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    guessed = not any(len(token) > 1 and re.search("[0-9]", token) for token in learned)
    log.warning(
        "%s: found no pre-tokenizer (tokenizer.ggml.pre), so text is split as in GPT-2%s",
        what, ", with single digits as in the vocabulary" if guessed else "",
    )  # fmt: skip
    return each_digit if guessed else as_gpt2
