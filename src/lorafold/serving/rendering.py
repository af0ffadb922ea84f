"""Requests as tokens, through a tokenizer and its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from lorafold.data.grammar import grammar_of, special_words
from lorafold.data.messages import Message, Tool
from lorafold.data.render import render
from lorafold.data.shapes import Conversation
from lorafold.data.shown import HELP, check_able, check_shown
from lorafold.errors import LorafoldError
from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.wire.answers import Tokens
from lorafold.serving.wire.schema import check, held

OURS = {"messages", "tools", "documents", "add_generation_prompt", "chat_template",
        "raise_exception", "strftime_now"}  # fmt: skip


class Renderer:
    """The tokenizer of the base, or of adapters.

    Args:
        tokenizer: with a chat template.
        ends: the tokens that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
        self.tokenizer, self.ends, self.shown = tokenizer, ends, Tokens(tokenizer)
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                str(tokenizer.get_chat_template())
            )
            self.variables = frozenset(meta.find_undeclared_variables(tree)) - OURS
            self.variables -= tokenizer.special_tokens_map.keys()
        except TemplateError:  # tags of transformers' own
            self.variables = frozenset()

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> str:
        """A conversation as the prompt for its next turn. Raises Refusal for one that the template
        refuses, or of which it leaves something out.

        Args:
            messages: the messages, in the form of `data.messages`.
            tools: the tools.
            variables: further variables of the template, which it must know.
        """
        for name in variables:
            if name not in self.variables:
                raise wrong(name, "the model's chat template has no such variable")
        asked = Conversation(list(messages), 0, tuple(tools))
        try:
            check_able(asked, self.tokenizer)
            text = render(messages, self.tokenizer, True, tools, variables)
            check_shown(asked, text, self.tokenizer)
        except LorafoldError as error:
            told = str(error).removesuffix(f"; {HELP}").removesuffix(", so it would be lost")
            told = told.replace("the row's tools", "the tools")
            raise Refusal(400, "template_refuses", f"messages: {told}", "messages") from None
        return text

    def tokens(self, text: str, special: bool) -> tuple[int, ...]:
        """The tokens of a text.

        Args:
            text: the text.
            special: add the tokens with which the tokenizer begins a text.
        """
        found: Any = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return tuple(found.input_ids)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens. Raises Refusal for one that there is not."""
        known = len(self.tokenizer)
        for token in tokens:
            if not 0 <= token < known:
                raise wrong("tokens", f"found {token}, expected 0 to {known - 1}")
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def call_grammar(
        self, tools: Sequence[Tool], names: Sequence[str], schema: str | None = None
    ) -> str:
        """A grammar of one call of one of the named tools, as the chat template writes calls, or
        else of JSON. Raises Refusal for a template that writes them otherwise than as JSON.

        Args:
            tools: the tools.
            names: those of which one has to be called.
            schema: what may be there instead of a call, None for nothing.
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
            check(arguments, field)
            calls.append(f"{json.dumps(function['name'] + form.named)} arguments{i}")
            rules.append(f"arguments{i}: %json {arguments}")
        before, after = json.dumps(form.before.lstrip()), json.dumps(form.closing)
        literal = [part for part in (before, "(" + " | ".join(calls) + ")", after) if part != '""']
        if schema is not None:
            check(schema, "response_format")
            rules.append(f"answer: %json {schema}")
        either = "" if schema is None else " | answer"
        return "\n".join([f"start: {' '.join(literal)}{either}", *rules])
