"""Products of modules that would not compute a row as if it were alone.

The product of int8 in bitsandbytes chooses which inputs stay in 16 bits by the rows of the whole
batch (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339, section 3.2), so a request would be
answered by its company. Training computes with the dequantized matrix under adapters, and so does
the engine, with adapters or without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lorafold.bases import layer_of
from lorafold.core.anatomy import bare_modules
from lorafold.core.attach import Adapted


@contextmanager
def rows_apart(model: nn.Module) -> Iterator[None]:
    """Have every module of the model compute each row of its input apart, until the `with` block
    ends.
    """
    with ExitStack() as stack:
        for _, module in bare_modules(model):
            layer: Any = layer_of(module)
            apart = isinstance(module, Adapted)  # its own forward is that of the layer
            if layer.mixes_rows and not apart and "forward" not in vars(module):
                module.forward = layer
                stack.callback(vars(module).pop, "forward", None)
        yield
