"""The error that a user sees, which is one line."""

from collections.abc import Callable
from typing import Any

import pytest

from lorafold.errors import LorafoldError


def refusal(do: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message with which a call is refused."""
    with pytest.raises(LorafoldError) as caught:
        do(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
