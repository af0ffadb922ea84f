"""Renders and tokenizes requests with the base's tokenizer or the adapter's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorafold.data.chat_template import PROBE_TEXT, PROBE_TOOL, TOOL_CALL, USER, template_of
from lorafold.data.control_tokens import mark_as_text, rendered_ids, token_ids
from lorafold.data.formats import Conversation
from lorafold.data.messages import Message, Tool
from lorafold.data.render import HELP, check_supported, prompt_of
from lorafold.data.tool_calls import grammar_of, parse_calls, special_tokens
from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents
from lorafold.generation import end_tokens
from lorafold.serving.backend import Detokenizer, Token
from lorafold.serving.refusals import Refusal, invalid
from lorafold.serving.schema import CheckGrammar, check, compact
from lorafold.verification.checks import Sandbox
from lorafold.verification.tokenizer_files import settable_variables

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # decoded from an incomplete character
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # a byte token of SentencePiece
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # byte-level BPE
MAX_TAG_CHARACTERS = 2048  # of a template's tags, for which all completions are searched


class TokenTexts:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._texts = tokenizer, dict[int, str]()

    def text(self, token: int) -> str:
        """Returns a token's text, with the replacement character for an incomplete character."""
        if (text := self._texts.get(token)) is None:
            text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
            self._texts[token] = text
        return text

    def bytes(self, token: int) -> bytes:
        text, piece = self.text(token), str(self._tokenizer.convert_ids_to_tokens(token))
        if INCOMPLETE not in text:
            return text.encode()
        if hexadecimal := BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(hexadecimal[1])
        known = all(character in BYTE_OF for character in piece)
        return bytes(BYTE_OF[character] for character in piece) if known else text.encode()

    def unique_text(self, token: int) -> str:
        """Returns a token's text or, if a character is incomplete, the token's bytes, so that such
        tokens differ.
        """
        text = self.text(token)
        return f"bytes:{str(self.bytes(token))[2:-1]}" if INCOMPLETE in text else text

    def pieces(self, tokens: Sequence[int], text: str | None) -> list[str]:
        """Splits a prompt's text by tokens. Tokens that the tokenizer added before `text` get empty
        texts.
        """
        reader = Detokenizer(self._tokenizer, special=True)
        pieces = [reader.add(token) for token in tokens]
        pieces[-1] += reader.finish()
        added = len(reader.text) - len(text) if text and reader.text.endswith(text) else 0
        for i, piece in enumerate(pieces):
            pieces[i], added = piece[added:], max(0, added - len(piece))
        return pieces

    def chat_logprobs(self, tokens: Sequence[Token], top: int) -> list[dict[str, Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.text(token), "logprob": logprob, "bytes": list(self.bytes(token)),
            }  # fmt: skip

        return [
            entry(t.token, t.logprob or 0.0) | {"top_logprobs": [entry(*x) for x in t.top[:top]]}
            for t in tokens
        ]

    def legacy_logprobs(self, tokens: Sequence[Token], top: int, offset: int) -> dict[str, Any]:
        """Returns logprobs in the format of `/v1/completions`. The text begins at `offset`."""
        return {
            "tokens": [self.unique_text(t.token) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [
                None if t.logprob is None else {self.unique_text(i): p for i, p in t.top[:top]}
                for t in tokens
            ],
            "text_offset": [*accumulate((len(t.text) for t in tokens), initial=offset)][:-1],
        }


class Renderer:
    def __init__(self, tokenizer: Any, ends: frozenset[int], variables: frozenset[str]) -> None:
        self.tokenizer, self.ends, self.variables = tokenizer, ends, variables
        self.texts = TokenTexts(tokenizer)
        # fills the caches of template analysis, so that no request waits for it
        conversation = Conversation([USER, TOOL_CALL], 0, (PROBE_TOOL,))
        for probe in (
            lambda: check_supported(conversation, tokenizer),
            lambda: template_of(tokenizer).block,
            lambda: mark_as_text(conversation, tokenizer),
            lambda: parse_calls(PROBE_TEXT, tokenizer),
        ):
            with suppress(LorafoldError):
                probe()

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> str:
        """Renders the prompt of the next turn. Raises if the template hides a part of it."""
        for name in variables:
            if name not in self.variables:
                raise invalid(name, "the model's chat template has no such variable")
        try:
            conversation = Conversation(list(messages), 0, tuple(tools))
            return prompt_of(conversation, self.tokenizer, variables)
        except LorafoldError as error:
            message = str(error).removesuffix(f"; {HELP}").removesuffix(", which would be lost")
            raise Refusal(400, "template_refuses", f"messages: {message}", "messages") from None

    def prompt_tokens(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(rendered_ids(text, self.tokenizer))
        except LorafoldError as error:
            raise Refusal(400, "template_refuses", f"messages: {error}", "messages") from None

    def tokens(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(token_ids(text, self.tokenizer, special))

    def text(self, tokens: Sequence[int]) -> str:
        """Decodes tokens. Raises for ids outside of the vocabulary."""
        size = len(self.tokenizer)
        for token in tokens:
            if not 0 <= token < size:
                raise invalid("tokens", f"found {token}, expected 0 to {size - 1}")
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def call_grammar(
        self, tools: Sequence[Tool], names: Sequence[str], check_grammar: CheckGrammar,
        schema: str | None,
    ) -> str:  # fmt: skip
        """Returns a grammar for one call of a named tool in the template's syntax, or for an answer
        that matches the schema.
        """
        calls_of = grammar_of(self.tokenizer)
        if calls_of is None or calls_of.pairs is not None:
            why = "the model's chat template does not format tool calls as JSON, so"
            if schema is None:
                raise invalid("tool_choice", f"{why} a call can't be forced; use auto")
            hint = "set tool_choice to none, or remove the schema"
            raise invalid("response_format", f"{why} a schema can't be used with tools; {hint}")
        form = calls_of.without(special_tokens(self.tokenizer))
        calls, rules = [], []
        for i, tool in enumerate(tools):
            function = tool["function"]
            if function["name"] not in names:
                continue
            field = f"tools[{i}].function.parameters"
            parameters = function.get("parameters") or {"type": "object"}
            if not isinstance(parameters, Mapping):
                raise invalid(field, f"found {parameters!r:.80}, expected a JSON schema")
            arguments = compact(parameters)
            check(arguments, field, check_grammar)
            calls.append(f"{json.dumps(function['name'] + form.after_name)} arguments{i}")
            rules.append(f"arguments{i}: %json {arguments}")
        before, after = json.dumps(form.before.lstrip()), json.dumps(form.closing)
        literal = [part for part in (before, "(" + " | ".join(calls) + ")", after) if part != '""']
        if schema is not None:
            check(schema, "response_format", check_grammar)
            literal.append("| answer")
            rules.append(f"answer: %json {schema}")
        return "\n".join([f"start: {' '.join(literal)}", *rules])


@dataclass(frozen=True)
class ServedModel:
    name: str
    key: str | None  # the adapter's key in the engine; None for the base
    renderer: Renderer
    base: str  # identity of the base


class Renderers:
    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sandbox: Sandbox
    ) -> None:
        self._model, self._sandbox = model, sandbox
        self.base = Renderer(tokenizer, end_tokens(model, tokenizer), settable_variables(tokenizer))
        self.by_digest: dict[str, Renderer] = {}  # by digest of tokenizer files

    def of_files(self, files: Contents) -> Renderer:
        """Returns the renderer for tokenizer files, without running code in them."""
        if files.named in self.by_digest:
            return self.by_digest[files.named]
        tokenizer: Any = self._sandbox.open(files)
        if tokenizer is None:
            return self.by_digest.setdefault(files.named, self.base)
        renderer = Renderer(tokenizer, end_tokens(self._model, tokenizer), tokenizer.variables)
        tokenizer.stop_caching()
        block, grammar = template_of(tokenizer).block, grammar_of(tokenizer)
        size = len(block.opening + block.closing) + (len(repr(grammar)) if grammar else 0)
        if size > MAX_TAG_CHARACTERS:
            raise LorafoldError(
                f"{files.path}: the chat template's tags around reasoning and tool calls have"
                f" {size:,} characters, expected at most {MAX_TAG_CHARACTERS:,}"
            )
        return self.by_digest.setdefault(files.named, renderer)
