"""The table *operation x kind of device*: the file of this package that has a form of its own.

    why = use(TRAINING)        from now on they compute so; or why they can't

An operation without a row, or on another kind of device, is computed by its plain form. A new
form is a file whose `forms()` has it under the operation's name, and a word in a row.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.ops import attention, cross_entropy, decoding, dropout, fused, scale
from lorafold.ops.operators import Operation

FORMS: dict[Operation, dict[str, str]] = {
    fused.NORM: {"cpu": "training"},
    fused.NORM_BACKWARD: {"cpu": "training"},
    fused.GATED: {"cpu": "training"},
    fused.GATED_BACKWARD: {"cpu": "training"},
    fused.ROTARY: {"cpu": "training"},
    attention.SOFTMAX: {"cpu": "training"},
    attention.BACKWARD: {"cpu": "training"},
    attention.FORWARD: {"cpu": "attention"},
    attention.GRADIENTS: {"cpu": "attention"},
    dropout.PLACES: {"cpu": "training"},
    dropout.MASKED: {"cuda": "triton_dropout"},
    dropout.EMPTY: {"cpu": "training"},
    cross_entropy.LOSSES: {"cpu": "training"},
    scale.SCALE: {"cpu": "training", "cuda": "triton_scale"},
    scale.BACKWARD: {"cpu": "training", "cuda": "triton_scale"},
    decoding.STORED: {"cpu": "decoding"},
    decoding.LOW_RANK: {"cpu": "decoding"},
    decoding.ATTEND: {"cpu": "decoding"},
    decoding.WRITE: {"cpu": "decoding"},
}
OF_PASSES = (decoding.STORED, decoding.LOW_RANK, decoding.ATTEND, decoding.WRITE)
DECODING = (*OF_PASSES, fused.NORM, fused.ROTARY, fused.GATED, scale.SCALE)
TRAINING = tuple(operation for operation in FORMS if operation not in OF_PASSES)


@cache
def use(operations: tuple[Operation, ...], device: str = "cpu") -> str:
    """Compile the forms of operations, unless they are in the cache, and have them compute from now
    on, in this process, where it is done once. Returns why they can't be had, or nothing.
    """
    files = {of: FORMS[of][device] for of in operations if device in FORMS[of]}
    made = {file: _made(file) for file in dict.fromkeys(files.values())}
    for found in made.values():
        if isinstance(found, LorafoldError):
            return str(found)
    for of, file in files.items():
        of.implement(device, getattr(made[file], of.name))
    return ""


@cache
def _made(file: str) -> Any:
    """The forms of a file, or the error that they can't be had by; it is found out once a process.
    """
    try:
        return import_module(f"{__package__}.{file}").forms()
    except LorafoldError as error:
        return error
