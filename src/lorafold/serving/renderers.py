"""The renderers of one server: the base's, and those of adapters with tokenizers of their own.

An adapter that was trained with another chat template, or with new tokens, has its tokenizer beside
it, and its requests are rendered with that, as `lf.generate` does. Tokens have to mean the same as
the base's, which the engine's grammars and a client's own tokens are of; new ones are the adapter's
alone. Adapters with equal files share a renderer, and those whose tokenizer is the base's have the
base's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents
from lorafold.generation import end_tokens
from lorafold.screening.fingerprints import variables_of
from lorafold.screening.screen import Screen
from lorafold.serving.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MARKS = 2048  # letters with which a template writes reasoning and calls, which texts are sought for


class Renderers:
    """Makes renderers. Any thread may call it.

    Args:
        model: the base, whose generation config names tokens that end completions.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, screen: Screen
    ) -> None:
        self._model, self._screen = model, screen
        ends = end_tokens(model, tokenizer)
        self.base = Renderer(tokenizer, ends, variables_of(tokenizer))
        self.base.probe()
        self._known: dict[str, Renderer] = {}

    def known(self, digest: str) -> Renderer | None:
        """The renderer of files with that digest, if they were opened before."""
        return self._known.get(digest)

    def of(self, files: Contents) -> Renderer:
        """The renderer of a tokenizer's files, without any code of theirs. Raises LorafoldError if
        they can't be read, or give a token of the base another number.
        """
        found = self._known.get(files.named) or self._opened(files)
        return self._known.setdefault(files.named, found)

    def _opened(self, files: Contents) -> Renderer:
        tokenizer = self._screen.open(files)
        if tokenizer is None:
            return self.base
        ends = end_tokens(self._model, cast(Any, tokenizer))
        found = Renderer(tokenizer, ends, tokenizer.variables)
        found.probe()
        tokenizer.probed()
        if (size := found.marks()) > MARKS:
            raise LorafoldError(
                f"{files.path}: its chat template writes reasoning and calls with {size:,} letters"
                f" around them, expected at most {MARKS:,}"
            )
        return found
