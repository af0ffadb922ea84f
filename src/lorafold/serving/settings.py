"""The settings of a server: the defaults, `serve.yaml` over them, the command's options over both;
and files of the server's own, in JSON, read whole and checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from lorafold.errors import LorafoldError, why_unread
from lorafold.files.contents import open_regular
from lorafold.recipe.parsing import parse_yaml

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """What is read from a file, or from a request: a value in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Strict):
    """What one request may ask for, and what all may hold.

    Seconds count from the request's arrival. `unread_tokens` is how far a client may fall behind
    its stream, `send_seconds` how long it may take none of it. A request has `receive_seconds` to
    arrive, and where there are more than `connections`, the one that takes longest is closed. A
    tenant has at most `tenant_queue` requests waiting and `tenant_running` running (None: three
    quarters of the slots where there is a key file), and not more than half of the slots run while
    other tenants are there. It holds at most `tenant_streams` streams of changes of the models.
    """

    body_bytes: PositiveInt = 1 << 20
    messages: PositiveInt = 256
    tools: PositiveInt = 64
    stops: PositiveInt = 16
    choices: PositiveInt = 8
    biases: PositiveInt = 1024
    queue: PositiveInt = 256
    tenant_queue: PositiveInt = 64
    tenant_running: PositiveInt | None = None
    tenant_streams: PositiveInt = 16
    queue_seconds: PositiveFloat = 60
    first_token_seconds: PositiveFloat = 120
    total_seconds: PositiveFloat = 600
    unread_tokens: PositiveInt = 512
    send_seconds: PositiveFloat = 30
    receive_seconds: PositiveFloat = 15
    connections: PositiveInt = 1024


class Settings(Strict):
    """All settings but the model and the adapters.

    keys, admin_key: Files; without the second the routes for administration are closed.
    metrics_key: A file with a key that reads the metrics and nothing else.
    cors: Origins whose pages may ask from a browser.
    state: The file with aliases, pins and quarantines (None: beside the adapters).
    slots, length, prompt_budget: Requests that run at a time, the most tokens of one, and the most
        tokens of prompts that are read between two steps.
    adapter_bytes: The most bytes of adapters in memory (None: half of what is free).
    strikes: Requests with logits that are not finite after which an adapter is quarantined.
    prefix_reuse: Start a prompt from what an earlier one of the same tenant and adapter left.
    weights: The shares of tenants in what is computed, 1 where none is named.
    heartbeat_seconds: After so long without a step the server is not ready.
    drain_seconds: How long running requests have to end after SIGTERM.
    log_texts: Write prompts and completions to the log.
    allow_control_tokens: Control tokens in the contents of messages are tokens; else they are text.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    keys: Path | None = None
    admin_key: Path | None = None
    metrics_key: Path | None = None
    cors: list[Annotated[str, Field(pattern=r"^https?://[^/*\s]+$")]] = Field([])
    state: Path | None = None
    slots: PositiveInt = 16
    length: PositiveInt | None = None
    prompt_budget: PositiveInt = 512
    adapter_bytes: PositiveInt | None = None
    strikes: PositiveInt = 3
    prefix_reuse: bool = True
    weights: dict[str, PositiveFloat] = Field({})
    heartbeat_seconds: PositiveFloat = 30
    drain_seconds: PositiveFloat = 30
    json_logs: bool = False
    log_texts: bool = False
    allow_control_tokens: bool = False
    limits: Limits = Limits()


def read_settings(file: Path | None, options: Mapping[str, Any]) -> Settings:
    """The settings of a file under those of the options that are given, not None.

    Raises LorafoldError, in one line, for a file that can't be read and for every wrong setting.
    """
    found: Any = {}
    if file is not None:
        found = parse_yaml(read_text(file), str(file)) or {}
        if not isinstance(found, dict):
            raise LorafoldError(f"{file}: found {type(found).__name__}, expected settings by name")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**{str(k): v for k, v in found.items()} | given)
    except ValidationError as error:
        told = "; ".join(map(_told, error.errors()))
        raise LorafoldError(f"{file or 'options'}: {told}") from None


def read_text(file: Path) -> str:
    """The text of a file. Raises LorafoldError, in one line, for one that can't be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LorafoldError(f"{file}: can't be read ({why_unread(error)})") from None


def _told(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        kind: type[Strict] = Limits if name.startswith("limits.") else Settings
        return f"{name}: unknown, expected one of {', '.join(kind.model_fields)}"
    return f"{name}: found {error['input']!r}, {error['msg'][:1].lower()}{error['msg'][1:]}"


def kept(file: Path, kind: type[M]) -> M:
    """The content of a file that the server writes, empty if there is none. Raises as `read`."""
    return read(file, kind, "move it away") if os.path.lexists(file) else kind()


def read(file: Path, kind: type[M], hint: str) -> M:
    """The content of a file. Raises LorafoldError, in one line, if it can't be read or is none.

    Args:
        hint: what to do about a wrong one.
    """
    return parsed(file, content_of(file), kind, hint)


def content_of(file: Path) -> bytes:
    """The bytes of a file. Raises LorafoldError for one that can't be read, or would be waited for.
    """
    try:
        with open_regular(file) as (content, _):
            return content.read()
    except OSError as error:
        raise LorafoldError(f"{file}: can't be read ({error.strerror})") from None


def parsed(file: Path, content: bytes, kind: type[M], hint: str) -> M:
    """What the content of a file says. Raises LorafoldError as `read` does."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise LorafoldError(f"{file}: {where}: {first['msg']}; {hint}") from None
