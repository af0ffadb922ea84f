"""Request bodies. Unknown fields are rejected, because ignoring them could change the result. Some
known fields are ignored, and others are accepted only with a value that has no effect.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import FailFast, Field, ValidationError
from pydantic_core import from_json, to_json

from lorafold.errors import LorafoldError
from lorafold.serving.backend import NUMBERS, Sampling
from lorafold.serving.refusals import Refusal, invalid, unsupported_field
from lorafold.serving.settings import Strict

IGNORED_FIELDS = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "cache_control", "max_tool_calls",
}  # fmt: skip
NEUTRAL_VALUES = {
    "store": (False,), "modalities": (["text"],), "echo": (False,), "best_of": (1,),
    "background": (False,), "functions": ([],),
}  # fmt: skip
DONE = b"data: [DONE]\n\n"
PIECE_ITEMS = 16384  # list elements that are serialized at once
MAX_ENTRIES = 8192  # entries of an object; limited, because each may cause an error
E = TypeVar("E")


class FirstError(FailFast):
    """Stops at the first error in a list, because a million errors take seconds."""

    __hash__ = object.__hash__  # pydantic hashes it in unions


ListOf = Annotated[list[E], FirstError()]


class Body(Strict, strict=True):
    """A request body in which unknown fields and wrong types are errors."""


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored, because events are never padded


class Generation(Body):
    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    stop: str | ListOf[str] = Field(default_factory=list)
    seed: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    return_token_ids: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, **more: Any) -> Sampling:
        try:
            biases = {int(token): value for token, value in self.logit_bias.items()}
        except ValueError:
            raise invalid("logit_bias", "found a key that is not a token id") from None
        penalties = {name: getattr(self, name) for name in NUMBERS}
        try:
            return Sampling(
                **penalties, top_k=max(0, self.top_k), logit_bias=biases, stop=self.stops, **more
            )
        except LorafoldError as error:
            refusal = Refusal(400, "invalid_value", str(error), str(error).partition(":")[0])
            chat = "top_logprobs" in type(self).model_fields
            raise refusal.with_client_names({"logprobs": "top_logprobs"} if chat else {}) from None


B = TypeVar("B", bound=Body)


def read_body(kind: type[B], content: bytes) -> B:
    """Parses a body. The error names the first invalid field."""
    try:
        fields = from_json(content, allow_inf_nan=False)  # rejects more than 200 levels
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"body: invalid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "invalid_json", "body: expected a JSON object")
    known_fields = {}
    for name, value in fields.items():
        known = name in kind.model_fields
        ignored = name in IGNORED_FIELDS or value in NEUTRAL_VALUES.get(name, ())
        if value is None or (not known and ignored):
            continue
        if not known:
            raise unsupported_field(name[:80], ", and ignoring it could change the answer")
        if isinstance(value, dict) and len(value) > MAX_ENTRIES:
            raise invalid(name, f"found {len(value)} entries, expected at most {MAX_ENTRIES}")
        known_fields[name] = value
    try:
        return kind.model_validate(known_fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            message = f"{where}: this field is required"
            raise Refusal(400, "missing_parameter", message, where) from None
        raise invalid(where, f"{first['msg'][:1].lower()}{first['msg'][1:]}") from None


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def sse_event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + to_json(value) + b"\n\n"


def as_json(value: Mapping[str, Any]) -> bytes:
    """Serializes long lists in pieces, because serialization blocks other threads."""

    def written(field: Any) -> bytes:
        if not isinstance(field, list | tuple) or len(field) <= PIECE_ITEMS:
            return to_json(field)
        starts = range(0, len(field), PIECE_ITEMS)
        pieces = [to_json(field[i : i + PIECE_ITEMS])[1:-1] for i in starts]
        return b"[" + b",".join(pieces) + b"]"

    fields = [to_json(name) + b":" + written(field) for name, field in value.items()]
    return b"{" + b",".join(fields) + b"}"
