"""Calls in a generated text, read back the way the chat template writes them.

    parse_calls('<tool_call>\\n{"name": "weather", "arguments": {"city": "Rome"}}\\n</tool_call>',
                tokenizer)
    [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]

`data.grammar` finds out how the template writes them. Runs of whitespace may differ, and special
tokens may be left out of the text, as `lf.generate` leaves them out.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.data.grammar import NAMES, Grammar, Pairs, grammar_of, special_words
from lorafold.data.messages import Tool, tool_problems
from lorafold.data.reasoning import block_of
from lorafold.data.template_forms import ASKED, attempt, call, form_of
from lorafold.errors import LorafoldError, as_one

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of bounded length: else a text without an end of the name is tried from each of its characters on
NAME = r"(?P<name>[\w.:-]{1,256}?)"


def parse_calls(
    text: str, tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Tool] = ()
) -> list[dict[str, Any]]:
    """The calls in a completion, in OpenAI's form, with arguments as an object; [] without calls.

    Args:
        text: A completion, with its special tokens or without.
        tokenizer: The tokenizer whose chat template writes the calls.
        tools: The tools that were offered. A template that writes texts without quotes does not
            tell 7 from "7": what a tool says is text stays text.

    Raises LorafoldError for a template that writes no calls, and for arguments that can't be read.
    """
    grammar = grammar_of(tokenizer)
    if grammar is None:
        raise LorafoldError(
            "the chat template does not show calls (tool_calls), so none can be read back"
        )
    prompt = attempt(form_of(tokenizer).of([ASKED]), tokenizer, for_generation=True)
    text = text[block_of(tokenizer).end(text, prompt) :].rstrip()
    for form in (grammar, grammar.without(special_words(tokenizer))):
        if found := list(_calls(text, form, tools)):
            return found
    return []


def read_tools(path: Path) -> list[Tool]:
    """The tools of a JSON file, which holds a list of them.

    Raises LorafoldError for a file that can't be read or holds anything else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise LorafoldError(f"{path}: not JSON: {error}") from error
    if problems := list(tool_problems(found)):
        raise LorafoldError(f"{path}: {as_one(problems)}")
    return list(found)


def _calls(text: str, grammar: Grammar, tools: Sequence[Tool]) -> Iterator[dict[str, Any]]:
    # without anything before a name, a call can only be the whole text
    first = _regex(grammar.before.lstrip()) or r"\A\s*"
    named = f"(?:{_regex(grammar.named)})"
    if grammar.bare.strip() and grammar.pairs is not None:
        named = f"(?:{_regex(grammar.named)}|(?P<bare>{_regex(grammar.bare)}))"
    begin = re.compile(first + NAME + named)
    further = re.compile(_regex(grammar.between) + NAME + named) if grammar.between else None
    at, match = 0, begin.search(text)
    while match is not None:
        name, at = match["name"], match.end()
        if grammar.pairs is None:
            arguments, at = _json(text, at, name)
        elif match.groupdict().get("bare") is not None:
            arguments = {}
        else:
            arguments, at = _pairs(text, at, grammar.pairs, _types(tools, name))
        yield call(name, arguments)
        match = (further.match(text, at) if further else None) or begin.search(text, at)


def _json(text: str, at: int, name: str) -> tuple[dict[str, Any], int]:
    try:
        found, end = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        why = f"arguments that are no JSON: {error.msg}"
        raise LorafoldError(f"the call of {name}: {why}") from error
    if not isinstance(found, dict):
        raise LorafoldError(f"the call of {name}: arguments that are no JSON object")
    return found, end


def _pairs(text: str, at: int, pairs: Pairs, types: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The keys and values from a character on, and where they end."""
    found: dict[str, Any] = {}
    opening, ending = (re.escape(quote) for quote in pairs.quotes)
    key_re = re.compile(r"(.+?)" + _regex(pairs.equals), re.DOTALL)
    after = f"(?:(?P<more>{_regex(pairs.comma)})|{_regex(pairs.closing)}|\\Z)"
    after_re = re.compile(after)
    quoted_re = re.compile(rf"{opening}(?P<value>.*?){ending}{after}", re.DOTALL)
    while key := key_re.match(text, at):
        quoted = quoted_re.match(text, key.end()) if opening else None
        ends = [] if quoted else list(after_re.finditer(text, key.end()))
        values = (text[key.end() : end.start()] for end in ends)
        # a list or an object goes on to the end at which its brackets are closed
        whole = next((n for n, value in enumerate(values) if _closed(value)), 0)
        match = quoted or (ends[whole] if ends else None)
        if match is None:
            break
        value = match["value"] if quoted else text[key.end() : match.start()]
        is_text = quoted is not None or types.get(key[1].strip()) == "string"
        found[key[1].strip()] = value if is_text else _value(value, pairs.quotes)
        at = match.end()
        if match["more"] is None:
            break
    return found, at


def _closed(value: str) -> bool:
    """Whether a value has as many closing brackets as opening ones, if it begins with one."""
    if not value.lstrip().startswith(("[", "{")):
        return True
    return all(value.count(a) == value.count(b) for a, b in ("[]", "{}"))


def _value(text: str, quotes: tuple[str, str]) -> Any:
    """A value that is not said to be text: as JSON or Python writes it, else as text."""
    plain = text
    for quote in filter(None, quotes):
        plain = plain.replace(quote, '"')
    named = re.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', plain)  # keys without quotes
    readings = ((json.loads, plain), (ast.literal_eval, text), (json.loads, named))
    for read, given in readings:
        try:
            return read(given)
        except (ValueError, SyntaxError):
            continue
    return text


def _types(tools: Sequence[Tool], name: str) -> dict[str, str]:
    """The types of a tool's arguments."""
    for tool in tools:
        function = tool.get("function", tool)
        if function["name"] == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: str(value.get("type")) for key, value in properties.items()}
    return {}


def _regex(literal: str) -> str:
    """A pattern for a text in which runs of whitespace may differ, and a name may be repeated."""
    pattern = r"\s*".join(map(re.escape, re.split(r"\s+", literal)))
    return pattern.replace(re.escape(NAMES[0]), "(?P=name)")
