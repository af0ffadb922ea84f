"""The renderers of one server: the base's, and those of adapters with tokenizers of their own.

An adapter that was trained with another chat template, or with new tokens, has its tokenizer beside
it, and its requests are rendered with that, as `lf.generate` does. Tokens have to mean the same as
the base's, which the engine's grammars and a client's own tokens are of; new ones are the adapter's
alone. Adapters with equal files share a renderer.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from lorafold.data.render import ensure_chat_template
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.contents import Contents
from lorafold.generation import end_tokens
from lorafold.models.loading import read_tokenizer
from lorafold.models.sources import ModelSource
from lorafold.serving.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Renderers:
    """Makes renderers.

    Args:
        model: the base, whose generation config names tokens that end completions.
        tokenizer: the base's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._words = model, tokenizer.get_vocab()
        self.base = Renderer(tokenizer, end_tokens(model, tokenizer))
        self._known: WeakValueDictionary[frozenset[tuple[str, str]], Renderer]
        self._known = WeakValueDictionary()

    def of(self, files: Contents) -> Renderer:
        """The renderer of a tokenizer's files, without any code of theirs. Raises LorafoldError if
        they can't be read, or give a token of the base another number.
        """
        key = frozenset(item for item in files.digests.items() if item[0] != MANIFEST)
        found = self._known.get(key)
        if found is None:
            tokenizer = _read(files)
            self._check(files.path, tokenizer)
            ensure_chat_template(tokenizer)
            found = Renderer(tokenizer, end_tokens(self._model, tokenizer))
            self._known[key] = found
        return found

    def _check(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        own = {number: word for word, number in tokenizer.get_vocab().items()}
        for word, number in self._words.items():
            if (other := own.get(number, word)) != word:
                raise LorafoldError(
                    f"{path}: its tokenizer does not fit the base: token {number} is {other!r},"
                    f" expected {word!r}"
                )


def _read(files: Contents) -> PreTrainedTokenizerBase:
    """The tokenizer of these very bytes, wherever they came from."""
    with TemporaryDirectory(prefix="lorafold-tokenizer-") as folder:
        source = ModelSource(Path(folder), str(files.path))
        for name, content in files.files.items():
            if name != MANIFEST:
                (source.path / name).parent.mkdir(exist_ok=True)
                (source.path / name).write_bytes(content)
        return read_tokenizer(source, f"tokenizer of {files.path}", trust_remote_code=False)
