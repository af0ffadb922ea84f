"""The planned step of the engine (`engine.plan`) in C++ (`step.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lorafold.kernels.compiling import DTYPES, load_library, parameter_types


@cache
def step_function(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], int]:
    """Returns the function (decoder, batch, logits, stop, threads) -> 0, 1 if it was stopped or 2
    if memory was too small. It releases the GIL. Raises Unavailable if it can't be compiled.
    """
    library = load_library(Path(__file__).with_suffix(".cpp"), ctypes.CDLL)
    function = getattr(library, f"step_{DTYPES[dtype]}")
    function.restype, function.argtypes = ctypes.c_int, parameter_types("4Pi")

    def step(decoder: Tensor, batch: Tensor, logits: Tensor, stop: Tensor, threads: int) -> int:
        parts = (t.data_ptr() for t in (decoder, batch, logits, stop))
        return int(function(*parts, threads))

    return step
