"""Runs that stop in the middle."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from lorafold.training import loop


@contextmanager
def interrupted(call: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[list[int]]:
    """A call of the training step, counted from 0, raises; the numbers of the steps called."""
    step, steps = loop.train_step, list[int]()

    def stopping(job: Any, examples: Any, n: int) -> float:
        steps.append(n)
        if len(steps) > call:
            raise error
        return step(job, examples, n)

    with mock.patch.object(loop, "train_step", stopping), pytest.raises(error):
        yield steps
