"""Sanitizes control tokens in messages. Without this, `<|im_end|>` in a question would end the
user's turn, and the text after it could forge another.

`mark_as_text` marks control tokens as transformers' `sanitize_control_tokens` does, and
`rendered_ids` tokenizes marked ones as text. Control tokens are special tokens, and added tokens
that the template writes; the assistant's contents may have non-special ones, such as <tool_call>.
A comment at the start of the template lists exceptions:
{# control tokens in contents: ["<|user|>"] #}, or true for all.
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from lorafold.data.chat_template import PROBE_TEXT, SYSTEM, USER, Template, template_of, try_apply
from lorafold.data.formats import Conversation
from lorafold.data.messages import Tool
from lorafold.errors import LorafoldError
from lorafold.models.built_in_templates import JOINED, rewrite_templates, template_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXCEPTIONS = re.compile(r"\A\{# control tokens in contents: (.*?) #\}\n")
ALL_TOKENS = None  # instead of a set of words
MARK_START, MARK_END = mark_control_tokens("x", re.compile("x")).split("x")
PROMPT_REMARK = (
    "the prompt contains control tokens, which are tokenized as plain text; to keep them as control"
    " tokens, pass --allow-control-tokens"
)
ROWS_REMARK = (
    "rows have control tokens in their contents, which are tokenized as plain text; to keep them as"
    " control tokens, pass --allow-control-tokens"
)
ASSISTANT_FIELDS = ("content", "reasoning_content")  # written by the assistant


def allow_tokens(tokenizer: PreTrainedTokenizerBase, words: Iterable[str] | None = None) -> None:
    """Allows tokens in contents, except those that the template writes; None allows all."""
    if not tokenizer.chat_template:
        return
    if words is not None:
        words = frozenset(words)
        if words:
            words -= template_words("".join(template_texts(tokenizer)), tokenizer, words)
        if not words:
            return

    def noted(text: str) -> str:
        if text.endswith(JOINED):
            return text
        before = allowed_tokens(text)
        given = True if words is None or before is None else sorted({*before, *words})
        # a word may not contain #}, which would end the comment
        note = json.dumps(given).replace("#", "\\u0023")
        return f"{{# control tokens in contents: {note} #}}\n{EXCEPTIONS.sub('', text)}"

    rewrite_templates(tokenizer, noted)


def template_words(
    template: str, tokenizer: PreTrainedTokenizerBase, words: Iterable[str]
) -> frozenset[str]:
    """Returns the words that the template's source or its rendering of probes contains."""
    said = [USER, {"role": "assistant", "content": PROBE_TEXT}, USER]
    conversations = (said, [SYSTEM, *said], [*said[:2], {"role": "tool", "content": PROBE_TEXT}])
    texts = [try_apply(messages, tokenizer, for_generation=True) for messages in conversations]
    text = "".join([EXCEPTIONS.sub("", template), *texts])
    return frozenset(word for word in words if word in text)


def allowed_tokens(template: str) -> frozenset[str] | None:
    if template.endswith(JOINED):
        return ALL_TOKENS
    note = EXCEPTIONS.match(template)
    words = json.loads(note[1]) if note else []
    return ALL_TOKENS if words is True else frozenset(words)


class ControlTokenFinder(NamedTuple):
    """Patterns for all roles and for the assistant's contents, and first characters."""

    all: re.Pattern[str]
    assistant: re.Pattern[str]
    first: tuple[str, ...]


def mark_as_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    finder = _finder(template_of(tokenizer, conversation.tools))
    if finder is None:
        return conversation
    messages = []
    for message in conversation.messages:
        own = ASSISTANT_FIELDS if message["role"] == "assistant" else ()
        messages.append({
            key: value
            if key in ("role", "weight")
            else _mark(value, finder.assistant if key in own else finder.all, finder)
            for key, value in message.items()
        })
    tools = tuple(_mark(tool, finder.all, finder) for tool in conversation.tools)
    if messages == conversation.messages and tools == conversation.tools:
        return conversation
    return replace(conversation, messages=messages, tools=tools)


def mark_variables(
    variables: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]
) -> Mapping[str, Any]:
    finder = _finder(template_of(tokenizer, tools))
    return variables if finder is None else _mark(variables, finder.all, finder)


@lru_cache(maxsize=16)
def _finder(template: Template) -> ControlTokenFinder | None:
    free, tokenizer = allowed_tokens(template.text), template.tokenizer
    if free is None:
        return None
    added = {one.content: one.special for one in tokenizer.added_tokens_decoder.values()}
    listed = getattr(tokenizer, "chat_control_tokens", None)
    written = {w for w in template_words(template.text, tokenizer, added) if not w.isspace()}
    free -= written  # these could forge a turn
    special = {word for word, is_special in added.items() if is_special} - free
    words = special | (written if listed is None else added.keys() & listed - free)
    block = template_of(tokenizer).block
    own = special - ({block.opening, block.closing} & added.keys())
    longest_first = (sorted(some, key=lambda word: (-len(word), word)) for some in (words, own))
    of_all, of_own = (re.compile("|".join(map(re.escape, s)) or "(?!)") for s in longest_first)
    return ControlTokenFinder(of_all, of_own, tuple({word[:1] for word in words}))


