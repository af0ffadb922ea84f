"""What the server answers when it does not do what was asked: a status, a stable code, one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error",
}  # fmt: skip
MESSAGES = "/v1/messages"  # whose clients know Anthropic's shape
ANTHROPIC = TYPES | {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}
# the fields of a request that the engine's settings come from
FIELDS = {"lark": "tools", "schema": "response_format", "prompt_logprobs": "echo"}


class Refusal(Exception):
    """An error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after = param, retry_after

    def sent_as(self, names: Mapping[str, str]) -> Refusal:
        """The same about the field as the client wrote it."""
        ours = self.param or ""
        above = [n for n in names if ours == n or ours.startswith((f"{n}.", f"{n}["))]
        if not above:
            return self
        longest = max(above, key=len)
        theirs = names[longest] + ours[len(longest) :]
        told = self.message
        if told.startswith(ours):
            told = theirs + told[len(ours) :]
        return Refusal(self.status, self.code, told, theirs, self.retry_after)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status) or (
            "server_error" if self.status >= 500 else "invalid_request_error"
        )
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}

    def anthropic(self, id: str) -> dict[str, Any]:
        """The JSON of the answer in Anthropic's shape."""
        told, other = self.message, "api_error" if self.status >= 500 else "invalid_request_error"
        if self.code == "context_length_exceeded":  # by these words clients know this error
            told = f"prompt is too long: {told}"
        about: dict[str, Any] = {"type": ANTHROPIC.get(self.status, other), "message": told}
        if self.param == "thread":  # after which clients send the whole conversation each time
            why = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
            about["details"] = why
        return {"type": "error", "error": about, "request_id": id}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def wrong(param: str, message: str) -> Refusal:
    """The refusal of a field's value."""
    return Refusal(400, "invalid_value", f"{param}: {message}", param)


def unsupported(param: str, more: str = "") -> Refusal:
    """The refusal of a field that is not known."""
    return Refusal(400, "unsupported_parameter", f"{param}: it is not supported{more}", param)


def check_number(param: str, n: int, most: int) -> None:
    """Raise Refusal for more of something than there may be."""
    if n > most:
        raise wrong(param, f"found {n} of them, expected at most {most}")


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Let refusals name fields as the client wrote them."""
    try:
        yield
    except Refusal as refusal:
        raise refusal.sent_as(names) from None
