"""The next turn of a conversation: what is asked for, as chat completions have it, what is asked of
the engine, and what the model says in it.

Chat completions, responses and messages are three ways to write the same turn down.

`shortened` drops the oldest exchanges of a conversation that is too long. The system message, the
last message of the user and the last exchange stay; an exchange is dropped as a whole.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field, ValidationError

from lorafold.data.messages import (
    REASONING,
    Message,
    Tool,
    call_problems,
    message_problems,
    normalized,
    tool_problems,
    tools_of,
)
from lorafold.serving.backend import Ended, Token
from lorafold.serving.completion_job import (
    DialectRequest,
    Part,
    PartReader,
    Prompted,
    Prompts,
    Reply,
)
from lorafold.serving.errors import check_number, unsupported, wrong
from lorafold.serving.rendering import Renderer, ServedModel
from lorafold.serving.request_body import Completing, Listed, new_id
from lorafold.serving.schema import check_founded, schema_of
from lorafold.serving.server import Server
from lorafold.serving.settings import Limits

FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "annotations", *REASONING}
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatBody(Completing):
    """The body of `POST /v1/chat/completions`."""

    messages: Listed[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    tools: Listed[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """Fields under the names by which the client sent them."""
        newer = self.max_completion_tokens is not None
        return {"max_tokens": "max_completion_tokens"} if newer else {}

    @property
    def variables(self) -> dict[str, Any]:
        """Further variables of the chat template, which has to know them."""
        verbosity = None if self.verbosity == "medium" else self.verbosity
        given = {"reasoning_effort": self.reasoning_effort, "verbosity": verbosity}
        found = {name: value for name, value in given.items() if value is not None}
        return found | self.chat_template_kwargs

    def conversation(self, limits: Limits) -> list[Message]:
        """The messages in one form."""
        check_number("messages", len(self.messages), limits.messages)
        _check(message_problems("messages", self.messages))
        for i, message in enumerate(self.messages):
            for name in message.keys() - FIELDS:
                if message[name] is not None:
                    raise unsupported(f"messages[{i}].{name[:80]}")
            if not isinstance(message.get("name") or "", str):
                told = f"found {message['name']!r:.80}, expected text"
                raise wrong(f"messages[{i}].name", told)
            if message["role"] not in ROLES:
                told = f"found {message['role'][:40]!r}, expected one of {', '.join(ROLES)}"
                raise wrong(f"messages[{i}].role", told)
        plain = [
            message | {"role": "system"} if message["role"] == "developer" else message
            for message in self.messages
        ]
        return normalized(plain)

    def offered(self, limits: Limits) -> tuple[Tool, ...]:
        """The tools, none where none may be called."""
        check_number("tools", len(self.tools), limits.tools)
        _check(tool_problems(self.tools))
        for i, tool in enumerate(self.tools):
            if tool.get("type", "function") != "function":
                raise wrong(f"tools[{i}].type", f"found {tool['type']!r}, expected function")
        if self.tool_choice == "none":
            return ()
        names = allowed[1] if (allowed := self._allowed()) else self._names()
        return tuple(one for one in tools_of(self.tools) if one["function"]["name"] in names)

    def forced(self) -> Sequence[str] | None:
        """The tools of which one has to be called; None if the model is free."""
        names, choice = self._names(), self.tool_choice
        if choice in ("auto", "none"):
            return None
        if (allowed := self._allowed()) is not None:
            return allowed[1] if allowed[0] == "required" else None
        if isinstance(choice, Mapping):
            return [self._named(choice)]
        if choice != "required" or not names:
            expected = "auto, none, required or a function" if names else "auto, without tools"
            raise wrong("tool_choice", f"found {choice!r}, expected {expected}")
        return names

    def _names(self) -> list[str]:
        return [tool.get("function", tool)["name"] for tool in self.tools]

    def _allowed(self) -> tuple[str, list[str]] | None:
        """The mode and the names of `allowed_tools`, in the form of chats or of responses."""
        choice = self.tool_choice
        if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
            return None
        inner = choice.get("allowed_tools", choice)
        given = inner.get("tools") if isinstance(inner, Mapping) else None
        if not isinstance(given, list) or inner.get("mode") not in ("auto", "required"):
            told = "found allowed_tools without tools or a mode, expected mode auto or required"
            raise wrong("tool_choice", told)
        if not given:
            raise wrong("tool_choice", "found no tools, expected those that are allowed")
        return str(inner["mode"]), [self._named(one) for one in given]

    def _named(self, choice: Any) -> str:
        """The tool that is named in OpenAI's form, flat or not. Raises Refusal for an unknown one.
        """
        function = choice.get("function", choice) if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if function is None or choice.get("type") != "function" or name not in self._names():
            raise wrong("tool_choice", f"found {name!r:.80}, expected the name of a tool")
        return str(name)


def _check(problems: Iterator[str]) -> None:
    """Raise Refusal for the first problem, if there is one."""
    for problem in problems:
        field, _, told = problem.removeprefix("field ").partition(": ")
        raise wrong(field, told)


def chat_of(
    given: Sequence[tuple[str, dict[str, Any]]],
    tools: Sequence[dict[str, Any]],
    names: Mapping[str, str],
    **asked: Any,
) -> tuple[ChatBody, dict[str, str]]:
    """What another dialect asks for, and the names that a chat's fields have there."""
    names = {
        **names,
        **{f"messages[{i}]": where for i, (where, _) in enumerate(given)},
        **{f"tools[{i}].function": f"tools[{i}]" for i in range(len(tools))},
    }
    try:
        return ChatBody(messages=[message for _, message in given], tools=[*tools], **asked), names
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        found = wrong(".".join(map(str, first["loc"])), first["msg"].lower())
        raise found.sent_as(names) from None


