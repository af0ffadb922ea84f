"""How a tokenizer splits text before it makes tokens, in llama.cpp's names.

    llama.cpp's rule is the one of `models.gguf_words` that gives the same pieces for all `TEXTS`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError
from lorafold.models.gguf_words import WHOLE_WORDS, names_of_rules, rule_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
# what rules differ in: digits, case, suffixes, signs before words and ends of lines, scripts, marks
TEXTS = (
    "It's 1 of 12, 123, 1234 and 1234567 - we'll pay 3.50€ (or 4½) on 2024-10-05T12:30:59Z.",
    "I'M SURE THEY'RE LATE; YOU'D say 'twas don't_do ''s 'S x'T",
    "a  b   c\td\t\te \n\n f\r\n\r\n  g\n   h \t \n",
    "McDonald's HTTPServer parseXML2JSON iPhone15Pro ÀÉÎõü ǅungla ʰa ªb",
    "def f(x):\n    return {'a': [1, 22, 333]} # ok...\n\n\tif !x && y||z {}\r\n",
    "!!!\n\n???\r\n...// --/\n <<>> $100 +1 =2 ~`^|\\ \"Hi!\"said he.",
    "我想在apple工作1314151天～ 你好，世界！ こんにちは カタカナ 한국어 ㅋㅋ ㄅㄆ",
    "Привет, мир! ЁЛКА шёл Ünïcödé e\u0301a\u0308 ไทย កាន់តែ हिन्दी عربي ۱۲۳ ١٢ עברית",
    "🚀 😶\u200d🌫️ ✅🦙🦙 \u00a0x\u2003y \u3000z ﬁn … – — ‘a’ “b”",
    " lead  two\n\n\n\nthree ",
)


def name_of_rule(backend: Tokenizer, whole_words: bool) -> str:
    """The name of a byte-level tokenizer's rule. Raises LorafoldError if none is known.

    Args:
        whole_words: words that are tokens are taken whole, whether merges make them or not.
    """
    own = backend.pre_tokenizer
    if own is not None and (backend.normalizer is None or _composes(backend)):
        wanted = [_pieces(own, text) for text in TEXTS]
        for name in names_of_rules():
            rule = rule_of(name)
            if rule is None or (name in WHOLE_WORDS) != whole_words:
                continue
            if all(_pieces(rule, text) == found for text, found in zip(TEXTS, wanted, strict=True)):
                return name
    raise LorafoldError(
        f"its tokenizer splits text by a rule for which llama.cpp has no name that is known"
        f" here ({type(own).__name__}{', words that are tokens are whole' * whole_words}); expected"
        " the rule of one of GPT-2, SmolLM2, Llama 3, Qwen 2, Tekken, GPT-4o and so on"
    )


def _composes(backend: Tokenizer) -> bool:
    """Whether it does nothing before but to compose marks with their letters, as Qwen's does."""
    return type(backend.normalizer).__name__ == "NFC"


def _pieces(rule: object, text: str) -> list[str]:
    return [piece for piece, _ in rule.pre_tokenize_str(text)]  # type: ignore[attr-defined]


def check_whole(backend: Tokenizer) -> None:
    """Raise LorafoldError unless a tokenizer changes nothing of a text but spaces, nor takes away
    anything.
    """
    before = SPACE * prefixes_space(backend)
    for text in TEXTS:
        made = _marked(backend, text)
        if made not in (before + text.replace(" ", SPACE), text.replace(" ", SPACE)):
            raise LorafoldError(
                "its tokenizer changes texts before it makes tokens in a way that llama.cpp"
                f" has not: {text[:24]!r} becomes {made[:24]!r}"
            )


def prefixes_space(backend: Tokenizer) -> bool:
    """Whether a text begins with a space for it that is not there."""
    return _marked(backend, "a").startswith(SPACE)


def _marked(backend: Tokenizer, text: str) -> str:
    """What it makes tokens of."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return text
