"""Loading a model one tensor after the other, with a word in between.

    with loaded_in_turn(), each_kept(keep):
        model = auto.from_pretrained(...)       keep(t) for each tensor that a module has got

So what is kept of a tensor can be little, and the model is never whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"  # else threads of transformers read ahead, as far as they get


@contextmanager
def loaded_in_turn() -> Iterator[None]:
    """Have transformers read a tensor when a module is to get it, and not before."""
    before = os.environ.get(IN_TURN)
    os.environ[IN_TURN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[IN_TURN]
        else:
            os.environ[IN_TURN] = before


@contextmanager
def each_kept(keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `keep` with each parameter and buffer, of any shape, that a module gets, once the next
    one comes or the block ends: until then other hooks may still put another one in its place.
    """
    last: list[tuple[Any, str]] = []

    def before(module: Any, name: str, _: Any) -> None:
        while last:
            owner, own = last.pop()
            found = owner._parameters.get(own, owner._buffers.get(own))
            if found is not None:
                keep(found)
        if module is not None:
            last.append((module, name))

    hooks = [
        register_module_parameter_registration_hook(before),
        register_module_buffer_registration_hook(before),
    ]
    try:
        yield
        before(None, "", None)
    finally:
        for hook in hooks:
            hook.remove()
