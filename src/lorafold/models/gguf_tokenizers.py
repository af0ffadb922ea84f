"""Pre-tokenization rules of GGUF files (`tokenizer.ggml.pre`) that transformers lacks.

    "a  12"        GPT-2: a, Ġ, Ġ12      smollm: a, ĠĠ, 1, 2      deepseek-v3: a, Ġ, Ġ, 12

For a rule that it lacks, transformers splits text as GPT-2 does. The rules here follow llama.cpp,
which defines their names.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BYTE_LEVEL = "gpt2"  # the type of vocabulary to which the rules apply
AS_GPT2 = frozenset(
    ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion",
     "granite-docling", "exaone4")
)  # fmt: skip
EACH_DIGIT = frozenset(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")
)
# with these rules, a word in the vocabulary is one token even if the merges do not produce it
WHOLE_WORDS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
     "tekken", "youtu", "minicpm5")
)  # fmt: skip

SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION, LINES, SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)|\s+"
LLAMA3 = rf"{SUFFIX}|{WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|{LINES}|{SPACES}"
QWEN2 = rf"{SUFFIX}|{WORD}|\p{{N}}|{PUNCTUATION}|{LINES}|{SPACES}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + SUFFIX + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + SUFFIX + "?"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}|{SPACES}",
)
BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    rf"|\s*[\r\n]|{SPACES}"
)
# the preferred names of rules that have several names
PREFERRED_NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35", "dbrx")
# each pattern splits the pieces left by the previous ones
RULES = {
    "glm4": (LLAMA3,),
    "chatglm-bpe": (LLAMA3,),
    "hunyuan": (QWEN2,),
    "stablelm2": (QWEN2,),
    "solar-open": (QWEN2,),
    "grok-2": (QWEN2,),
    "ufakzeka": (rf"{WORD}|\p{{N}}|{PUNCTUATION}|{LINES}|{SPACES}",),
    "laguna": (r"[^\n]+|[\n]+", QWEN2),
    "seed-coder": (rf"{SUFFIX}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES}|{SPACES}",),
    "minicpm5": (r"\p{N}{1,3}", rf"{SUFFIX}|{WORD}|\p{{N}}+|{PUNCTUATION}|{LINES}|{SPACES}"),
    "bailingmoe": (BAILING,),
    "bailingmoe2": (BAILING,),
    "llada-moe": (BAILING,),
    "deepseek-v3": DEEPSEEK3,
    "hunyuan-dense": DEEPSEEK3,
    "joyai-llm": DEEPSEEK3,
    "hy_v4": DEEPSEEK3,
    "deepseek-coder": (
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}"
    ),
    "youtu": (
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
        rf"{CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}|{SPACES}",
    ),
    "bloom": (BLOOM,),
    "gpt3-finnish": (BLOOM,),
    "poro-chat": (BLOOM,),
    "viking": (BLOOM, r"\p{N}"),
    "falcon": (r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"),
}  # fmt: skip


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
