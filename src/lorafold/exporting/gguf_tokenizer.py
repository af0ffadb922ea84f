"""A tokenizer as the metadata of a GGUF file has it.

    gpt2      byte-level BPE: tokens, merges, and the name of the rule by which text is split
    llama     BPE with bytes in place of unknown characters, as SentencePiece learns it: tokens with
              scores, which fall with the rank of the first merge that makes each

llama.cpp has rules of splitting by name; the one is taken that splits texts as the tokenizer does.
Rows of the embedding without a token get a filler.

The rule of splitting is the one of `models.gguf_rules` that gives the same pieces for all `TEXTS`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, listed
from lorafold.models.gguf_rules import WHOLE_WORDS, names_of_rules, rule_of

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

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
LAST = -1e6  # the score of a token that no merge makes
ENDS = ("eot", "eom")  # the tokens besides eos that end a turn, by llama.cpp's names


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


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int]
) -> None:
    """Have a writer say what a tokenizer does.

    Args:
        rows: of the embedding.
        ends: the tokens that end a completion.

    Raises LorafoldError for a kind of tokenizer, or a rule of splitting, that llama.cpp has not.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    slow = {"model": {"type": type(tokenizer).__name__}}
    content: dict[str, Any] = slow if backend is None else json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise LorafoldError(
            f"the model has a tokenizer of the kind {model['type']}, expected byte-level BPE,"
            " or BPE with bytes for unknown characters"
        )
    if len(tokenizer) > rows:
        raise LorafoldError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the model's embedding has"
            f" {rows:,} rows"
        )
    added = {one["id"]: one for one in content["added_tokens"]}
    by_bytes = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if by_bytes else "gpt2")
    texts, kinds = _tokens(model["vocab"], added, rows, by_bytes, model.get("unk_token"))
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    if by_bytes:
        _check_bytes(model["vocab"])
        check_whole(backend)
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(prefixes_space(backend))
        writer.add_token_scores(_scores(model["vocab"], merges, rows))
    else:
        writer.add_tokenizer_pre(name_of_rule(backend, bool(model.get("ignore_merges"))))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer, ends)


def _check_bytes(vocabulary: Collection[str]) -> None:
    """Raise LorafoldError for a vocabulary without a token for each byte, which llama.cpp looks up
    and does not miss in words of its own.
    """
    lacking = [f"<0x{n:02X}>" for n in range(256) if f"<0x{n:02X}>" not in vocabulary]
    if lacking:
        raise LorafoldError(
            f"the tokenizer has no token for {listed(lacking)}, expected one for each of the 256"
            " bytes, as llama.cpp has them"
        )


def _tokens(
    vocabulary: dict[str, int],
    added: dict[int, dict[str, Any]],
    rows: int,
    by_bytes: bool,
    unknown: str | None,
) -> tuple[list[str], list[int]]:
    """The texts of all rows, and their types."""
    from gguf import TokenType

    texts = [f"[PAD{n}]" for n in range(rows)]
    kinds = [int(TokenType.UNUSED)] * rows
    for text, n in vocabulary.items():
        is_byte = by_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = TokenType.BYTE if is_byte else TokenType.NORMAL
        texts[n], kinds[n] = text, TokenType.UNKNOWN if by_bytes and text == unknown else kind
    for n, one in added.items():
        text = one["content"]
        if kinds[n] == TokenType.UNKNOWN:
            continue
        if one["special"]:
            texts[n], kinds[n] = text, TokenType.CONTROL
        else:
            texts[n] = text.replace("▁", " ") if by_bytes else text
            kinds[n] = TokenType.USER_DEFINED
    return texts, [int(kind) for kind in kinds]


def _scores(vocabulary: dict[str, int], merges: Sequence[Sequence[str]], rows: int) -> list[float]:
    """Of each row: the earlier a merge makes the token, the higher."""
    found = [LAST] * rows
    order = dict.fromkeys("".join(pair) for pair in merges)
    for rank, text in enumerate(order):
        found[vocabulary[text]] = float(-rank - 1)
    return found


def _add_special(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> None:
    own: Any = tokenizer
    eos = own.eos_token_id if own.eos_token_id is not None else next(iter(ends), None)
    if eos is None:
        raise LorafoldError("neither tokenizer nor configuration says which token ends a text")
    bos = own.bos_token_id
    # llama.cpp takes token 11 for one that a file leaves out
    writer.add_bos_token_id(eos if bos is None else bos)
    writer.add_eos_token_id(eos)
    for name, token in zip(ENDS, [one for one in ends if one != eos], strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if own.unk_token_id is not None:
        writer.add_unk_token_id(own.unk_token_id)
    if own.pad_token_id is not None:
        writer.add_pad_token_id(own.pad_token_id)
    ids = own("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == own.eos_token_id)
    template = own.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
