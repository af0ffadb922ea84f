"""Environments: the policy's conversation with Python code, which also gives the reward.

    class Game:                         one instance per rollout
        def reset(self, row): ...       the first messages, or None for the row's prompt
        def step(self, text): ...       what the model sees next, or None at the end
        def reward(self): ...           a number, a dict of numbers, or None

    def rollout(policy, row): ...       calls policy.chat(messages) and returns the reward

A method receives the values that its parameters name: `row`, `seed`, `messages` (the row's prompt)
or a field of the row in `reset`; `text`, `calls` and `ended` ("stop", or "length" if the turn was
cut off, which ends the rollout) in `step`. What it returns is a message's text, or messages.
`tools` of a class are functions that the model may call; a class without `step` offers its public
methods. All of this may be asynchronous.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import inspect
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple

from lorafold.errors import truncate
from lorafold.rewards.functions import (
    MAX_LEN,
    Calls,
    EventLoop,
    Problem,
    error_text,
    load_module,
    load_object,
    number,
    shown,
)

Message = dict[str, Any]
NOUN = "environment"  # the name of its reward, unless it returns several
HOOKS = {"reset", "step", "reward", "tools"}
LOOPBACK = "127.0.0.1"
# fields of a request to the endpoint: those that are read or change nothing, and the values that
# others may have, because the policy samples from its own distribution
FIELDS = {
    "model", "messages", "tools", "max_tokens", "max_completion_tokens", "seed", "user", "metadata",
    "store", "parallel_tool_calls",
}  # fmt: skip
VALUES = {
    "n": 1, "stream": False, "top_p": 1, "tool_choice": "auto", "logprobs": False,
    "presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"},
}  # fmt: skip


class PolicyError(Problem):
    """A call of the policy that it can't answer."""


class RolloutOver(PolicyError):
    """The rollout can't have another turn."""


class PolicyReply(Message):
    """The policy's message. `ended` is "stop" or, if it was cut off, "length"; `problem` describes
    tool calls that could not be parsed.
    """

    ended, problem = "stop", ""


class EnvironmentInput(NamedTuple):
    """The input of a rollout's environment: its start, or the response to its last request."""

    where: str
    rollout: int
    values: Mapping[str, Any]

    @property
    def content(self) -> tuple[Any, ...]:
        return tuple(self)


Environment = Callable[[Sequence[EnvironmentInput]], list[Any]]


def single_turn(items: Sequence[EnvironmentInput]) -> list[dict[str, Any]]:
    """The environment of a single turn, which has the row's prompt and no reward."""
    return [
        {"messages": values["messages"], "tools": [], "max_tokens": None}
        if "row" in values
        else {"reward": {}}
        for _, _, values in items
    ]


