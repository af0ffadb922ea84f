"""The base's tokens, and those that an adapter has besides: what they are as texts.

The base's tokenizer is not copied, which for a large vocabulary takes a good part of a second, in
which nothing else of the server runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafold.errors import LorafoldError


class Words:
    """A fast tokenizer with tokens added to it, for whoever wants texts of tokens.

    Args:
        base: the tokenizer.
        known: its added tokens, by number.
        new: the number and the text of each further token, and whether it is special. Raises
            LorafoldError unless the numbers follow the base's.
    """

    def __init__(self, base: Any, known: Mapping[int, Any], new: Sequence[Sequence[Any]]) -> None:
        from transformers import AddedToken

        self._base, self._texts = base, {number: text for number, text, _ in new}
        own = {n: AddedToken(text, special=s, normalized=False) for n, text, s in new}
        self.added_tokens_decoder = {**known, **own}
        self._special = {t.content for t in self.added_tokens_decoder.values() if t.special}
        self._numbers = {text: number for number, text in self._texts.items()}
        first = len(base)
        self._size = first + len(new)
        for expected, (number, text, _) in enumerate(new, first):
            if number != expected:
                raise LorafoldError(
                    f"it numbers the new token {text!r:.80} {number}, expected {expected}"
                )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __len__(self) -> int:
        return self._size

    def get_vocab(self) -> dict[str, int]:
        """The number of each token by its text."""
        return self._base.get_vocab() | self._numbers

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token of a number, or the list of those of several."""
        if isinstance(ids, int):
            return self._texts.get(ids) or self._base.convert_ids_to_tokens(ids)
        return [self.convert_ids_to_tokens(number) for number in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The number of a token, or the list of those of several."""
        if isinstance(tokens, str):
            return self._numbers.get(tokens) or self._base.convert_tokens_to_ids(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:  # fmt: skip
        """The text of tokens, as the library makes it of a tokenizer that has them all.

        Args:
            clean_up_tokenization_spaces: False; the text is left as it is.
        """
        if self._texts.keys().isdisjoint(ids):
            return str(
                self._base.decode(
                    ids, skip_special_tokens=skip_special_tokens,
                    clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                )
            )  # fmt: skip
        tokens = [token for token in self.convert_ids_to_tokens(ids) if token is not None]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._special]
        decoder = self._base.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))