def call_of(
    id: Any, name: Any, arguments: Any, where: str, field: str = "arguments"
) -> dict[str, Any]:
    """A call in OpenAI's form."""
    function = {"name": name, "arguments": arguments}
    for problem in call_problems("calls", [function]):
        found, _, told = problem.removeprefix("field calls[0].").partition(": ")
        raise wrong(f"{where}.{field if found == 'arguments' else found}", told)
    return {"id": str(id), "type": "function", "function": function}


def text_of(parts: Sequence[Any], kinds: Collection[str], where: str, told: str) -> str:
    """Parts of text joined."""
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise wrong(where.format(i), told.format(f"{kind!r:.80}"))
    return "".join(part["text"] for part in parts)


def shortened(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """The messages without as many of the oldest ones as have to go; without all that may go, if
    that is not enough.
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


class NextTurn(DialectRequest):
    """One turn."""

    body: ChatBody

    def __init__(
        self,
        server: Server,
        body: ChatBody,
        field: str = "messages",
        wishes: Mapping[str, Any] | None = None,
        shorten: bool = False,
    ) -> None:
        newer = body.max_completion_tokens
        super().__init__(body, field, body.max_tokens if newer is None else newer)
        verbosity = {} if body.verbosity is None else {"verbosity": body.verbosity}
        self._wishes, self._shorten = {**verbosity, **(wishes or {})}, shorten
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

    def prompted(self, chosen: ServedModel) -> Prompted:
        renderer = chosen.renderer
        text, prompts = self.rendered(renderer)
        lark = self._grammar(renderer)
        sampling = self._sampling if lark is None else replace(self._sampling, lark=lark)
        # what it needs to know of the template is found out here, beside the event loop
        reader = PartReader(renderer.tokenizer, text, self.tools)
        return Prompted(chosen, text, prompts, sampling, reader)

    async def said(self, reply: Reply) -> AsyncIterator[Said]:
        """What is said, as it comes."""
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
            texts = dict(parts)
            for name, text in rest:
                texts[name] = texts.get(name, "") + text
            yield Said(i, list(texts.items()), "", None, event, self._called(calls))

    async def all_said(self, reply: Reply) -> list[AllSaid]:
        """All that is said in each completion."""
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
