"""Parses tool calls in generated text. The grammar is inferred from how the chat template renders
test calls.

Arguments are JSON or key-value pairs. Whitespace may differ, and special tokens may be missing.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafold.data.chat_template import (
    PARTIAL_TAG,
    USER,
    Template,
    prefix_of,
    template_of,
    tool_call,
    try_apply,
)
from lorafold.data.json_input import find_unusable
from lorafold.data.messages import Tool, tool_problems
from lorafold.errors import LorafoldError, join_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_NAMES = ("probe_first", "probe_second")
PROBE_TEXTS = {"probe_key": "probe value", "probe_other": "probe text"}
PROBE_NUMBERS = {"probe_key": 7131, "probe_other": 8242}
# the limit of 256 keeps matching linear if no name ends in a text
NAME_PATTERN = r"(?P<name>[\w.:-]{1,256}?)"


class Pairs(NamedTuple):
    """The syntax of key-value arguments: the texts between key and value, between pairs, after the
    last pair, and around quoted values.
    """

    equals: str
    comma: str
    closing: str
    opening: str
    ending: str


class Grammar(NamedTuple):
    """The syntax of calls: the text before the first name, between calls (None if a turn has at
    most one call), after a name, and after a name without arguments; the syntax of pairs, or None
    if arguments are JSON; and the text after JSON. PROBE_NAMES[0] stands for a repeated name.
    """

    before: str
    between: str | None
    after_name: str
    without_arguments: str
    pairs: Pairs | None
    closing: str = ""

    def without(self, words: Sequence[str]) -> Grammar:
        def remove(part: Any) -> Any:
            if isinstance(part, Pairs):
                return Pairs(*map(remove, part))
            for word in words if part else ():
                part = part.replace(word, "")
            return part

        return Grammar(*map(remove, self))


def grammar_of(tokenizer: PreTrainedTokenizerBase) -> Grammar | None:
    return _grammar_of(template_of(tokenizer))


@lru_cache(maxsize=16)
def _grammar_of(template: Template) -> Grammar | None:
    tokenizer = template.tokenizer
    one, two = (_render_calls([PROBE_TEXTS] * n, tokenizer) for n in (1, 2))
    before, name, rest = one.partition(PROBE_NAMES[0])
    if not name:
        return None
    special, between = special_tokens(tokenizer), None
    if PROBE_NAMES[1] in two and _split_arguments(one, PROBE_TEXTS)[-1] is not None:
        head = two.partition(PROBE_NAMES[1])[0]
        _, between = _json_at(head, PROBE_TEXTS) or (0, "")
        between = between or str(_split_arguments(head, PROBE_TEXTS)[-1])
    if json_arguments := _json_at(rest, PROBE_TEXTS):
        after, follows = json_arguments
        ends = [follows.find(word) for word in special if word in follows]
        alone = follows[: min(ends, default=len(follows))]
        closes = (alone if between is None else prefix_of(follows, between)).rstrip()
        return Grammar(before, between, rest[:after], "", None, closes)
    after_name, equals, comma, closing = _split_arguments(rest, PROBE_TEXTS)
    plain_rest = _render_calls([PROBE_NUMBERS], tokenizer).partition(PROBE_NAMES[0])[2]
    _, plain, plain_comma, plain_end = _split_arguments(plain_rest, PROBE_NUMBERS)
    if None in (after_name, equals, comma, plain, closing):
        return None
    opening = equals[len(plain) :] if equals.startswith(plain) else ""
    ending = comma[: len(comma) - len(plain_comma)] if opening else ""
    if between is not None:
        two_numbers = _render_calls([PROBE_NUMBERS] * 2, tokenizer).partition(PROBE_NAMES[1])[0]
        shared = prefix_of(str(_split_arguments(two_numbers, PROBE_NUMBERS)[-1]), plain_end)
        plain_end = re.sub(r"<[^<>]*\Z", "", shared).rstrip()  # removes an incomplete tag
        between = between.removeprefix(ending).removeprefix(plain_end)
    elif at := min((plain_end.find(word) for word in special if word in plain_end), default=0):
        plain_end = plain_end[:at]
    bare = _render_calls([{}], tokenizer).partition(PROBE_NAMES[0])[2].rstrip()
    pairs = Pairs(plain, plain_comma, plain_end, opening, ending)
    return Grammar(before, between, after_name, bare, pairs)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _render_calls(arguments: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    calls = list(map(tool_call, PROBE_NAMES, arguments))
    prompt = try_apply([USER], tokenizer, for_generation=True)
    text = try_apply([USER, {"role": "assistant", "tool_calls": calls}], tokenizer)
    turn = text[len(PARTIAL_TAG.sub("", prefix_of(prompt, text))) :]
    head, name, rest = turn.partition(PROBE_NAMES[0])
    return head.rpartition(template_of(tokenizer).block.closing)[2] + name + rest


def _split_arguments(text: str, arguments: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Splits rendered arguments into the texts before keys, between key and value, between pairs,
    and after the pairs.
    """
    pieces = [str(part) for pair in arguments.items() for part in pair]
    parts = re.split("({})".format("|".join(map(re.escape, pieces))), text)
    if parts[1::2][-4:] != pieces:
        return None, None, None, None
    before, equals, comma, _, after = parts[0::2][-5:]
    return before, equals, comma, after


def _json_at(text: str, arguments: dict[str, Any]) -> tuple[int, str] | None:
    """Returns the position at which the text contains the arguments as JSON, and the text after
    them.
    """
    for at in (i for i, character in enumerate(text) if character == "{"):
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError:
            continue
        if value == arguments:
            return at, text[end:]
    return None


