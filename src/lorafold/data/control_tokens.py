"""Sanitizes control tokens in messages. Otherwise, `<|im_end|>` in a question would end the user's
turn, and the text after it could forge another turn.

`mark_as_text` marks control tokens as transformers' `sanitize_control_tokens` does, and
`rendered_ids` tokenizes marked tokens as text. Control tokens are all special tokens, and the added
tokens that the template renders. The assistant's content may contain non-special tokens, such as
<tool_call>. A comment at the start of the template lists exceptions, or is `true` for all:

    {# control tokens in contents: ["<|user|>"] #}
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
from lorafold.models.built_in_templates import JOINED_TEMPLATE, rewrite_templates, template_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXCEPTIONS = re.compile(r"\A\{# control tokens in contents: (.*?) #\}\n")
ALL_TOKENS = None  # instead of a set of tokens
MARK_START, MARK_END = mark_control_tokens("x", re.compile("x")).split("x")
AS_TEXT = (
    "control tokens, which are tokenized as plain text; to keep them as control tokens, pass"
    " --allow-control-tokens"
)
PROMPT_REMARK = f"the prompt contains {AS_TEXT}"
ROWS_REMARK = f"rows contain {AS_TEXT}"


def allow_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str] | None = None) -> None:
    """Allows control tokens in contents, except tokens in the template. None allows all."""
    if not tokenizer.chat_template:
        return
    if tokens is not None:
        tokens = frozenset(tokens)
        if tokens:
            tokens -= template_words("".join(template_texts(tokenizer)), tokenizer, tokens)
        if not tokens:
            return

    def noted(text: str) -> str:
        if text.endswith(JOINED_TEMPLATE):
            return text
        before = allowed_tokens(text)
        exceptions = True if tokens is None or before is None else sorted({*before, *tokens})
        # a token that contains #} would end the comment
        note = json.dumps(exceptions).replace("#", "\\u0023")
        return f"{{# control tokens in contents: {note} #}}\n{EXCEPTIONS.sub('', text)}"

    rewrite_templates(tokenizer, noted)


def template_words(
    template: str, tokenizer: PreTrainedTokenizerBase, words: Iterable[str]
) -> frozenset[str]:
    """Returns the words that occur in the template's source or in rendered test conversations."""
    said = [USER, {"role": "assistant", "content": PROBE_TEXT}, USER]
    conversations = (said, [SYSTEM, *said], [*said[:2], {"role": "tool", "content": PROBE_TEXT}])
    texts = [try_apply(messages, tokenizer, for_generation=True) for messages in conversations]
    text = "".join([EXCEPTIONS.sub("", template), *texts])
    return frozenset(word for word in words if word in text)


def allowed_tokens(template: str) -> frozenset[str] | None:
    if template.endswith(JOINED_TEMPLATE):
        return ALL_TOKENS
    note = EXCEPTIONS.match(template)
    words = json.loads(note[1]) if note else []
    return ALL_TOKENS if words is True else frozenset(words)


class ControlTokenFinder(NamedTuple):
    """Patterns of control tokens in all messages and in the assistant's content, and the first
    characters of all of these tokens.
    """

    all: re.Pattern[str]
    assistant: re.Pattern[str]
    first: tuple[str, ...]


def mark_as_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    finder = _finder(template_of(tokenizer, conversation.tools))
    if finder is None:
        return conversation
    messages = []
    for message in conversation.messages:
        own = ("content", "reasoning_content") if message["role"] == "assistant" else ()
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
    exceptions, tokenizer = allowed_tokens(template.text), template.tokenizer
    if exceptions is None:
        return None
    added = {one.content: one.special for one in tokenizer.added_tokens_decoder.values()}
    listed = getattr(tokenizer, "chat_control_tokens", None)
    written = {w for w in template_words(template.text, tokenizer, added) if not w.isspace()}
    exceptions -= written  # because these could forge a turn
    special = {word for word, is_special in added.items() if is_special} - exceptions
    tokens = special | (written if listed is None else added.keys() & listed - exceptions)
    block = template_of(tokenizer).block
    assistant = special - ({block.opening, block.closing} & added.keys())
    longest_first = (sorted(s, key=lambda word: (-len(word), word)) for s in (tokens, assistant))
    of_all, of_own = (re.compile("|".join(map(re.escape, s)) or "(?!)") for s in longest_first)
    return ControlTokenFinder(of_all, of_own, tuple({word[:1] for word in tokens}))


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
        # templates render the keys of arguments, but look up keys that are identifiers by name
        plain = not isinstance(name, str) or name.isidentifier()
        return name if plain else _mark(name, finder.all, finder)

    return {key(name): _mark(one, words, finder) for name, one in value.items()}


def is_marked(text: str) -> bool:
    return MARK_START in text


def rendered_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenizes a rendered text, with marked control tokens as text."""
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
    """Returns `tokenizer(text, add_special_tokens=special).input_ids` in 30% of the time, because
    it computes no offsets or masks. It releases the GIL, so other threads can run.
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
    """Token ids (T,) and the characters [start, end) of each, as in `tokenizers.Encoding`."""

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
    """Tokenizes like transformers' `encode_marked_chat`, with offsets. Each piece of text after a
    marked token is tokenized behind a line break, because some tokenizers insert a space at the
    start of a text.
    """
    cuts = [*_mark_pattern(tokenizer, len(tokenizer)).finditer(text)]
    starts, ends = [0, *(m.end() for m in cuts)], [*(m.start() for m in cuts), len(text)]
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    [line] = tokenizer(["\n"], **options).input_ids
    pieces = ["\n" * (start > 0) + text[start:end] for start, end in zip(starts, ends, strict=True)]
    unique = [*dict.fromkeys(pieces)]  # equal pieces are tokenized once
    encoded = tokenizer(unique, **options)
    pairs = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    tokens = dict(zip(unique, pairs, strict=True))
    ids = []
    offsets = []
    for start, piece, cut in zip(starts, pieces, [*cuts, None], strict=True):
        (ids_of_piece, spans), at = tokens[piece], start - (start > 0)
        if start and ids_of_piece[: len(line)] == line:
            ids_of_piece, spans = ids_of_piece[len(line) :], spans[len(line) :]
        elif start:
            alone = tokenizer(piece[1:], **options)
            ids_of_piece, spans, at = alone.input_ids, alone.offset_mapping, start
        ids += ids_of_piece
        offsets += [(at + first, at + last) for first, last in spans]
        if cut is not None and (word := cut[1]):
            spelled = _ids_as_text(word, tokenizer)
            ids += spelled
            offsets += [cut.span(1)] * len(spelled)
    return Pieces(ids, offsets)


@lru_cache(maxsize=16)
def _mark_pattern(tokenizer: PreTrainedTokenizerBase, _size: int) -> re.Pattern[str]:
    """Returns a pattern of marked tokens and of lone marks, which occur if a template truncates a
    content inside a token. `_size` is part of the cache key.
    """
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
