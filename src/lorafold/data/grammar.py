"""How a chat template writes calls, read off its rendering of probe calls.

    <tool_call>\\n{"name": "       the text before a name
    ", "arguments": {...}         between the name and the arguments, which are JSON
    city: <|"|>Rome<|"|>,         or they are keys and values, with what stands between and around

Two probe calls in one turn show what stands between calls; numbers beside texts show the quotes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lorafold.data.messages import Message
from lorafold.data.reasoning import block_of
from lorafold.data.template_forms import ASKED, KNOWN, attempt, call, common, form_of, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("probe_first", "probe_second")
KEYS = ("probe_key", "probe_other")
TEXTS = ("probe value", "probe text")
NUMBERS = (7131, 8242)


@dataclass(frozen=True)
class Pairs:
    """Arguments as keys and values: what stands between a key and its value, between a value and
    the next key, what closes a call, and the quotes of a text.
    """

    equals: str
    comma: str
    closing: str
    quotes: tuple[str, str]


@dataclass(frozen=True)
class Grammar:
    """The text before the first name, between two calls up to the second name (None if a turn has
    one call at most), after a name up to the arguments, after the name of a call without arguments,
    and the arguments as pairs, or None for JSON, which `closing` follows. NAMES[0] stands for a
    name that is repeated.
    """

    before: str
    between: str | None
    named: str
    bare: str
    pairs: Pairs | None
    closing: str = ""

    def without(self, words: Sequence[str]) -> "Grammar":
        """The same where these words are left out of texts, as special tokens are."""

        def bare(text: str) -> str:
            for word in words:
                text = text.replace(word, "")
            return text

        pairs = self.pairs and Pairs(
            bare(self.pairs.equals),
            bare(self.pairs.comma),
            bare(self.pairs.closing),
            (bare(self.pairs.quotes[0]), bare(self.pairs.quotes[1])),
        )
        between = None if self.between is None else bare(self.between)
        return Grammar(
            bare(self.before), between, bare(self.named), bare(self.bare), pairs, bare(self.closing)
        )


def grammar_of(tokenizer: "PreTrainedTokenizerBase") -> Grammar | None:
    """How the tokenizer's chat template writes calls; None if it writes none."""
    return _grammar_of(template_of(tokenizer), tokenizer)


@lru_cache(maxsize=KNOWN)
def _grammar_of(template: str, tokenizer: "PreTrainedTokenizerBase") -> Grammar | None:
    texts, numbers = dict(zip(KEYS, TEXTS, strict=True)), dict(zip(KEYS, NUMBERS, strict=True))
    one, two = _said([texts], tokenizer), _said([texts, texts], tokenizer)
    before, found, rest = one.partition(NAMES[0])
    if not found:
        return None
    between = None
    end = _after(one, KEYS, TEXTS)[-1]
    if NAMES[1] in two and end is not None:
        head, _, tail = two.partition(NAMES[1])
        between = _json_end(head, texts) or str(_after(head, KEYS, TEXTS)[-1])
        end = str(_after(tail, KEYS, TEXTS)[-1]) if _json_end(rest, texts) is None else end
    bare = _said([{}], tokenizer).partition(NAMES[0])[2]
    if (after := _json_start(rest, texts)) is not None:
        follows = _json_end(rest, texts) or ""
        ends = [follows.find(word) for word in special_words(tokenizer) if word in follows]
        alone = follows[: min(ends, default=len(follows))]
        closes = (alone if between is None else common(follows, between)).rstrip()
        return Grammar(before, between, rest[:after], "", None, closes)
    named, equals, comma, closing = _after(rest, KEYS, TEXTS)
    _, plain, plain_comma, plain_end = _after(
        _said([numbers], tokenizer).partition(NAMES[0])[2], KEYS, NUMBERS
    )
    if named is None or equals is None or comma is None or plain is None or closing is None:
        return None
    opening = equals[len(plain) :] if equals.startswith(plain) else ""
    ending = comma[: len(comma) - len(plain_comma or "")] if opening else ""
    plain_close = plain_end or ""
    if between is not None:
        two_numbers = _said([numbers, numbers], tokenizer).partition(NAMES[1])[0]
        shared = common(str(_after(two_numbers, KEYS, NUMBERS)[-1]), plain_close)
        plain_close = re.sub(r"<[^<>]*\Z", "", shared).rstrip()  # half a tag is no closing
    else:
        words = (word for word in special_words(tokenizer) if word in plain_close)
        at = min(map(plain_close.find, words), default=0)
        plain_close = plain_close[:at] if at else plain_close
    between = None if between is None else between.removeprefix(ending).removeprefix(plain_close)
    return Grammar(
        before, between, named, bare.rstrip(),
        Pairs(plain, plain_comma or "", plain_close, (opening, ending)),
    )  # fmt: skip


def special_words(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The special tokens, which are left out of completions."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _said(arguments: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the template adds to a generation prompt for a turn of calls with these arguments."""
    calls = [call(name, given) for name, given in zip(NAMES, arguments, strict=False)]
    turn: Message = {"role": "assistant", "tool_calls": calls}
    form = form_of(tokenizer)
    prompt = attempt(form.of([ASKED]), tokenizer, for_generation=True)
    text = attempt(form.of([ASKED, turn]), tokenizer)
    said = text[len(common(prompt, text)) :]
    return said[block_of(tokenizer).end(said, prompt) :]


def _after(
    text: str, keys: Sequence[str], values: Sequence[Any]
) -> tuple[str | None, str | None, str | None, str | None]:
    """What stands before the first key, between it and its value, between that and the next key,
    and after the last value; None for what is not found.
    """
    parts = re.split(
        "({})".format("|".join(re.escape(str(part)) for part in (*keys, *values))), text
    )
    wanted = [str(keys[0]), str(values[0]), str(keys[1]), str(values[1])]
    if parts[1::2][-4:] != wanted:
        return None, None, None, None
    before, equals, comma, _, after = parts[0::2][-5:]
    return before, equals, comma, after


def _json_start(text: str, wanted: dict[str, Any]) -> int | None:
    """Where the wanted JSON object begins, or None."""
    decoder = json.JSONDecoder()
    for at in (i for i, character in enumerate(text) if character == "{"):
        try:
            if decoder.raw_decode(text, at)[0] == wanted:
                return at
        except json.JSONDecodeError:
            continue
    return None


def _json_end(text: str, wanted: dict[str, Any]) -> str | None:
    """What follows the wanted JSON object, or None without one."""
    at = _json_start(text, wanted)
    return None if at is None else text[json.JSONDecoder().raw_decode(text, at)[1] :]
