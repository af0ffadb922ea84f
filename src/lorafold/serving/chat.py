"""Requests for the next turn of a conversation, for the chat, responses and messages APIs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, ValidationError

from lorafold.data.messages import (
    REASONING,
    Message,
    Tool,
    call_problems,
    message_problems,
    normalize,
    openai_tools,
    tool_problems,
)
from lorafold.serving.backend import Ended, Token
from lorafold.serving.completion_job import DialectRequest, PartReader, Prompts, Reply, Resolved
from lorafold.serving.refusals import check_count, client_names, invalid, unsupported_field
from lorafold.serving.rendering import Renderer, ServedModel
from lorafold.serving.request_body import Body, Generation, ListOf, new_id
from lorafold.serving.schema import check_recursion, schema_of
from lorafold.serving.server import Server
from lorafold.serving.settings import Limits

FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "annotations", *REASONING}
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatBody(Generation):
    """The body of `POST /v1/chat/completions`."""

    messages: ListOf[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    tools: ListOf[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """The client's names of fields that have other names in lorafold."""
        newer = self.max_completion_tokens is not None
        return {"max_tokens": "max_completion_tokens"} if newer else {}

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for the chat template, which must support them."""
        verbosity = None if self.verbosity == "medium" else self.verbosity
        named = {"reasoning_effort": self.reasoning_effort, "verbosity": verbosity}
        return {k: v for k, v in named.items() if v is not None} | self.chat_template_kwargs

    def conversation(self, limits: Limits) -> list[Message]:
        check_count("messages", len(self.messages), limits.messages)
        _check(message_problems("messages", self.messages))
        for i, message in enumerate(self.messages):
            role, name = message["role"], message.get("name") or ""
            for unknown in message.keys() - FIELDS:
                if message[unknown] is not None:
                    raise unsupported_field(f"messages[{i}].{unknown[:80]}")
            if not isinstance(name, str):
                raise invalid(f"messages[{i}].name", f"found {name!r:.80}, expected a string")
            if role not in ROLES:
                expected = f"expected one of {', '.join(ROLES)}"
                raise invalid(f"messages[{i}].role", f"found {role[:40]!r}, {expected}")
        return normalize(
            [m | {"role": "system"} if m["role"] == "developer" else m for m in self.messages]
        )

    def offered_tools(self, limits: Limits) -> tuple[tuple[Tool, ...], list[str] | None]:
        """Returns the allowed tools, and the names of the tools of which one must be called, or
        None.
        """
        check_count("tools", len(self.tools), limits.tools)
        _check(tool_problems(self.tools))
        for i, tool in enumerate(self.tools):
            if tool.get("type", "function") != "function":
                raise invalid(f"tools[{i}].type", f"found {tool['type']!r}, expected function")
        tools = openai_tools(self.tools)
        allowed, forced = self._tool_choice([tool["function"]["name"] for tool in tools])
        return tuple(tool for tool in tools if tool["function"]["name"] in allowed), forced

    def _tool_choice(self, names: list[str]) -> tuple[list[str], list[str] | None]:
        choice = self.tool_choice
        if choice in ("auto", "none"):
            return (names if choice == "auto" else []), None
        if choice == "required" and names:
            return names, names
        if not isinstance(choice, Mapping):
            expected = "auto, none, required or an object" if names else "auto, as tools is empty"
            raise invalid("tool_choice", f"found {choice!r}, expected {expected}")
        if choice.get("type") != "allowed_tools":
            return names, [_tool_name(choice, names)]
        inner = choice.get("allowed_tools", choice)  # the responses API has no nested object
        tools = inner.get("tools") if isinstance(inner, Mapping) else None
        if not isinstance(tools, list) or inner.get("mode") not in ("auto", "required"):
            message = "expected allowed_tools with a list of tools and the mode auto or required"
            raise invalid("tool_choice", message)
        if not tools:
            raise invalid("tool_choice", "found an empty list of tools, expected at least one")
        allowed = [_tool_name(tool, names) for tool in tools]
        return allowed, allowed if inner["mode"] == "required" else None


def _tool_name(choice: Any, names: Collection[str]) -> str:
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if function is None or choice.get("type") != "function" or name not in names:
        raise invalid("tool_choice", f"found {name!r:.80}, expected the name of a tool")
    return str(name)


def _check(problems: Iterator[str]) -> None:
    for problem in problems:
        field, _, message = problem.removeprefix("field ").partition(": ")
        raise invalid(field, message)


def as_chat(
    body: Body,
    messages: Sequence[tuple[str, dict[str, Any]]],
    tools: Sequence[dict[str, Any]],
    names: Mapping[str, str],
    **fields: Any,
) -> tuple[ChatBody, dict[str, str]]:
    """Converts a request of another API to a chat completion. Each message comes with its field,
    for error messages. Also returns the other API's names of fields.
    """
    chat = {name: getattr(body, name) for name in ChatBody.model_fields if hasattr(body, name)}
    for name, with_client_names in names.items():
        outer, _, key = with_client_names.partition(".")
        value = getattr(body, outer, None)
        chat[name] = (value or {}).get(key) if key else value
    chat["response_format"] = chat.get("response_format") or None
    chat |= fields | {"messages": [message for _, message in messages], "tools": [*tools]}
    names = {
        **names,
        **{f"messages[{i}]": where for i, (where, _) in enumerate(messages)},
        **{f"tools[{i}].function": f"tools[{i}]" for i in range(len(tools))},
    }
    try:
        return ChatBody(**{name: value for name, value in chat.items() if value is not None}), names
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        refusal = invalid(".".join(map(str, first["loc"])), first["msg"].lower())
        raise refusal.with_client_names(names) from None


def as_call(
    id: Any, name: Any, arguments: Any, where: str, field: str = "arguments"
) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    for problem in call_problems("calls", [function]):
        wrong_field, _, message = problem.removeprefix("field calls[0].").partition(": ")
        raise invalid(f"{where}.{field if wrong_field == 'arguments' else wrong_field}", message)
    return {"id": str(id), "type": "function", "function": function}


def join_text(parts: Sequence[Any], kinds: Collection[str], where: str, message: str) -> str:
    """Joins the texts of text parts. Raises for other parts; `{}` stands for the index in `where`,
    and for the type in `message`.
    """
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise invalid(where.format(i), message.format(f"{kind!r:.80}"))
    return "".join(part["text"] for part in parts)


def drop_oldest(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """Drops as few of the oldest exchanges as necessary to make the rest fit."""
    units = _units(messages)

    def without(n: int) -> list[Message]:
        dropped = {i for unit in units[:n] for i in unit}
        return [message for i, message in enumerate(messages) if i not in dropped]

    return without(bisect_left(range(len(units)), True, key=lambda n: fits(without(n))))


def _units(messages: list[Message]) -> list[list[int]]:
    """Groups the indices of messages that must be dropped together, the oldest first. A group is a
    user message and its replies or, after the last user message, an assistant message and its tool
    results.
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
class MessageDelta:
    """The text that one event adds, by field of the message. The last delta also contains the tool
    calls in OpenAI's format. `field` is the field to which the token belongs.
    """

    index: int
    texts: dict[str, str]
    field: str = ""
    token: Token | None = None
    end: Ended | None = None
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class GeneratedMessage:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tokens: list[tuple[str, Token]] = []  # (field, token)
        self.calls: list[dict[str, Any]] = []
        self.end: Ended

    def add(self, delta: MessageDelta) -> None:
        for field, text in delta.texts.items():
            self.texts[field] = self.texts.get(field, "") + text
        if delta.token is not None:
            self.tokens.append((delta.field, delta.token))
        if delta.end is not None:
            self.end, self.calls = delta.end, delta.calls


