"""The methods: one a file, one table from the command's word to a spec that can be built without arguments."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.lora import LoRA

METHODS: dict[str, Callable[..., Spec]] = {
    "lora": LoRA,
    "rslora": partial(LoRA, rslora=True),
}


def make_spec(method: str, **options: Any) -> Spec:
    """The spec of a method by its word. LorafoldError for an unknown word, or fields that the method does not have."""
    if method not in METHODS:
        raise LorafoldError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    maker = METHODS[method]
    cls: Any = maker.func if isinstance(maker, partial) else maker
    known = [f.name for f in fields(cls)]
    if unknown := [k for k in options if k not in known]:
        raise LorafoldError(f"method {method} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    try:
        return maker(**options)
    except TypeError as e:
        raise LorafoldError(f"method {method}: {e}") from None


__all__ = ["METHODS", "LoRA", "make_spec"]
