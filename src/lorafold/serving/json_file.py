"""Files of the server's own, in JSON: read whole and checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lorafold.errors import LorafoldError
from lorafold.files.contents import opened

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """What is read from a file, or from a request: a value in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
        with opened(file) as (content, _):
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
