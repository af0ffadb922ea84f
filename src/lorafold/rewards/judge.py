"""Judges: models behind an OpenAI-compatible API that score completions by a rubric."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lorafold.errors import truncate
from lorafold.rewards.functions import BACKOFF, Function, Problem

BUSY = {408, 409, 425, 429}  # HTTP statuses after which a request is repeated, besides 5xx


class Rubric(BaseModel):
    """A judge: a model behind an OpenAI-compatible API, and the rubric by which it scores.

    url: the API, such as http://127.0.0.1:8000/v1.
    rubric: the judge's prompt in Jinja; it may contain prompt, completion and the row's fields.
    key: the environment variable with the API key.
    pattern: the score in the judge's answer, as a regular expression; the last match counts, and
        an answer without a match has no score.
    scale: the number by which scores are divided.
    options: further fields of the request, such as temperature.
    """

    model_config = ConfigDict(extra="forbid")

    url: str
    model: str
    rubric: str
    key: str = ""
    pattern: str = r"[-+]?\d+(?:\.\d+)?"
    scale: float = 1.0
    options: dict[str, Any] = {}


def judge(text: str) -> Function:
    """A function that asks the judge in a YAML file for its score."""
    try:
        import httpx
    except ImportError:
        raise Problem("judges need httpx; install lorafold[rl]") from None
    try:
        rubric = Rubric.model_validate(yaml.safe_load(Path(text).read_text(encoding="utf-8")))
        template = jinja2.Template(rubric.rubric, undefined=jinja2.StrictUndefined)
        pattern, key = re.compile(rubric.pattern), os.environ[rubric.key] if rubric.key else ""
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise Problem(f"{field}: {first['msg']}, in {Path(text).name}") from None
    except KeyError:
        raise Problem(f"key: the environment has no variable {rubric.key}") from None
    except (OSError, yaml.YAMLError, jinja2.TemplateError, re.error) as error:
        raise Problem(f"{Path(text).name} can't be used: {error}") from None
    context = httpx.create_ssl_context()
    url, headers = f"{rubric.url.rstrip('/')}/chat/completions", {"Authorization": f"Bearer {key}"}

    async def ask(prompt: Any, completion: str, **row: Any) -> float | None:
        question = template.render({**row, "prompt": prompt, "completion": completion})
        content = {"model": rubric.model, "messages": [{"role": "user", "content": question}]}
        async with httpx.AsyncClient(verify=context, timeout=None) as client:
            answer = await client.post(
                url, json=content | rubric.options, headers=headers if key else {}
            )
        problem = f"{url} answered {answer.status_code}: {truncate(answer.text, 80)!r}"
        if answer.status_code in BUSY or answer.status_code >= 500:
            asked = answer.headers.get("retry-after", "")
            raise Problem(problem, retry_after=float(asked) if asked.isdigit() else BACKOFF)
        try:
            said = answer.json()["choices"][0]["message"]["content"]
            scores = pattern.findall(said)
        except (ValueError, LookupError, TypeError):
            raise Problem(f"{problem}, expected a chat completion") from None
        return float(scores[-1]) / rubric.scale if scores else None

    return Function(ask)
