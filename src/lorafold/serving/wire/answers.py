"""The parts that answers share: usage, finish reasons, log probabilities."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorafold.serving.backend import Ended, Text, Token

DONE = b"data: [DONE]\n\n"
PIECE = 16384  # elements of a list that are written at a time
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # in the text of a part of a character
BYTE = re.compile("<0x([0-9A-F]{2})>")  # as SentencePiece writes a token of one byte
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # as byte-level BPE
FINISH = {"end": "stop", "stop": "stop", "length": "length"}


def new_id(kind: str) -> str:
    """A name that nothing else has, such as `chatcmpl-...`."""
    return f"{kind}-{secrets.token_hex(12)}"


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event of a stream.

    Args:
        name: its type, where there is one.
    """
    named = f"event: {name}\n" if name else ""
    return named.encode() + b"data: " + to_json(value) + b"\n\n"


def as_json(value: Mapping[str, Any]) -> bytes:
    """JSON of an answer with long lists. They are written in pieces: no other thread runs while one
    is written.
    """

    def written(field: Any) -> bytes:
        if not isinstance(field, list | tuple) or len(field) <= PIECE:
            return to_json(field)
        pieces = [to_json(field[i : i + PIECE])[1:-1] for i in range(0, len(field), PIECE)]
        return b"[" + b",".join(pieces) + b"]"

    fields = [to_json(name) + b":" + written(field) for name, field in value.items()]
    return b"{" + b",".join(fields) + b"}"


class Tokens:
    """Tokens as texts, for log probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._texts = tokenizer, dict[int, str]()  # at most the vocabulary's

    def text(self, token: int) -> str:
        """A token's text; a part of a character has the replacement character."""
        if (found := self._texts.get(token)) is None:
            found = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
            self._texts[token] = found
        return found

    def bytes(self, token: int) -> bytes:
        """A token's bytes, also where they are a part of a character."""
        text, piece = self.text(token), str(self._tokenizer.convert_ids_to_tokens(token))
        if INCOMPLETE not in text:
            return text.encode()
        if hexadecimal := BYTE.fullmatch(piece):
            return bytes.fromhex(hexadecimal[1])
        known = all(character in BYTES for character in piece)
        return bytes(BYTES[character] for character in piece) if known else text.encode()

    def name(self, token: int) -> str:
        """A token's text, or its bytes where they are a part of a character, so that no two tokens
        are named alike.
        """
        text = self.text(token)
        return f"bytes:{str(self.bytes(token))[2:-1]}" if INCOMPLETE in text else text

    def pieces(self, tokens: Sequence[int], text: str | None) -> list[str]:
        """The text that each token of a prompt adds.

        Args:
            text: the text of them all, which has no words for tokens at its beginning that nobody
                wrote; None: what they are decoded to.
        """
        reader = Text(self._tokenizer, special=True)
        found = [reader.add(token) for token in tokens]
        found[-1] += reader.finish()
        unwritten = len(reader.text) - len(text) if text and reader.text.endswith(text) else 0
        for i, piece in enumerate(found):
            found[i], unwritten = piece[unwritten:], max(0, unwritten - len(piece))
        return found

    def chat(self, tokens: Sequence[Token], top: int) -> dict[str, Any]:
        """Log probabilities as chat completions have them.

        Args:
            top: how many of the most likely ones are listed beside each.
        """

        def one(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.text(token), "logprob": logprob, "bytes": list(self.bytes(token)),
            }  # fmt: skip

        return {
            "content": [
                one(t.token, t.logprob or 0.0) | {"top_logprobs": [one(*x) for x in t.top[:top]]}
                for t in tokens
            ]
        }

    def legacy(self, tokens: Sequence[Token], top: int, offset: int) -> dict[str, Any]:
        """Log probabilities as completions have them.

        Args:
            tokens: of which the first one of a prompt has none.
            top: how many of the most likely ones are listed beside each.
            offset: where in the text the first one begins.
        """
        texts, offsets = [self.name(t.token) for t in tokens], []
        for t in tokens:
            offsets.append(offset)
            offset += len(t.text)
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [
                None if t.logprob is None else {self.name(i): p for i, p in t.top[:top]}
                for t in tokens
            ],
            "text_offset": offsets,
        }


def finish(end: Ended) -> str:
    """Why a completion ends, in OpenAI's words."""
    return FINISH.get(end.reason, end.reason)
