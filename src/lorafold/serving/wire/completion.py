"""Completions of plain prompts: what is asked for."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field

from lorafold.serving.refusal import wrong
from lorafold.serving.wire.body import Body, Completing, Listed

Ids = Listed[int]


class Completion(Completing):
    """The body of `POST /v1/completions`."""

    prompt: str | Ids | Listed[str] | Listed[Ids]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    def prompts(self, most: int) -> list[str | Ids]:
        """The prompts, each a text or tokens. Raises Refusal for more than there may be."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given or isinstance(given[0], int):
            return [cast(Ids, given)]
        if len(given) > most:
            raise wrong("prompt", f"found {len(given)} of them, expected at most {most}")
        return [*cast(list[str] | list[Ids], given)]


class Tokenize(Body):
    """The body of `POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Listed[dict[str, object]] | None = None
    tools: Listed[dict[str, object]] = Field(default_factory=list)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(Body):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[Ids, Field(max_length=1 << 16)]  # a text that one call makes at once
