"""Jinja templates, named by their path in the package, and the formatting of numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lorafold.errors import listed
from lorafold.files.terminal import format_bytes, formatted


@cache
def environment(escape: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("lorafold", "."), autoescape=escape, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(
        form=format, listed=listed, shown=formatted, text=format_value, bytes=format_bytes,
        with_interval=with_interval,
    )  # fmt: skip
    return made


def render_text(template: str, **values: Any) -> str:
    return str(environment(False).get_template(template).render(values)).removesuffix("\n")


def interval_text(interval: Sequence[float] | None, form: str = ".4g") -> str:
    return f" (95%: {interval[0]:{form}} to {interval[1]:{form}})" if interval else ""


def with_interval(figures: Any, name: str, form: str = ".4g") -> str:
    interval = getattr(figures, f"{name}_interval")
    return f"{getattr(figures, name):{form}}{interval_text(interval, form)}"


def format_value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
