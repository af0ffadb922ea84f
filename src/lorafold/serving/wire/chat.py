"""Chat completions: what is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from lorafold.serving.refusal import Refusal, wrong
from lorafold.serving.settings import Limits
from lorafold.serving.wire.body import Completing, Listed
from lorafold.serving.wire.schema import schema_of

FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "annotations", *REASONING}
ROLES = ("system", "developer", "user", "assistant", "tool")


class Chat(Completing):
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
    def max_new_tokens(self) -> int | None:
        """The most tokens of the completion, or None."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

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

    @property
    def wishes(self) -> dict[str, Any]:
        """Variables of the chat template that ask for nothing where it does not know them."""
        return {} if self.verbosity is None else {"verbosity": self.verbosity}

    def conversation(self, limits: Limits) -> list[Message]:
        """The messages in one form. Raises Refusal for what is wrong with them."""
        if len(self.messages) > limits.messages:
            told = f"found {len(self.messages)} of them, expected at most {limits.messages}"
            raise wrong("messages", told)
        if problem := next(message_problems("messages", self.messages), None):
            field, _, told = problem.removeprefix("field ").partition(": ")
            raise wrong(field, told)
        for i, message in enumerate(self.messages):
            for name in message.keys() - FIELDS:
                if message[name] is not None:
                    field = f"messages[{i}].{name[:80]}"
                    told = f"{field}: it is not supported"
                    raise Refusal(400, "unsupported_parameter", told, field)
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
        """The tools, none where none may be called. Raises Refusal for what is wrong with them."""
        if len(self.tools) > limits.tools:
            told = f"found {len(self.tools)} of them, expected at most {limits.tools}"
            raise wrong("tools", told)
        if problem := next(tool_problems(self.tools), None):
            field, _, told = problem.removeprefix("field ").partition(": ")
            raise wrong(field, told)
        for i, tool in enumerate(self.tools):
            if tool.get("type", "function") != "function":
                raise wrong(f"tools[{i}].type", f"found {tool['type']!r}, expected function")
        if self.tool_choice == "none":
            return ()
        allowed = self._allowed()
        return tuple(
            tool
            for tool in tools_of(self.tools)
            if allowed is None or tool["function"]["name"] in allowed[1]
        )

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

    def json_schema(self) -> str | None:
        """The JSON schema of the completion, None if it is free. Raises Refusal for a format that
        is not known.
        """
        return schema_of(self.response_format, "response_format")

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


def chat_of(asked: Mapping[str, Any], names: Mapping[str, str]) -> Chat:
    """What another dialect asks for. Raises Refusal under the names that its fields have there."""
    try:
        return Chat(**asked)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        found = wrong(".".join(map(str, first["loc"])), first["msg"].lower())
        raise found.sent_as(names) from None


def check_call(function: Mapping[str, Any], where: str, arguments: str = "arguments") -> None:
    """Raise Refusal for a call that is none.

    Args:
        function: its name and its arguments, in OpenAI's form.
        where: where it stands in the request.
        arguments: the name of the arguments there.
    """
    for problem in call_problems("calls", [function]):
        field, _, told = problem.removeprefix("field calls[0].").partition(": ")
        raise wrong(f"{where}.{arguments if field == 'arguments' else field}", told)
