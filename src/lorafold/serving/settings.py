"""The settings of a server, in increasing order of precedence: defaults, `serve.yaml`, the options
of the command; and the reading of the server's own files, in JSON.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from lorafold.errors import LorafoldError
from lorafold.files.contents import open_regular
from lorafold.recipe.parsing import parse_yaml, text_of

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A value read from a file or a request, in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Strict):
    """The limits of one request, and of all. Seconds count from the request's arrival."""

    body_bytes: PositiveInt = 1 << 20
    messages: PositiveInt = 256
    tools: PositiveInt = 64
    stops: PositiveInt = 16
    choices: PositiveInt = 8
    biases: PositiveInt = 1024
    queue: PositiveInt = 256
    tenant_queue: PositiveInt = 64  # requests of a tenant that wait
    # and that run (None: three quarters of the slots if there is a key file)
    tenant_running: PositiveInt | None = None
    tenant_streams: PositiveInt = 16  # open streams of changes of the models
    queue_seconds: PositiveFloat = 60
    first_token_seconds: PositiveFloat = 120
    total_seconds: PositiveFloat = 600
    unread_tokens: PositiveInt = 512  # how far a client may fall behind its stream
    send_seconds: PositiveFloat = 30  # and how long it may read none of it
    receive_seconds: PositiveFloat = 15  # until a request has arrived
    connections: PositiveInt = 1024  # beyond which the one that arrives slowest is closed


class Settings(Strict):
    """All settings but the model and the adapters."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    keys: Path | None = None
    admin_key: Path | None = None  # without it administration is closed
    metrics_key: Path | None = None  # for a key that reads the metrics and nothing else
    # origins whose pages may send requests from a browser
    cors: list[Annotated[str, Field(pattern=r"^https?://[^/*\s]+$")]] = Field([])
    state: Path | None = None  # None: beside the adapters
    slots: PositiveInt = 16  # requests that run at a time
    length: PositiveInt | None = None  # the most tokens of a request
    prompt_budget: PositiveInt = 512  # the most tokens of prompts that are read between two steps
    adapter_bytes: PositiveInt | None = None  # of adapters in memory (None: half of what is free)
    strikes: PositiveInt = 3  # requests with logits that are not finite before a quarantine
    prefix_reuse: bool = True  # of the KV cache, within a tenant and an adapter
    weights: dict[str, PositiveFloat] = Field({})  # the shares of tenants, 1 if not named
    heartbeat_seconds: PositiveFloat = 30  # without a step until the server is not ready
    drain_seconds: PositiveFloat = 30  # that running requests have to end after SIGTERM
    json_logs: bool = False
    log_texts: bool = False  # log prompts and completions
    allow_control_tokens: bool = False  # in the contents of messages; else they are text
    limits: Limits = Limits()


def read_settings(file: Path | None, options: Mapping[str, Any]) -> Settings:
    """The settings of a file, and over them the options that are not None."""
    settings: Any = {}
    if file is not None:
        settings = parse_yaml(text_of(file, "settings"), str(file)) or {}
        if not isinstance(settings, dict):
            kind = type(settings).__name__
            raise LorafoldError(f"{file}: found {kind}, expected settings by name")
    options = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**{str(k): v for k, v in settings.items()} | options)
    except ValidationError as error:
        problems = "; ".join(map(_problem, error.errors()))
        raise LorafoldError(f"{file or 'options'}: {problems}") from None


def _problem(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        kind = Limits if name.startswith("limits.") else Settings
        return f"{name}: unknown, expected one of {', '.join(kind.model_fields)}"
    return f"{name}: found {error['input']!r}, {error['msg'][:1].lower()}{error['msg'][1:]}"


def read_if_exists(file: Path, kind: type[M]) -> M:
    """A file that the server writes, empty if there is none."""
    return read(file, kind, "move it away") if os.path.lexists(file) else kind()


def read(file: Path, kind: type[M], hint: str) -> M:
    """A file of this kind; errors end with the hint."""
    return parsed(file, content_of(file), kind, hint)


def content_of(file: Path) -> bytes:
    """The bytes of a file; LorafoldError for one that would block, such as a pipe."""
    try:
        with open_regular(file) as (content, _):
            return content.read()
    except OSError as error:
        raise LorafoldError(f"{file}: can't be read ({error.strerror})") from None


def parsed(file: Path, content: bytes, kind: type[M], hint: str) -> M:
    """The content of a file as this kind."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise LorafoldError(f"{file}: {where}: {first['msg']}; {hint}") from None
