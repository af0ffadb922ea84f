"""A table, by operation and kind of device, of the classes in this package that have faster
implementations. To add one, name a class in a row and give it a method with the operation's name.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.ops import attention, cross_entropy, decoding, dropout, elementwise, scale_and_add
from lorafold.ops.operators import Operation

IMPLEMENTATIONS = {
    elementwise.NORM: {"cpu": "training._CppTraining"},
    elementwise.NORM_BACKWARD: {"cpu": "training._CppTraining"},
    elementwise.GATED: {"cpu": "training._CppTraining"},
    elementwise.GATED_BACKWARD: {"cpu": "training._CppTraining"},
    elementwise.ROTARY: {"cpu": "training._CppTraining"},
    attention.SOFTMAX: {"cpu": "training._CppTraining"},
    attention.BACKWARD: {"cpu": "training._CppTraining"},
    attention.FORWARD: {"cpu": "attention._CppAttention"},
    attention.GRADIENTS: {"cpu": "attention._CppAttention"},
    dropout.PLACES: {"cpu": "training._CppTraining"},
    dropout.MASKED: {"cuda": "triton_kernels._TritonDropout"},
    dropout.EMPTY: {"cpu": "training._CppTraining"},
    cross_entropy.LOSSES: {"cpu": "training._CppTraining"},
    scale_and_add.SCALE: {"cpu": "training._CppTraining", "cuda": "triton_kernels._TritonScale"},
    scale_and_add.BACKWARD: {"cpu": "training._CppTraining", "cuda": "triton_kernels._TritonScale"},
    decoding.STORED: {"cpu": "decoding._CppDecoding"},
    decoding.LOW_RANK: {"cpu": "decoding._CppDecoding"},
    decoding.ATTEND: {"cpu": "decoding._CppDecoding"},
}
ENGINE_ONLY = (decoding.STORED, decoding.LOW_RANK, decoding.ATTEND)
DECODING = (
    *ENGINE_ONLY, elementwise.NORM, elementwise.ROTARY, elementwise.GATED, scale_and_add.SCALE
)  # fmt: skip
TRAINING = tuple(operation for operation in IMPLEMENTATIONS if operation not in ENGINE_ONLY)


@cache
def enable(operations: tuple[Operation, ...], device: str = "cpu") -> str:
    """Compiles operations for a kind of device and uses them in this process from now on. Returns
    the reason if they are unavailable, otherwise "".
    """
    places = {of: IMPLEMENTATIONS[of][device] for of in operations if device in IMPLEMENTATIONS[of]}
    forms = {place: _load(place) for place in dict.fromkeys(places.values())}
    for form in forms.values():
        if isinstance(form, LorafoldError):
            return str(form)
    for of, place in places.items():
        of.implement(device, getattr(forms[place], of.name))
    return ""


@cache
def _load(place: str) -> Any:
    module, _, name = place.partition(".")
    try:
        return getattr(import_module(f"{__package__}.{module}"), name)()
    except LorafoldError as error:
        return error