class RolloutPolicy:
    """The model in one rollout. A rollout is one conversation: each call continues the previous
    one, whose messages and reply it repeats.

    Attributes:
        messages: the row's prompt.
        seed: an integer that is the same for all rollouts of a prompt in a step.
        temperature: the temperature of sampling.
        url: the base URL of an OpenAI endpoint for this rollout, on this machine only.
    """

    def __init__(self, start: Mapping[str, Any], url: Callable[[], str]) -> None:
        self.messages, self.seed = start["messages"], start["seed"]
        self.temperature = start["temperature"]
        self.requests = SimpleQueue[Any]()  # the last is its reward or a Problem
        self.is_over, self._url = False, url
        self._future: Future[PolicyReply] | None = None

    @property
    def url(self) -> str:
        return self._url()

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), max_tokens: int | None = None
    ) -> PolicyReply:
        """The model's next message. Tools are functions or their schemas. Raises PolicyError, or
        RolloutOver if there can't be another turn.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._request(messages, tools, max_tokens).result()
        raise PolicyError("chat: called in a coroutine, expected await policy.achat(...)")

    async def achat(self, *args: Any, **kwargs: Any) -> PolicyReply:
        """`chat` in a coroutine."""
        return await asyncio.wrap_future(self._request(*args, **kwargs))

    def _request(
        self, messages: Any, tools: Sequence[Any] = (), max_tokens: Any = None
    ) -> Future[PolicyReply]:
        schemas = [tool if isinstance(tool, dict) else schema_of(tool) for tool in tools]
        if not (max_tokens is None or (isinstance(max_tokens, int) and max_tokens > 0)):
            raise PolicyError(f"max_tokens: found {max_tokens!r}, expected an integer above 0")
        request = {"messages": messages, "tools": schemas, "max_tokens": max_tokens}
        try:
            request = json.loads(json.dumps(request))  # a copy
        except (TypeError, ValueError) as error:
            raise PolicyError(f"messages: found a value that is not JSON: {error}") from None
        if self.is_over:
            raise RolloutOver("the rollout has ended")
        if self._future is not None:
            raise PolicyError("chat: called during another call, expected one after the other")
        self._future = future = Future[PolicyReply]()
        self.requests.put(request)
        return future

    def respond(self, values: Mapping[str, Any]) -> None:
        future, self._future = self._future, None
        if future is None or not future.set_running_or_notify_cancel():  # as wait_for cancels it
            return
        if "message" in values:
            reply = PolicyReply(values["message"])
            reply.ended, reply.problem = values["ended"], values["problem"]
            return future.set_result(reply)
        self.is_over = "over" in values
        future.set_exception(
            RolloutOver(values["over"]) if self.is_over else PolicyError(values["error"])
        )

    def end(self, file: str | None, outcome: Callable[[], Any]) -> None:
        """Reports the reward that a rollout returns, or its error."""
        result: Any = {"reward": {}}
        try:
            reward = outcome()
            parts = reward if isinstance(reward, Mapping) else {NOUN: reward}
            result = {"reward": {str(name): number(x, None) for name, x in parts.items()}}
        except RolloutOver:
            pass
        except Problem as problem:
            result = problem
        except BaseException as error:  # includes exits
            if not self.is_over:
                result = Problem(f"raised {error_text(error, file)}")
        self.is_over = True
        self.requests.put(result)


class Environments:
    """The rollouts of an environment. Those of a function that is not asynchronous run in turn, in
    threads of their own; all others run on one event loop.
    """

    batched = asynchronous = False  # for the time limit: each call has its own
    item = EnvironmentInput

    def __init__(self, rollout: Callable[..., Any], file: str | None = None) -> None:
        self._rollout, self._file = rollout, file
        self._concurrent = inspect.iscoroutinefunction(rollout)
        self._policies, self._loop = dict[int, RolloutPolicy](), EventLoop()

    @classmethod
    def of(cls, given: Any, file: str | None = None) -> Environments:
        """The environment of a class, of a rollout function, or of a list of tools."""
        if isinstance(given, list | tuple):
            if not given:
                raise Problem("tools: found none, expected at least one function")
            for tool in _by_name(given).values():
                schema_of(tool)
            return cls(partial(_episode, partial(SimpleNamespace, tools=given)), file)
        if inspect.isclass(given):
            return cls(partial(_episode, given), file)
        try:
            inspect.signature(given).bind(None, None)
        except (TypeError, ValueError):
            raise Problem(f"found {shown(given)}, expected a class or fn(policy, row)") from None
        return cls(given, file)

    def rewards(self, items: Sequence[EnvironmentInput], calls: Calls) -> Iterator[list[Any]]:
        """Yields the next request of each rollout, or its reward, in the order of the items."""
        if self._concurrent:
            for item in items:
                self._resume(item)
        for at, item in enumerate(items):
            if not self._concurrent:
                self._resume(item)
            request = self._policies[item.rollout].requests.get()
            if isinstance(request, Problem):
                raise Problem(request.message, at)
            yield [request]

    def close(self) -> None:
        """Ends all rollouts."""
        for policy in self._policies.values():
            policy.respond({"over": "the run has ended"})
        self._loop.close()
        if (server := self.__dict__.pop("_server", None)) is not None:
            server.shutdown()
            server.server_close()

    def _resume(self, item: EnvironmentInput) -> None:
        _, rollout, values = item
        if "row" not in values:
            return self._policies[rollout].respond(values)
        policy = RolloutPolicy(values, lambda: f"{self._server.url}/{rollout}/v1")
        self._policies[rollout], row = policy, values["row"]
        end = partial(policy.end, self._file)
        if self._concurrent:
            future = self._loop.start(self._rollout(policy, row))
            future.add_done_callback(lambda done: end(done.result))
        else:
            Thread(target=end, args=[partial(self._rollout, policy, row)], daemon=True).start()

    @cached_property
    def _server(self) -> _Server:
        server = _Server(self._policies)
        Thread(target=server.serve_forever, daemon=True).start()
        return server


def environment_in_file(text: str) -> Environments:
    """The class or rollout function with the name `/path/FILE.py:NAME`."""
    found, file = load_object(text)
    return Environments.of(found, file)


def tools_in_file(text: str) -> Environments:
    """The public functions of a Python file as tools."""
    module, file = load_module(Path(text)), Path(text)
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names = [x.name for x in body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]
    return Environments.of([vars(module)[name] for name in names if name[0] != "_"], text)


def schema_of(tool: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, from its type hints and its docstring in Google's style."""
    from transformers.utils import get_json_schema

    try:
        schema = dict(get_json_schema(tool))
        # calls pass arguments by name
        inspect.signature(tool).bind(**schema["function"]["parameters"]["properties"])
        return schema
    except Exception as error:  # of several types, also of the function's type hints
        reason = truncate(" ".join(str(error).split()), MAX_LEN)
        name = getattr(tool, "__name__", type(tool).__name__)
        raise Problem(f"tool {name}: {reason}") from None


def _by_name(tools: Sequence[Any]) -> dict[str, Any]:
    names = [getattr(tool, "__name__", str(tool)) for tool in tools]
    functions = dict(zip(names, tools, strict=True))
    if len(functions) < len(names):
        raise Problem(f"tools: found {', '.join(names)}, expected each name once")
    return functions


