"""Chat completions: what is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from lorafold.serving.refusal import check_number, unsupported, wrong
from lorafold.serving.settings import Limits
from lorafold.serving.wire.body import Completing, Listed

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
        """The tools, none where none may be called. Raises Refusal for what is wrong with them."""
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
) -> tuple[Chat, dict[str, str]]:
    """What another dialect asks for, and the names that a chat's fields have there. Raises Refusal
    under these.

    Args:
        given: the messages, each with the field that it comes from.
        asked: all other fields.
    """
    names = {
        **names,
        **{f"messages[{i}]": where for i, (where, _) in enumerate(given)},
        **{f"tools[{i}].function": f"tools[{i}]" for i in range(len(tools))},
    }
    try:
        return Chat(messages=[message for _, message in given], tools=[*tools], **asked), names
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
