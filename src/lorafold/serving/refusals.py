"""Errors of the API: an HTTP status, a stable code and a one-line message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error",
}  # fmt: skip
MESSAGES_PATH = "/v1/messages"  # responds in Anthropic's format
ANTHROPIC_ERROR_TYPES = ERROR_TYPES | {
    413: "request_too_large", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
# the client's fields by the engine's settings
FIELD_BY_SETTING = {"lark": "tools", "schema": "response_format", "prompt_logprobs": "echo"}


@dataclass(eq=False)
class Refusal(Exception):
    """An error response: HTTP status, stable code, one-line message, invalid field, and the seconds
    after which the client may retry.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None

    def __str__(self) -> str:
        return self.message

    def with_client_names(self, names: Mapping[str, str]) -> Refusal:
        """Renames the field to the client's name. `names` maps lorafold's names to the client's
        names.
        """
        param = self.param or ""
        above = [n for n in names if param == n or param.startswith((f"{n}.", f"{n}["))]
        if not above:
            return self
        longest = max(above, key=len)
        sent = names[longest] + param[len(longest) :]
        start, rest = (sent, len(param)) if self.message.startswith(param) else ("", 0)
        return replace(self, message=start + self.message[rest:], param=sent)

    @property
    def body(self) -> dict[str, Any]:
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = ERROR_TYPES.get(self.status, other)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def anthropic(self, id: str) -> dict[str, Any]:
        other = "api_error" if self.status >= 500 else "invalid_request_error"
        long = self.code == "context_length_exceeded"  # clients match the prefix
        error: dict[str, Any] = {
            "type": ANTHROPIC_ERROR_TYPES.get(self.status, other),
            "message": "prompt is too long: " * long + self.message,
        }
        if self.param == "thread":  # clients then send the whole conversation again
            error["details"] = {
                "error_code": "thread_unsupported_request", "unsupported": ["thread"],
            }  # fmt: skip
        return {"type": "error", "error": error, "request_id": id}

    @property
    def headers(self) -> dict[str, str]:
        later = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return later | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str, message: str) -> Refusal:
    return Refusal(400, "invalid_value", f"{param}: {message}", param)


def unsupported_field(param: str, more: str = "") -> Refusal:
    message = f"{param}: this field is not supported{more}; remove it"
    return Refusal(400, "unsupported_parameter", message, param)


def check_count(param: str, n: int, most: int) -> None:
    if n > most:
        raise invalid(param, f"found {n} items, expected at most {most}")


@contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        raise refusal.with_client_names(names) from None
