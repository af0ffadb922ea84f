"""Loads adapters' tokenizers and renders their chat templates, in a worker process. Tokenizer files
must match a digest, and their custom code is not run. Templates run in transformers' sandbox.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

from jinja2 import Environment, TemplateError, meta

from lorafold.data.control_tokens import ALL_TOKENS, allow_tokens, rendered_ids
from lorafold.data.render import ensure_chat_template
from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents

# variables that transformers itself passes to a template
PASSED_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "chat_template",
        "raise_exception", "strftime_now"}  # fmt: skip
CALL_SETTINGS = ("truncation", "padding")  # these are set per call
MAX_CHARACTERS, MAX_TOKENS = 2 << 20, 1 << 19  # of a rendered or tokenized text
MAX_TEMPLATE = 1 << 20  # characters of all templates
# new tokens of an adapter, and their characters in total
MAX_NEW_TOKENS, MAX_NEW_CHARACTERS = 1 << 12, 1 << 16


class TokenizerFiles(TypedDict):
    """The directory, file names and expected digest (`Contents.named`) of a tokenizer."""

    path: str
    names: list[str]
    digest: str


class AdapterTokenizers:
    """Loads and caches adapters' tokenizers for the base's vocabulary. With `allow`, messages may
    contain control tokens.
    """

    def __init__(self, vocabulary: Mapping[str, int], allow: bool) -> None:
        self._allow = allow
        self._words = {number: word for word, number in vocabulary.items()}
        self._cache: OrderedDict[str, Any] = OrderedDict()

    def open(self, files: TokenizerFiles) -> dict[str, Any]:
        """Returns the arguments of an `AdapterTokenizer`. Raises if the base's tokens have other
        IDs.
        """
        tokenizer = self.opened(files)
        words = {number: word for word, number in tokenizer.get_vocab().items()}
        for number, word in self._words.items():
            if (other := words.get(number, word)) != word:
                raise LorafoldError(
                    f"the tokenizer does not fit the base: token {number} is {other!r:.80},"
                    f" expected {word!r:.80}"
                )
        new = sorted(number for number in words if number not in self._words)
        _check_limit(len(new), MAX_NEW_TOKENS, "new tokens")
        size = sum(len(words[n]) for n in new)
        _check_limit(size, MAX_NEW_CHARACTERS, "characters", "new tokens: ")
        added = tokenizer.added_tokens_decoder
        texts = tokenizer.chat_template
        each = texts.values() if isinstance(texts, dict) else (texts,)
        if not all(isinstance(text, str) for text in each):
            raise LorafoldError("chat_template: expected a string, or an object of strings")
        _check_limit(sum(map(len, each)), MAX_TEMPLATE, "characters", "chat_template: ")
        special = tokenizer.special_tokens_map
        if len(json.dumps(special)) > MAX_NEW_CHARACTERS:
            raise LorafoldError(
                f"special tokens: found more than {MAX_NEW_CHARACTERS:,} characters in total"
            )
        return {
            "template": texts,
            "variables": sorted(settable_variables(tokenizer)),
            "special": special,
            "eos": tokenizer.eos_token_id,
            "backend": backend_digest(tokenizer),
            "new": [[n, words[n], n in added and bool(added[n].special)] for n in new],
        }

    def render(
        self, files: TokenizerFiles, messages: list[Any], tools: Any, add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:  # fmt: skip
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self.opened(files)
        rendered = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map | dict(variables),
        )
        text = str(rendered[0][0])
        _check_limit(len(text), MAX_CHARACTERS, "rendered characters")
        return text

    def tokens(self, files: TokenizerFiles, text: str, special: bool, marked: bool) -> list[int]:
        tokenizer = self.opened(files)
        if marked:
            ids = rendered_ids(text, tokenizer)
        else:
            ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        _check_limit(len(ids), MAX_TOKENS, "tokens")
        return ids

    def opened(self, files: TokenizerFiles, **_: object) -> Any:
        digest = files["digest"]
        if digest in self._cache:
            self._cache.move_to_end(digest)
            return self._cache[digest]
        contents = Contents(files["path"], files["names"])
        contents.check_intact()
        if contents.named != digest:
            raise LorafoldError("the adapter's tokenizer files changed; load the adapter again")
        tokenizer = _load_tokenizer(contents)
        ensure_chat_template(tokenizer)
        new = (word for word, n in tokenizer.get_vocab().items() if n not in self._words)
        allow_tokens(tokenizer, ALL_TOKENS if self._allow else new)
        self._cache[digest] = tokenizer
        if len(self._cache) > 8:
            self._cache.popitem(last=False)
        return tokenizer


def _check_limit(size: int, limit: int, unit: str, start: str = "") -> None:
    if size > limit:
        raise LorafoldError(f"{start}found {size:,} {unit}, expected at most {limit:,}")


def write_files(contents: Contents, folder: Path) -> None:
    for name in contents.names:
        if (content := contents.files.get(name)) is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def _load_tokenizer(contents: Contents) -> Any:
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="lorafold-tokenizer-") as folder:
        write_files(contents, Path(folder))
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (Exception, RecursionError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LorafoldError(f"the tokenizer can't be loaded ({why[:300]})") from None


def backend_digest(tokenizer: Any) -> str:
    """Returns the SHA-256 of a fast tokenizer's state, or "" for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    parts = json.loads(backend.to_str())
    for setting in CALL_SETTINGS:
        parts.pop(setting, None)
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def settable_variables(tokenizer: Any) -> frozenset[str]:
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            str(tokenizer.get_chat_template())
        )
    except TemplateError:  # for example transformers' own tags
        return frozenset()
    special = tokenizer.special_tokens_map.keys()
    return meta.find_undeclared_variables(tree) - PASSED_VARIABLES - special
