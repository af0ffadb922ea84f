"""Requests as tokens, through a tokenizer and its chat template.

`Renderers` has the base's renderer, and one for each adapter whose tokenizer files differ from the
base's. Their tokens have to mean the same as the base's; new ones belong to the adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorafold.data.calls import grammar_of, parse_calls, special_words
from lorafold.data.control_tokens import as_text, ids_of, tokens_of
from lorafold.data.messages import Message, Tool
from lorafold.data.render import HELP, check_able, prompt_of
from lorafold.data.shapes import Conversation
from lorafold.data.templates import ASKED, KEY, NAME, PROBE_TOOL, VALUE, call, template_of
from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents
from lorafold.generation import end_tokens
from lorafold.serving.backend import Text, Token
from lorafold.serving.errors import Refusal, wrong
from lorafold.serving.schema import Compiles, check, held
from lorafold.verification.checks import Screen
from lorafold.verification.tokenizer_files import variables_of

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # in the text of a part of a character
BYTE = re.compile("<0x([0-9A-F]{2})>")  # as SentencePiece writes a token of one byte
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # as byte-level BPE
MARKS = 2048  # letters with which a template writes reasoning and calls, which texts are sought for


class TokenTexts:
    """TokenTexts as texts, for log probabilities."""

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
        """The text that each token of a prompt adds."""
        reader = Text(self._tokenizer, special=True)
        found = [reader.add(token) for token in tokens]
        found[-1] += reader.finish()
        unwritten = len(reader.text) - len(text) if text and reader.text.endswith(text) else 0
        for i, piece in enumerate(found):
            found[i], unwritten = piece[unwritten:], max(0, unwritten - len(piece))
        return found

    def chat(self, tokens: Sequence[Token], top: int) -> list[dict[str, Any]]:
        """Log probabilities as chat completions have them."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.text(token), "logprob": logprob, "bytes": list(self.bytes(token)),
            }  # fmt: skip

        return [
            one(t.token, t.logprob or 0.0) | {"top_logprobs": [one(*x) for x in t.top[:top]]}
            for t in tokens
        ]

    def legacy(self, tokens: Sequence[Token], top: int, offset: int) -> dict[str, Any]:
        """Log probabilities as completions have them."""
        offsets = [*accumulate((len(t.text) for t in tokens), initial=offset)]
        return {
            "tokens": [self.name(t.token) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [
                None if t.logprob is None else {self.name(i): p for i, p in t.top[:top]}
                for t in tokens
            ],
            "text_offset": offsets[:-1],
        }


class Renderer:
    """The tokenizer of the base, or of adapters."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], variables: frozenset[str]) -> None:
        self.tokenizer, self.ends, self.shown = tokenizer, ends, TokenTexts(tokenizer)
        self.variables = variables

    def probe(self) -> None:
        """Find out how the template writes tools, calls and reasoning, which reading an answer back
        needs to know at once.
        """
        called: Message = {"role": "assistant", "tool_calls": [call(NAME, {KEY: VALUE})]}
        asked = Conversation([ASKED, called], 0, (PROBE_TOOL,))
        for look in (
            lambda: check_able(asked, self.tokenizer),
            lambda: template_of(self.tokenizer).block,
            lambda: as_text(asked, self.tokenizer),
            lambda: parse_calls(VALUE, self.tokenizer),
        ):
            with suppress(LorafoldError):
                look()

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> str:
        """A conversation as the prompt for its next turn."""
        for name in variables:
            if name not in self.variables:
                raise wrong(name, "the model's chat template has no such variable")
        asked = Conversation(list(messages), 0, tuple(tools))
        try:
            return prompt_of(asked, self.tokenizer, variables)
        except LorafoldError as error:
            told = str(error).removesuffix(f"; {HELP}").removesuffix(", so it would be lost")
            told = told.replace("the row's tools", "the tools")
            raise Refusal(400, "template_refuses", f"messages: {told}", "messages") from None

    def prompt_tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a conversation that `chat` rendered."""
        try:
            return tuple(ids_of(text, self.tokenizer))
        except LorafoldError as error:
            raise Refusal(400, "template_refuses", f"messages: {error}", "messages") from None

    def tokens(self, text: str, special: bool) -> tuple[int, ...]:
        """The tokens of a text as it stands."""
        return tuple(tokens_of(text, self.tokenizer, special))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        known = len(self.tokenizer)
        for token in tokens:
            if not 0 <= token < known:
                raise wrong("tokens", f"found {token}, expected 0 to {known - 1}")
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def call_grammar(
        self,
        tools: Sequence[Tool],
        names: Sequence[str],
        compiles: Compiles,
        schema: str | None = None,
    ) -> str:
        """A grammar of one call of one of the named tools, as the chat template writes calls, or
        else of JSON.
        """
        found = grammar_of(self.tokenizer)
        if found is None or found.pairs is not None:
            told = "the model's template writes no calls as JSON, so"
            if schema is None:
                raise wrong("tool_choice", f"{told} none can be forced; use auto")
            told = f"{told} that it can't stand beside tools; use tool_choice none, or no schema"
            raise wrong("response_format", told)
        form = found.without(special_words(self.tokenizer))
        calls, rules = [], []
        for i, tool in enumerate(tools):
            function = tool["function"]
            if function["name"] not in names:
                continue
            field = f"tools[{i}].function.parameters"
            parameters = function.get("parameters") or {"type": "object"}
            if not isinstance(parameters, Mapping):
                raise wrong(field, f"found {parameters!r:.80}, expected a JSON schema")
            arguments = held(parameters)
            check(arguments, field, compiles)
            calls.append(f"{json.dumps(function['name'] + form.named)} arguments{i}")
            rules.append(f"arguments{i}: %json {arguments}")
        before, after = json.dumps(form.before.lstrip()), json.dumps(form.closing)
        literal = [part for part in (before, "(" + " | ".join(calls) + ")", after) if part != '""']
        if schema is not None:
            check(schema, "response_format", compiles)
            rules.append(f"answer: %json {schema}")
        either = "" if schema is None else " | answer"
        return "\n".join([f"start: {' '.join(literal)}{either}", *rules])


@dataclass(frozen=True)
class ServedModel:
    """What a request runs under: the adapter's name, or the base's, its version in the engine, None
    for the base, what renders it, and the base's identity.
    """

    name: str
    key: str | None
    renderer: Renderer
    base: str


class Renderers:
    """Makes renderers. Any thread may call it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, screen: Screen
    ) -> None:
        self._model, self._screen = model, screen
        ends = end_tokens(model, tokenizer)
        self.base = Renderer(tokenizer, ends, variables_of(tokenizer))
        self.base.probe()
        self.known: dict[str, Renderer] = {}  # by the digest of the files

    def of(self, files: Contents) -> Renderer:
        """The renderer of a tokenizer's files, without any code of theirs."""
        if files.named in self.known:
            return self.known[files.named]
        tokenizer = self._screen.open(files)
        if tokenizer is None:
            return self.known.setdefault(files.named, self.base)
        ends = end_tokens(self._model, cast(Any, tokenizer))
        found = Renderer(tokenizer, ends, tokenizer.variables)
        found.probe()
        tokenizer.probed()
        block, grammar = template_of(cast(Any, tokenizer)).block, grammar_of(cast(Any, tokenizer))
        size = len(block.opening + block.closing) + (len(repr(grammar)) if grammar else 0)
        if size > MARKS:
            raise LorafoldError(
                f"{files.path}: its chat template writes reasoning and calls with {size:,} letters"
                f" around them, expected at most {MARKS:,}"
            )
        return self.known.setdefault(files.named, found)
