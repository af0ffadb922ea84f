"""Judges: models behind an OpenAI-compatible API that score completions by a rubric."""

from __future__ import annotations

import math
import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any

import httpx2
import jinja2
import yaml
from jinja2.meta import find_undeclared_variables
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafold.errors import truncate
from lorafold.rewards.functions import LARGEST, Function, Problem

BUSY = {408, 409, 425, 429}  # HTTP statuses after which a request is repeated, besides 5xx


class Rubric(BaseModel):
    """A judge: a model behind an OpenAI-compatible API, and the rubric by which it scores.

    url: the API, such as http://127.0.0.1:8000/v1.
    rubric: the judge's prompt in Jinja; it may contain prompt, completion and the row's fields.
    key: the environment variable with the API key.
    pattern: the score in the judge's answer, as a regular expression with at most one group; the
        last match counts. An answer without a match, or that was truncated, has no score.
    scale: the number by which scores are divided.
    options: further fields of the request, such as temperature.
    """

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(pattern="^https?://")]
    model: str
    rubric: str
    key: str = ""
    pattern: str = r"(?<!/ )(?<![\d.,/])[-+\u2212]?\d+(?:[.,]\d+)?"  # 8 of 8/10; U+2212 is a minus
    scale: Annotated[float, Field(gt=0)] = 1.0
    options: dict[str, Any] = {}


def judge(text: str) -> Function:
    """A function that asks the judge in a YAML file for its score."""
    try:
        rubric = Rubric.model_validate(yaml.safe_load(Path(text).read_text(encoding="utf-8")))
        template = jinja2.Template(rubric.rubric, undefined=jinja2.StrictUndefined)
        pattern, key = re.compile(rubric.pattern), os.environ[rubric.key] if rubric.key else ""
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise Problem(f"{field}: {first['msg']}, in {Path(text).name}") from None
    except KeyError:
        raise Problem("key: found no environment variable of this name") from None
    except (OSError, yaml.YAMLError, jinja2.TemplateError, re.error) as error:
        raise Problem(f"{Path(text).name} can't be used: {error}") from None
    if "completion" not in find_undeclared_variables(template.environment.parse(rubric.rubric)):
        raise Problem(f"rubric: found no {{{{ completion }}}} in {Path(text).name}")
    if pattern.groups > 1:
        raise Problem(f"pattern: found {pattern.groups} groups, expected at most one")
    context = httpx2.create_ssl_context()
    url, headers = f"{rubric.url.rstrip('/')}/chat/completions", {"Authorization": f"Bearer {key}"}

    async def ask(
        prompt: Any, completion: str, tokens: Any = None, ended: Any = None, step: Any = None,
        **row: Any,
    ) -> float | None:  # fmt: skip
        known = {"tokens": tokens, "ended": ended, "step": step}
        try:
            question = template.render(row | known | {"prompt": prompt, "completion": completion})
        except Exception as error:  # the template may call anything
            raise Problem(f"rubric: {error}") from None
        content = {"model": rubric.model, "messages": [{"role": "user", "content": question}]}
        try:
            async with httpx2.AsyncClient(verify=context, timeout=None) as client:
                answer = await client.post(
                    url, json=content | rubric.options, headers=headers if key else {}
                )
        except httpx2.HTTPError as error:
            raise Problem(f"{url}: {error or type(error).__name__}", retry_after=0) from None
        problem = f"{url} answered {answer.status_code}: {truncate(answer.text, 80)!r}"
        if answer.status_code in BUSY or answer.status_code >= 500:
            raise Problem(problem, retry_after=seconds_of(answer.headers.get("retry-after", "")))
        try:
            if not answer.is_success:
                raise ValueError
            choice = answer.json()["choices"][0]
            is_cut = choice.get("finish_reason") == "length"
            scores = pattern.findall("" if is_cut else choice["message"]["content"] or "")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Problem(f"{problem}, expected a chat completion") from None
        try:
            number = scores[-1].replace(",", ".").replace("\u2212", "-") if scores else ""
            score = float(number) / rubric.scale if scores else math.inf
            return score if abs(score) <= LARGEST else None
        except ValueError:
            raise Problem(f"pattern: found {scores[-1]!r}, expected a number") from None

    return Function(ask)


def seconds_of(retry_after: str) -> float:
    """The time in seconds that an HTTP header Retry-After asks for; 0 if it is neither a number nor
    a date.
    """
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