def _mark(value: Any, words: re.Pattern[str], finder: ControlTokenFinder) -> Any:
    if isinstance(value, str):
        if not any(character in value for character in (MARK_START, MARK_END, *finder.first)):
            return value  # the common case
        return mark_control_tokens(value, words)
    if isinstance(value, list | tuple):
        return [_mark(one, words, finder) for one in value]
    if not isinstance(value, Mapping):
        return value

    def key(name: Any) -> Any:
        # templates print the keys of arguments; keys that are identifiers are looked up by name
        plain = not isinstance(name, str) or name.isidentifier()
        return name if plain else _mark(name, finder.all, finder)

    return {key(name): _mark(one, words, finder) for name, one in value.items()}


def is_marked(text: str) -> bool:
    return MARK_START in text


def rendered_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenizes a rendered text; marked control tokens become text."""
    if MARK_START not in text:
        return token_ids(text, tokenizer)
    if tokenizer.is_fast:
        return to_pieces(text, tokenizer).ids
    options = {"sanitize_control_tokens": True}
    try:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except ValueError as error:
        raise LorafoldError(_not_text(str(error))) from error
    return list(encoded.input_ids)


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> list[int]:
    """Equals `tokenizer(text, add_special_tokens=special).input_ids`, without offsets and masks:
    0.3 of the time, and other threads run meanwhile.
    """
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if isinstance(tokenizer, Fast) and (kind._encode_plus, kind.__call__) == (
        Fast._encode_plus, Fast.__call__
    ):  # fmt: skip
        backend = tokenizer.backend_tokenizer
        whole = backend.truncation is None and backend.padding is None
        if whole and backend.encode_special_tokens == tokenizer.split_special_tokens:
            return backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


@dataclass(frozen=True)
class Pieces:
    """Ids (T,) and characters [start, end) of each, with the interface of `tokenizers.Encoding`."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)

    def char_to_token(self, character: int) -> int | None:
        last = bisect_right(self.offsets, (character, sys.maxsize)) - 1
        if last < 0 or character >= self.offsets[last][1]:
            return None
        return bisect_left(self.offsets, (self.offsets[last][0],))

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self.offsets[token]


def to_pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Tokenizes as `encode_marked_chat`, with offsets. Pieces after the first are tokenized after a
    line break, because some tokenizers put a space before a text.
    """
    cuts = [*_mark_pattern(tokenizer, len(tokenizer)).finditer(text)]
    starts, ends = [0, *(m.end() for m in cuts)], [*(m.start() for m in cuts), len(text)]
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    [line] = tokenizer(["\n"], **options).input_ids
    given = ["\n" * (start > 0) + text[start:end] for start, end in zip(starts, ends, strict=True)]
    each = [*dict.fromkeys(given)]  # tokenize equal pieces once
    encoded = tokenizer(each, **options)
    pairs = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    tokens = dict(zip(each, pairs, strict=True))
    ids = []
    offsets = []
    for start, piece, cut in zip(starts, given, [*cuts, None], strict=True):
        (some, where), at = tokens[piece], start - (start > 0)
        if start and some[: len(line)] == line:
            some, where = some[len(line) :], where[len(line) :]
        elif start:
            alone = tokenizer(piece[1:], **options)
            some, where, at = alone.input_ids, alone.offset_mapping, start
        ids += some
        offsets += [(at + first, at + last) for first, last in where]
        if cut is not None and (word := cut[1]):
            spelled = _ids_as_text(word, tokenizer)
            ids += spelled
            offsets += [cut.span(1)] * len(spelled)
    return Pieces(ids, offsets)


@lru_cache(maxsize=16)
def _mark_pattern(tokenizer: PreTrainedTokenizerBase, _size: int) -> re.Pattern[str]:
    """Matches marked tokens and lone marks, since a template may cut a content inside a token."""
    words = "|".join(map(re.escape, tokenizer.added_tokens_encoder)) or "(?!)"
    return re.compile(f"{MARK_START}({words}){MARK_END}|[{MARK_START}{MARK_END}]")


@lru_cache(maxsize=256)
def _ids_as_text(word: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    try:
        return tuple(encode_marked_chat(tokenizer, f"{MARK_START}{word}{MARK_END}"))
    except ValueError as error:
        raise LorafoldError(_not_text(str(error))) from error


def _not_text(why: str) -> str:
    return f"{why}; to keep control tokens in contents, pass --allow-control-tokens"
