"""The next turn of a conversation: what is asked of the engine, and what the model says in it.

Chat completions and responses are two ways to write the same turn down.

`shortened` drops the oldest exchanges of a conversation that is too long. The system message, the
last message of the user and the last exchange stay; an exchange is dropped as a whole.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lorafold.data.messages import Message
from lorafold.serving.backend import Ended, Token
from lorafold.serving.job import Asked, Part, PartReader, Prompted, Prompts, Reply
from lorafold.serving.refusal import wrong
from lorafold.serving.rendering import Chosen, Renderer
from lorafold.serving.server import Server
from lorafold.serving.wire.body import new_id
from lorafold.serving.wire.chat import Chat
from lorafold.serving.wire.schema import check_founded, schema_of


def shortened(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """The messages without as many of the oldest ones as have to go; without all that may go, if
    that is not enough.

    Args:
        fits: whether some of its messages, in their order, are few enough.
    """
    units = _units(messages)

    def without(n: int) -> list[Message]:
        gone = {i for unit in units[:n] for i in unit}
        return [message for i, message in enumerate(messages) if i not in gone]

    n = bisect_left(range(len(units)), True, key=lambda n: fits(without(n)))
    return without(n)


def _units(messages: list[Message]) -> list[list[int]]:
    """The positions of what may go together, the oldest first: a user's message and all that
    follows up to the next one; after the last one, a message of the assistant and its results.
    """
    roles = [message["role"] for message in messages]
    last = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    units: list[list[int]] = []
    for i, role in enumerate(roles):
        if role == "system":
            continue
        if not units or role == "user" or (i > last and role == "assistant"):
            units.append([])
        units[-1].append(i)
    return [unit for unit in units[:-1] if last not in unit]


@dataclass(frozen=True)
class Said:
    """What one event of the engine adds to a completion: parts of its text, and at its end the
    calls, in OpenAI's form. `where` is the field of the message in which the token is.
    """

    index: int
    parts: list[Part]
    where: str = ""
    token: Token | None = None
    end: Ended | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)


class AllSaid:
    """All that was said in a completion."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tokens: list[tuple[str, Token]] = []  # with the field in which each is
        self.calls: list[dict[str, Any]] = []
        self.end: Ended | None = None

    def take(self, said: Said) -> None:
        """Add what was said."""
        for name, text in said.parts:
            self.texts[name] = self.texts.get(name, "") + text
        if said.token is not None:
            self.tokens.append((said.where, said.token))
        self.end, self.calls = said.end, said.calls


class NextTurn(Asked):
    """One turn. Raises Refusal for a conversation that can't have one.

    Args:
        field: the field that has the messages.
        wishes: variables of the chat template, for one that knows them.
        shorten: whether the oldest messages may be left out.
    """

    body: Chat

    def __init__(
        self,
        server: Server,
        body: Chat,
        field: str = "messages",
        wishes: Mapping[str, Any] = MappingProxyType({}),
        shorten: bool = False,
    ) -> None:
        newer = body.max_completion_tokens
        super().__init__(body, field, body.max_tokens if newer is None else newer)
        self._wishes, self._shorten = {**body.wishes, **wishes}, shorten
        self._length, limits = server.host.backend.length, server.settings.limits
        self._compiles = server.admission.compiles
        server.admission.check(body)
        self.messages, self.tools = body.conversation(limits), body.offered(limits)
        self._schema = schema_of(body.response_format, "response_format")
        self._forced = body.forced()
        self._mixed = self._schema is not None and bool(self.tools)
        if body.top_logprobs is not None and not body.logprobs:
            raise wrong("top_logprobs", "found it without logprobs, expected logprobs true")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        free = self._forced is None and not self._mixed
        self._sampling = body.sampling(logprobs=logprobs, schema=self._schema if free else None)

    def rendered(self, renderer: Renderer) -> tuple[str, Prompts]:
        wishes = {k: v for k, v in self._wishes.items() if k in renderer.variables}
        variables = wishes | self.body.variables

        def render(messages: list[dict[str, Any]]) -> tuple[str, tuple[int, ...]]:
            text = renderer.chat(messages, self.tools, variables)
            return text, renderer.prompt_tokens(text)

        messages = self.messages
        if self._shorten:
            room = self._length - (self.max_new_tokens or self._length // 4)
            messages = shortened(messages, lambda some: len(render(some)[1]) <= room)
        text, tokens = render(messages)
        return text, (tokens,)

    def prompted(self, chosen: Chosen) -> Prompted:
        renderer = chosen.renderer
        text, prompts = self.rendered(renderer)
        lark = self._grammar(renderer)
        sampling = self._sampling if lark is None else replace(self._sampling, lark=lark)
        # what it needs to know of the template is found out here, beside the event loop
        reader = PartReader(renderer.tokenizer, text, self.tools)
        return Prompted(chosen, text, prompts, sampling, reader)

    async def said(self, reply: Reply) -> AsyncIterator[Said]:
        """What is said, as it comes. Raises Refusal for a completion that fails."""
        reader = reply.prompted.reader
        assert reader is not None
        readers = [copy(reader) for _ in reply.jobs]
        async for i, event in reply.events():
            if isinstance(event, Token):
                parts = readers[i].add(event.text)
                yield Said(i, parts, readers[i].field, event)
                continue
            parts = readers[i].add(event.text[readers[i].length :])
            rest, calls = await asyncio.to_thread(readers[i].finish)
            yield Said(i, joined([*parts, *rest]), "", None, event, self._called(calls))

    async def all_said(self, reply: Reply) -> list[AllSaid]:
        """All that is said in each completion. Raises Refusal for one that fails."""
        found = [AllSaid() for _ in reply.jobs]
        async for said in self.said(reply):
            found[said.index].take(said)
        return found

    def _grammar(self, renderer: Renderer) -> str | None:
        if self._forced is not None:
            return renderer.call_grammar(self.tools, self._forced, self._compiles)
        if not self._mixed:
            if self._schema is not None:
                check_founded(self._schema, "response_format")
            return None
        names = [tool["function"]["name"] for tool in self.tools]
        return renderer.call_grammar(self.tools, names, self._compiles, self._schema)

    def _called(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Calls as OpenAI has them, one if the request wants no more at a time."""
        functions = [call["function"] for call in calls]
        return [
            {
                "id": new_id("call"),
                "type": "function",
                "function": {
                    "name": function["name"],
                    "arguments": json.dumps(function["arguments"], ensure_ascii=False),
                },
            }
            for function in (functions if self.body.parallel_tool_calls else functions[:1])
        ]


def joined(parts: list[Part]) -> list[Part]:
    """The parts with each field once."""
    texts: dict[str, str] = {}
    for name, text in parts:
        texts[name] = texts.get(name, "") + text
    return list(texts.items())
