"""Structured output: which tokens may follow, so that a completion fits a schema, regex or grammar.

    grammars = Grammars(tokenizer, vocabulary)
    allowed = grammars.start(Sampling(schema='{"type": "object"}'))
    mask_V = allowed([12, 7])               # after these tokens

The automata are those of llguidance (`pip install lorafold[serve]`), which reads the tokenizer once
and computes a mask in well under a millisecond. The end token is allowed where the text may end,
and nothing else is where it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.engine.request import Sampling
from lorafold.engine.sampler import Allowed, Unfit
from lorafold.errors import STOPS, LorafoldError, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Grammars:
    """The grammars of one tokenizer.

    Args:
        tokenizer: the model's, or None, with which there are no grammars.
        vocabulary: the number of tokens that the model knows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._read: Any = None

    def start(self, sampling: Sampling) -> Allowed | None:
        """A fresh state of the grammar that the settings ask for, None if they ask for none.

        Raises LorafoldError without llguidance, a fast tokenizer with an end token, or a grammar
        that can be read.
        """
        if sampling.grammar is None:
            return None
        name = sampling.grammar[0]
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise LorafoldError(
                f"{name}: found no llguidance, expected it; install lorafold[serve]"
            ) from None
        tokens = self._tokens(name)
        try:
            matcher = LLMatcher(tokens, guidance(sampling.grammar), log_level=0)
        except STOPS:
            raise
        except BaseException as error:  # a panic in a library is no Exception
            raise LorafoldError(f"{name}: it can't be read ({cut(str(error), 300)})") from None
        if matcher.is_error():
            raise LorafoldError(f"{name}: it can't be read ({_why(matcher)})")
        return _State(matcher, name)

    def ends(self, sampling: Sampling) -> frozenset[int]:
        """The token that ends a text of the grammar, if the settings ask for one."""
        end = None if self._tokenizer is None else self._tokenizer.eos_token_id
        return frozenset([end] if sampling.grammar and isinstance(end, int) else [])

    def _tokens(self, name: str) -> Any:
        if self._read is None:
            from llguidance.hf import from_tokenizer

            if self._tokenizer is None or self._tokenizer.eos_token_id is None:
                raise LorafoldError(f"{name}: found no tokenizer with an end token, expected one")
            try:
                known: Any = self._tokenizer
                self._read = from_tokenizer(known, n_vocab=self._vocabulary)
            except ValueError as error:
                raise LorafoldError(f"{name}: {error}") from None
        return self._read


def guidance(grammar: tuple[str, str]) -> str:
    """A setting and its text as llguidance has grammars, which nothing has read yet."""
    from llguidance import LLMatcher

    name, text = grammar
    if name == "schema":
        return str(LLMatcher.grammar_from_json_schema(text))
    return str(LLMatcher.grammar_from_regex(text) if name == "regex" else text)


class _State:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: Any, setting: str) -> None:
        self._matcher, self._setting, self._consumed = matcher, setting, 0

    def __call__(self, tokens: Sequence[int]) -> Tensor:  # (V,)
        try:
            for token in tokens[self._consumed :]:
                self._matcher.consume_token(token)
            self._consumed = len(tokens)
            mask = bytearray(self._matcher.compute_logit_bias())
        except STOPS:
            raise
        except BaseException as error:  # a panic in a library is no Exception
            raise Unfit(self._setting, str(error)) from None
        if self._matcher.is_error():
            raise Unfit(self._setting, _why(self._matcher))
        return torch.frombuffer(mask, dtype=torch.uint8) != 0


def _why(matcher: Any) -> str:
    """What is wrong with a grammar, without the dump of the parser's state."""
    told = str(matcher.get_error()).partition("<state>")[0]
    return cut(" ".join(told.split()), 300)
