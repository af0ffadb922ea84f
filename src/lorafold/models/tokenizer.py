"""Tokenizers of models and adapters: loading, adding tokens, setting chat templates, writing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, NoTokenizer, listed, read_failure
from lorafold.models.built_in_templates import NONE, TOOLS, joined_template, tools_template
from lorafold.models.load_errors import loading
from lorafold.models.sources import ModelSource, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# files that a tokenizer may have written, besides vocabularies whose names depend on its class
FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
# FILES, patterns for templates, and the model's configuration
TOKENIZER_FILES = (*FILES, "additional_chat_templates/*", "chat_template.*", "config.json")
# one of these contains the vocabulary, if the tokenizer has one
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tekken.json", "*.model", "*.tiktoken", "*.spm"),
    *("*.bpe", "vocab*", "merges.txt"),
)
CONFIG = "tokenizer_config.json"
TEMPLATES = "additional_chat_templates"
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # transformers' own tag
BUILT_IN = {NONE: joined_template, TOOLS: tools_template}  # chat templates by name in recipes


@dataclass(frozen=True)
class AddedTokens:
    """The ids of words whose embeddings are trained as single tokens, and the set of words that are
    new to the tokenizer.
    """

    ids: dict[str, int]
    new: frozenset[str]

    def __str__(self) -> str:
        new = ", ".join(f"{word} {i}" for word, i in self.ids.items() if word in self.new)
        known = [
            f"{word} is already a token ({i}), and its embedding is trained too"
            for word, i in self.ids.items()
            if word not in self.new
        ]
        return "; ".join([*[f"new tokens: {new}"] * bool(new), *known])


def add_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> AddedTokens:
    """Makes each word a single token. New words become special tokens, which completions omit."""
    from transformers import AddedToken

    if wrong := [word for word in words if not word.strip() or list(words).count(word) > 1]:
        raise LorafoldError(
            f"new_tokens: found {listed(map(repr, dict.fromkeys(wrong)))}, expected distinct"
            " words that are not blank"
        )
    vocabulary = tokenizer.get_vocab()
    new = [word for word in words if word not in vocabulary]
    tokenizer.add_tokens(
        [AddedToken(word, special=True, normalized=False) for word in new], special_tokens=True
    )
    ids: dict[str, Any] = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    return AddedTokens({word: int(i) for word, i in ids.items()}, frozenset(new))


def set_template(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Sets the tokenizer's chat template to the Jinja template in a file, or to a built-in
    template.
    """
    is_built_in = path in BUILT_IN
    tokenizer.chat_template = BUILT_IN[str(path)](tokenizer) if is_built_in else read_template(path)


def read_template(path: str | Path) -> str:
    """The Jinja template in a file, checked without transformers."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LorafoldError(
            f"chat template {path}: can't be read: {read_failure(error)};"
            f" expected a file with a Jinja template, or {NONE} to join texts unchanged, or {TOOLS}"
            " for ChatML with tools"
        ) from error
    if not text.strip():
        raise LorafoldError(f"chat template {path}: found an empty file, expected a Jinja template")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(GENERATION.sub("", text))
    except TemplateSyntaxError as error:
        raise LorafoldError(
            f"chat template {path}: line {error.lineno}: {error.message}"
        ) from error
    return text


def tokenizer_of(source: ModelSource, own: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The tokenizer of the last of these adapters, with the new tokens of the others. Raises if two
    adapters use the same id for different tokens.
    """
    *earlier, last = (
        read_tokenizer(replace(source, path=p, name=str(p), gguf=None), f"tokenizer of {p}")
        for p in own
    )

    def by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        return {i: word for word, i in tokenizer.get_vocab().items()}

    words = by_id(last)
    for path, other in zip(own, earlier, strict=False):
        theirs, pair = by_id(other), f"{path} and {own[-1]}"
        if differing := [i for i in sorted(theirs.keys() & words.keys()) if theirs[i] != words[i]]:
            some = listed(f"token {i} is {theirs[i]} and {words[i]}" for i in differing)
            raise LorafoldError(
                f"{pair}: their tokenizers differ: {some}; these adapters can't be used together"
            )
        if missing := sorted(theirs.keys() - words.keys()):  # the last one may have fewer tokens
            last.add_tokens([other.added_tokens_decoder.get(i, theirs[i]) for i in missing])
            words = by_id(last)
            if any(words.get(i) != theirs[i] for i in missing):
                raise LorafoldError(
                    f"{pair}: the tokens of the first adapter can't keep their IDs in the second"
                    " adapter's tokenizer; these adapters can't be used together"
                )
    return last


def load_tokenizer(
    source: ModelSource | str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. Raises NoTokenizer if it has none.

    Args:
        source: The model, or its name.
        revision: A branch, tag or commit of a Hub model.
        trust_remote_code: Run the code in the model's directory.
    """
    return read_tokenizer(resolve_model(source, revision, trust_remote_code))


def read_tokenizer(source: ModelSource, what: str = "") -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory. Raises NoTokenizer if there is no vocabulary, because
    transformers may create an empty one.
    """
    what = what or f"model {source.name}"
    source.intact(*TOKENIZER_FILES)
    has_words = any(any(source.path.glob(pattern)) for pattern in VOCABULARIES)
    missing = NoTokenizer(f"{what}: found no tokenizer, expected a file with its vocabulary")
    try:
        with loading(what):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=source.trust_remote_code
            )
    except LorafoldError as error:
        raise error if has_words else missing from error
    names = list((getattr(tokenizer, "vocab_files_names", None) or {}).values())
    if names and not has_words:
        raise missing
    if others := [name for name in names if name not in TOKENIZER_FILES]:
        source.intact(*others)
    return tokenizer


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes the tokenizer into a model's directory, and removes the existing tokenizer."""
    for name in {*FILES, *(getattr(tokenizer, "vocab_files_names", None) or {}).values()}:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
    tokenizer.save_pretrained(directory)