def parse_calls(
    text: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] = ()
) -> list[dict[str, Any]]:
    """Returns the tool calls in a completion in OpenAI's format, with arguments as an object.

    Returns [] if the completion contains no call.

    Args:
        text: A completion, with or without its special tokens.
        tokenizer: The tokenizer whose chat template defines the syntax of calls.
        tools: The tools that the prompt offered. Some templates don't quote strings, so 7 and "7"
            look the same; if a tool declares an argument as a string, it remains a string.

    Raises:
        LorafoldError: If the template renders no calls, or renders them in an unknown syntax, or if
            arguments can't be parsed, or if a call begins and has another form.
    """
    grammar = grammar_of(tokenizer)
    if grammar is None:
        raise LorafoldError(
            "the chat template does not render tool calls (tool_calls) in a known syntax"
        )
    prompt = try_apply([USER], tokenizer, for_generation=True)
    text = text[template_of(tokenizer).block.end(text, prompt) :].rstrip()
    problem = None
    for syntax in (grammar, grammar.without(special_tokens(tokenizer))):
        try:
            calls = list(_parse_calls(text, syntax, tools))
        except LorafoldError as error:
            problem = problem or error
            continue
        if reason := find_unusable({"arguments": calls}):
            raise LorafoldError(reason)
        if calls:
            return calls
    if problem is not None:
        raise problem
    return []


def read_tools(path: Path) -> list[Tool]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise LorafoldError(f"{path}: not JSON: {error}") from error
    if problems := list(tool_problems(tools)):
        raise LorafoldError(f"{path}: {join_problems(problems)}")
    return list(tools)


def _parse_calls(text: str, grammar: Grammar, tools: Sequence[Tool]) -> Iterator[dict[str, Any]]:
    name_end, pairs = _regex(grammar.after_name), grammar.pairs
    if grammar.without_arguments.strip() and pairs is not None:
        name_end += f"|(?P<bare>{_regex(grammar.without_arguments)})"
    name_re = f"{NAME_PATTERN}(?:{name_end})"
    # if no text precedes a name, only the whole text can be a call
    begin = re.compile((_regex(grammar.before.lstrip()) or r"\A\s*") + name_re)
    further = re.compile(_regex(grammar.between) + name_re) if grammar.between else None
    opening = re.match(r"\s*(<[^<>\s]+>|\[\w+\])", grammar.before)
    at, match = 0, begin.search(text)
    while True:
        skipped = text[at : match.start() if match else None]
        if opening and opening[1] in skipped.removesuffix(opening[1]):  # it may end calls, too
            form = f"{grammar.before}NAME{grammar.after_name}"
            raise LorafoldError(f"found {opening[1]} without a call, expected {form!r}")
        if match is None:
            return
        name, at = match["name"], match.end()
        if pairs is None:
            try:
                arguments, at = json.JSONDecoder().raw_decode(text, at)
            except ValueError as error:  # also for thousands of digits
                why = f"arguments that are not JSON: {getattr(error, 'msg', error)}"
                raise LorafoldError(f"the call of {name} has {why}") from error
            if not isinstance(arguments, dict):
                raise LorafoldError(f"the call of {name} has arguments that are not a JSON object")
        elif match.groupdict().get("bare") is not None:
            arguments = {}
        else:
            arguments, at = _pairs(text, at, pairs, _argument_types(tools, name))
        yield tool_call(name, arguments)
        match = (further.match(text, at) if further else None) or begin.search(text, at)


def _pairs(text: str, at: int, pairs: Pairs, types: dict[str, str]) -> tuple[dict[str, Any], int]:
    arguments = {}
    opening, ending = map(re.escape, (pairs.opening, pairs.ending))
    key_re = re.compile(r"(.+?)" + _regex(pairs.equals), re.DOTALL)
    after = f"(?:(?P<more>{_regex(pairs.comma)})|{_regex(pairs.closing)}|\\Z)"
    after_re = re.compile(after)
    quoted_re = re.compile(rf"{opening}(?P<value>.*?){ending}{after}", re.DOTALL)
    while key := key_re.match(text, at):
        quoted = quoted_re.match(text, key.end()) if opening else None
        ends = [] if quoted else list(after_re.finditer(text, key.end()))
        values = (text[key.end() : end.start()] for end in ends)
        # a list or an object ends where its brackets are balanced
        whole = next((n for n, value in enumerate(values) if _is_balanced(value)), 0)
        match = quoted or (ends[whole] if ends else None)
        if match is None:
            break
        value = match["value"] if quoted else text[key.end() : match.start()]
        is_text = quoted is not None or types.get(key[1].strip()) == "string"
        arguments[key[1].strip()] = value if is_text else _parse_value(value, pairs)
        at = match.end()
        if match["more"] is None:
            break
    return arguments, at


def _is_balanced(value: str) -> bool:
    if not value.lstrip().startswith(("[", "{")):
        return True
    return all(value.count(a) == value.count(b) for a, b in ("[]", "{}"))


def _parse_value(text: str, pairs: Pairs) -> Any:
    plain = text
    for quote in filter(None, (pairs.opening, pairs.ending)):
        plain = plain.replace(quote, '"')
    after_name = re.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', plain)  # keys without quotes
    for read, source in ((json.loads, plain), (ast.literal_eval, text), (json.loads, after_name)):
        with suppress(ValueError, SyntaxError):
            return read(source)
    return text


def _argument_types(tools: Sequence[Tool], name: str) -> dict[str, str]:
    for tool in tools:
        function = tool.get("function", tool)
        if function["name"] == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: str(value.get("type")) for key, value in properties.items()}
    return {}


def _regex(literal: str) -> str:
    pattern = r"\s*".join(map(re.escape, re.split(r"\s+", literal)))
    return pattern.replace(re.escape(PROBE_NAMES[0]), "(?P=name)")
