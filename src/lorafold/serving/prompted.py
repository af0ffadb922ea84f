"""A request for completions between a dialect of the API and the engine.

    prompted = asked.prompted(registry.choose(caller, asked.body.model))
    reply.prompted                      the same, for those that write the answer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from lorafold.serving.backend import Sampling
from lorafold.serving.parts import PartReader
from lorafold.serving.rendering import Chosen, Renderer
from lorafold.serving.wire.body import Completing

Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Prompted:
    """What the engine is asked for, once it is known under which adapter.

    chosen: What it runs under.
    text: The prompt in words, or all of them, for the log.
    prompts: The tokens of each prompt.
    sampling: The settings of all completions, but for the seed.
    reader: Tells the parts of a completion apart; each has a copy. None for plain text.
    prompt_logprobs: How many of the most likely tokens are listed beside each token of the prompts,
        None for no log probabilities of those.
    """

    chosen: Chosen
    text: object
    prompts: Prompts
    sampling: Sampling
    reader: PartReader | None = None
    prompt_logprobs: int | None = None


class Asked(ABC):
    """Abstract: one request, whatever its dialect.

    Args:
        field: the field with the prompts.
        max_new_tokens: the most tokens of a completion (None: what is left of the length).
    """

    def __init__(self, body: Completing, field: str, max_new_tokens: int | None) -> None:
        self.body, self.field, self.max_new_tokens = body, field, max_new_tokens

    @abstractmethod
    def rendered(self, renderer: Renderer) -> tuple[object, Prompts]:
        """The prompts in words and in tokens. It may take its time. Raises Refusal."""

    @abstractmethod
    def prompted(self, chosen: Chosen) -> Prompted:
        """What the engine is asked for. It may take its time. Raises Refusal."""
