"""A completion's text while its tokens arrive: pieces that are never taken back, and stop texts.

A piece is held back while a character is incomplete, and while what stands at the end may be the
beginning of a stop text. Only the tokens since the last complete character are decoded again, with
as many before them as the decoder needs to know that they do not begin a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Text:
    """The text of one completion.

    Args:
        stop: texts before which the completion ends.
        special: show special tokens too, as of a prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), special: bool = False
    ) -> None:
        self._tokenizer, self._stop, self._special = tokenizer, tuple(stop), special
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # decoded from here; what lies before this has been read
        self._held = ""
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """The piece of text that the token adds; sets `stopped` where a stop text is complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._read])
        after = self._decode(self._ids[self._from :])
        if after.endswith(INCOMPLETE) or len(after) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :], last=False)

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._from : self._read])
        rest = self._decode(self._ids[self._from :])[len(before) :]
        self._read = len(self._ids)
        return self._release(rest, last=True)

    def _release(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, text[: min(found)], ""
        else:
            n = 0 if last else self._may_begin(text)
            text, self._held = text[: len(text) - n], text[len(text) - n :]
        self.text += text
        return text

    def _may_begin(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[len(text) - n :]) for stop in self._stop)
            ),
            0,
        )

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
            )
        )