class NextTurn(DialectRequest):
    """A request for the next turn of a conversation. `names` are the API's names of fields.
    `wishes` are variables for the chat template that are dropped if it doesn't support them.
    `shorten` allows dropping the oldest messages.
    """

    body: ChatBody

    def __init__(
        self,
        server: Server,
        body: ChatBody,
        names: Mapping[str, str] | None = None,
        field: str = "messages",
        wishes: Mapping[str, Any] | None = None,
        shorten: bool = False,
    ) -> None:
        newer, names = body.max_completion_tokens, body.names if names is None else names
        if newer is not None and body.max_tokens not in (None, newer):
            raise invalid("max_tokens", "differs from max_completion_tokens; set only one of them")
        super().__init__(body, names, field, body.max_tokens if newer is None else newer)
        verbosity = {} if body.verbosity is None else {"verbosity": body.verbosity}
        self._optional_variables, self._shorten = {**verbosity, **(wishes or {})}, shorten
        self._length, limits = server.host.backend.length, server.settings.limits
        self._check_grammar = server.admission.check_grammar
        with client_names(names):
            server.admission.check(body)
            self.messages = body.conversation(limits)
            self.tools, self._forced = body.offered_tools(limits)
            self._schema = schema_of(body.response_format, "response_format")
            if body.top_logprobs is not None and not body.logprobs:
                raise invalid("top_logprobs", "this field requires logprobs: true")
            # with tools, the schema is part of the tools' grammar
            self._sampling = body.sampling(
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                schema=self._schema if self._forced is None and not self.tools else None,
            )

    def render_prompts(self, renderer: Renderer) -> tuple[str, Prompts]:
        wishes = {k: v for k, v in self._optional_variables.items() if k in renderer.variables}

        def render(messages: list[dict[str, Any]]) -> tuple[str, tuple[int, ...]]:
            text = renderer.chat(messages, self.tools, wishes | self.body.variables)
            return text, renderer.prompt_tokens(text)

        messages = self.messages
        if self._shorten:
            room = self._length - (self.max_new_tokens or self._length // 4)
            messages = drop_oldest(messages, lambda rest: len(render(rest)[1]) <= room)
        text, tokens = render(messages)
        return text, (tokens,)

    def resolve(self, chosen: ServedModel) -> Resolved:
        renderer = chosen.renderer
        text, prompts = self.render_prompts(renderer)
        lark = self._grammar(renderer)
        sampling = self._sampling if lark is None else replace(self._sampling, lark=lark)
        # here, because analysing the template would block the event loop
        reader = PartReader(renderer.tokenizer, text, self.tools)
        return Resolved(chosen, text, prompts, sampling, reader)

    async def deltas(self, reply: Reply) -> AsyncIterator[MessageDelta]:
        readers = [copy(reply.resolved.reader) for _ in reply.jobs]
        async for i, event in reply.events():
            if isinstance(event, Token):
                texts = dict(readers[i].add(event.text))
                yield MessageDelta(i, texts, readers[i].field, event)
                continue
            texts = dict(readers[i].add(event.text[readers[i].length :]))
            rest, calls = await asyncio.to_thread(readers[i].finish)
            for field, text in rest:
                texts[field] = texts.get(field, "") + text
            yield MessageDelta(i, texts, end=event, calls=self._calls(calls))

    async def collect_messages(self, reply: Reply) -> list[GeneratedMessage]:
        messages = [GeneratedMessage() for _ in reply.jobs]
        async for delta in self.deltas(reply):
            messages[delta.index].add(delta)
        return messages

    def _grammar(self, renderer: Renderer) -> str | None:
        if self._forced is None and (self._schema is None or not self.tools):
            if self._schema is not None:
                check_recursion(self._schema, "response_format")
            return None
        names, schema = self._forced, None
        if names is None:
            names, schema = [tool["function"]["name"] for tool in self.tools], self._schema
        return renderer.call_grammar(self.tools, names, self._check_grammar, schema)

    def _calls(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
