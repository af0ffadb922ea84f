"""The settings of the server, and functions that read its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from lorafold.errors import LorafoldError
from lorafold.files.contents import open_regular
from lorafold.recipe.parsing import parse_yaml, read_text

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A value from a file or a request. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Strict):
    """Limits per request and in total. The time limits of a completion start when its request
    arrives.
    """

    body_bytes: PositiveInt = 1 << 20
    messages: PositiveInt = 256
    tools: PositiveInt = 64
    stops: PositiveInt = 16
    choices: PositiveInt = 8
    biases: PositiveInt = 1024
    queue: PositiveInt = 256
    tenant_queue: PositiveInt = 64  # waiting requests per tenant
    # running requests per tenant (None: three quarters of the slots if there is a key file)
    tenant_running: PositiveInt | None = None
    tenant_streams: PositiveInt = 16  # open streams of /v1/models/events per tenant
    queue_seconds: PositiveFloat = 60
    first_token_seconds: PositiveFloat = 120
    total_seconds: PositiveFloat = 600
    unread_tokens: PositiveInt = 512  # tokens by which a client may lag behind its stream
    send_seconds: PositiveFloat = 30  # maximum time in which a client reads no data
    receive_seconds: PositiveFloat = 15  # maximum time to receive a whole request
    connections: PositiveInt = 1024  # beyond this, the oldest incomplete request is closed


class Settings(Strict):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    keys: Path | None = None
    admin_key: Path | None = None  # None: administration is off
    metrics_key: Path | None = None  # a key that can only read metrics
    # origins whose web pages may send requests (CORS)
    cors: list[Annotated[str, Field(pattern=r"^https?://[^/*\s]+$")]] = Field([])
    state: Path | None = None  # None: next to the adapters
    slots: PositiveInt = 16  # max_num_seqs
    length: PositiveInt | None = None  # max_model_len (None: the model's)
    kv_bytes: PositiveInt | None = None  # KV cache; None: half of the memory that adapters leave
    prompt_budget: PositiveInt = 512  # prefill tokens per step
    adapter_bytes: PositiveInt | None = None  # memory for adapters; None: half of the free memory
    strikes: PositiveInt = 3  # requests with NaN or infinite logits before a quarantine
    prefix_reuse: bool = True  # prefix caching within a tenant and an adapter
    weights: dict[str, PositiveFloat] = Field({})  # fair-scheduling weights by tenant; default 1
    heartbeat_seconds: PositiveFloat = 30  # time without a step after which /readyz returns 503
    drain_seconds: PositiveFloat = 30  # time for running requests after SIGTERM
    json_logs: bool = False
    log_texts: bool = False  # log prompts and completions
    allow_control_tokens: bool = False  # keep control tokens in messages as tokens
    limits: Limits = Limits()


def read_settings(file: Path | None, options: Mapping[str, Any]) -> Settings:
    settings: Any = {}
    if file is not None:
        settings = parse_yaml(read_text(file, "settings"), str(file)) or {}
        if not isinstance(settings, dict):
            kind = type(settings).__name__
            raise LorafoldError(f"{file}: found {kind}, expected a mapping of settings to values")
    options = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**{str(k): v for k, v in settings.items()} | options)
    except ValidationError as error:
        problems = "; ".join(map(_problem, error.errors()))
        raise LorafoldError(f"{f'{file} or options' if file else 'options'}: {problems}") from None


def _problem(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        kind = Limits if name.startswith("limits.") else Settings
        return f"{name}: unknown setting, expected one of {', '.join(kind.model_fields)}"
    return f"{name}: found {error['input']!r}, {error['msg'][:1].lower()}{error['msg'][1:]}"


def read_if_exists(file: Path, kind: type[M]) -> M:
    return read(file, kind, "fix or move the file") if os.path.lexists(file) else kind()


def read(file: Path, kind: type[M], hint: str) -> M:
    return parsed(file, content_of(file), kind, hint)


def content_of(file: Path) -> bytes:
    """Reads a regular file. Raises for anything else, such as a pipe, which would block."""
    try:
        with open_regular(file) as (content, _):
            return content.read()
    except OSError as error:
        raise LorafoldError(f"{file}: can't be read ({error.strerror})") from None


def parsed(file: Path, content: bytes, kind: type[M], hint: str) -> M:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise LorafoldError(f"{file}: {where}: {first['msg']}; {hint}") from None