async def _episode(create: Callable[[], Any], policy: RolloutPolicy, row: Mapping[str, Any]) -> Any:
    environment = create()
    tools, step = getattr(environment, "tools", ()), getattr(environment, "step", None)
    if not (tools or step):
        methods = inspect.getmembers(environment, inspect.ismethod)
        tools = [method for name, method in methods if name[0] != "_" and name not in HOOKS]
        if not tools:
            raise Problem("found neither step nor tools, expected one of them")
    functions = _by_name(tools)
    known = {"row": row, "seed": policy.seed, "messages": policy.messages}
    given = await _call(getattr(environment, "reset", lambda: None), dict(row), known)
    messages = policy.messages if given is None else _messages(given, "user")
    while True:
        try:
            reply = await policy.achat(messages, tools)
        except RolloutOver:
            break
        calls, seen, is_cut = reply.get("tool_calls", ()), None, reply.ended == "length"
        if functions and (calls or reply.problem) and not is_cut:
            seen = [await _result(functions, call) for call in calls]
            if reply.problem:
                seen = [{"role": "tool", "content": f"error: {reply.problem}"}]
        elif step is not None:
            turn = {"text": reply["content"], "calls": calls, "ended": reply.ended}
            seen = await _call(step, {}, turn)
        seen = None if seen is None else _messages(seen, "tool" if calls else "user")
        if seen is None or is_cut:
            break
        messages = [*messages, reply, *seen]
    return await _call(getattr(environment, "reward", lambda: None), {}, {})


async def _call(function: Any, fields: dict[str, Any], known: dict[str, Any]) -> Any:
    """Calls a method with the values that its parameters name; `**` takes all fields of the row."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    values = fields | known
    if missing := [p.name for p in named if p.default is p.empty and p.name not in values]:
        raise Problem(
            f"{function.__name__}: found the parameter {missing[0]}, expected only"
            f" {', '.join(values) or 'none'}"
        )
    passed = {p.name: values[p.name] for p in named if p.name in values}
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        passed = fields | passed
    found = function(**passed)
    return await found if isinstance(found, Awaitable) else found


async def _result(functions: Mapping[str, Any], call: Mapping[str, Any]) -> Message:
    """The message with the result of a tool call; errors are results, too."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    answer = {"role": "tool", "name": name, "tool_call_id": call.get("id", "")}
    if (function := functions.get(name)) is None:
        return answer | {"content": f"error: no tool {name}; the tools are {', '.join(functions)}"}
    try:
        found = function(**arguments)
        found = await found if isinstance(found, Awaitable) else found
        text = found if isinstance(found, str) else json.dumps(found)
        return answer | {"content": text.encode().decode()}  # an error for half a character
    except Exception as error:
        message = truncate(f"{type(error).__name__}: {error}".removesuffix(": "), MAX_LEN)
        return answer | {"content": f"error: {message}"}


def _messages(value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return value
    raise Problem(f"returned {shown(value)}, expected text, a list of messages, or None")


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024  # all rollouts may connect at once

    def __init__(self, policies: Mapping[int, RolloutPolicy]) -> None:
        secret = secrets.token_hex(8)
        super().__init__((LOOPBACK, 0), partial(_Endpoint, policies, secret))
        self.url = f"http://{LOOPBACK}:{self.server_port}/{secret}"


class _Endpoint(BaseHTTPRequestHandler):
    """An OpenAI endpoint for the rollouts of this process."""

    protocol_version = "HTTP/1.1"

    def __init__(
        self, policies: Mapping[int, RolloutPolicy], secret: str, *connection: Any
    ) -> None:
        self.policies, self.secret = policies, secret
        super().__init__(*connection)

    def do_POST(self) -> None:
        status, content = 200, dict[str, Any]()
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            _, secret, number, *path = self.path.split("/")
            if [secret, *path] != [self.secret, "v1", "chat", "completions"]:
                raise PolicyError(f"found the path {self.path}, expected /chat/completions")
            reply = self._reply(self.policies[int(number)], body)
            choice = {"index": 0, "message": reply, "finish_reason": reply.ended}
            content = {"object": "chat.completion", "created": 0, "choices": [choice]}
            content |= {"id": number, "model": body.get("model", "")}
        except (Problem, ValueError, KeyError, AttributeError, TypeError) as error:
            message = str(error) if isinstance(error, Problem) else f"not a request: {error!r}"
            status, content = 400, {"error": {"message": message, "type": "invalid_request_error"}}
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def _reply(self, policy: RolloutPolicy, body: Mapping[str, Any]) -> PolicyReply:
        values = {**VALUES, "temperature": policy.temperature}
        if wrong := [
            k for k, v in body.items() if k not in FIELDS and v not in (None, values.get(k))
        ]:
            names = ", ".join(wrong)
            raise PolicyError(f"{names}: this endpoint has only the default; leave it out")
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        reply = copy.deepcopy(policy.chat(body["messages"], body.get("tools") or (), limit))
        for call in reply.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            reply.ended = reply.ended.replace("stop", "tool_calls")
        return reply

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""
