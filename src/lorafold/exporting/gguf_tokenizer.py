"""A tokenizer as the metadata of a GGUF file has it.

    gpt2      byte-level BPE: tokens, merges, and the name of the rule by which text is split
    llama     BPE with bytes in place of unknown characters, as SentencePiece learns it: tokens with
              scores, which fall with the rank of the first merge that makes each

llama.cpp has rules of splitting by name; the one is taken that splits texts as the tokenizer does.
Rows of the embedding without a token get a filler.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, listed
from lorafold.exporting.gguf_splitting import check_whole, name_of_rule, prefixes_space

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

LAST = -1e6  # the score of a token that no merge makes
ENDS = ("eot", "eom")  # the tokens besides eos that end a turn, by llama.cpp's names


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
