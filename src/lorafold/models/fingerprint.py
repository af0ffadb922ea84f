"""Fingerprints of base models: shapes and sampled values of some weights, before quantization.

    {name: {"shape": [out, in], "dtype": "bfloat16", "values": "<16 fp32 numbers in hex>"}}
    up to 32 tensors

A fingerprint detects that an adapter is used on another base of the same shapes. It does not depend
on the dtype in which the base is loaded: two values agree if they are equal after both are rounded
to the narrower dtype. A base with a resized vocabulary counts as the same base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, PositiveInt, StringConstraints, TypeAdapter, ValidationError
from torch import Tensor, nn

from lorafold.errors import LorafoldError
from lorafold.models.weights import InMemory, Weights

Fingerprint = dict[str, dict[str, Any]]

MAX_TENSORS, MAX_VECTORS, NUM_VALUES = 32, 7, 16
# a prime far from any row length, so that positions spread over rows and columns
STRIDE = 2_654_435_761


class TensorSample(BaseModel, extra="forbid"):
    """The shape, dtype and sampled values of one tensor, as stored in `lorafold.json`."""

    shape: list[PositiveInt]
    dtype: Literal["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
    values: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{8 * NUM_VALUES}}}$")]


def parse(value: Any) -> Fingerprint:
    """Validates a fingerprint that was read from JSON."""
    try:
        TypeAdapter(dict[str, TensorSample]).validate_python(value, strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        place = ".".join(map(str, error["loc"]))
        raise LorafoldError(
            f"field base: not a valid fingerprint ({place}: {error['msg'].lower()})"
        ) from None
    return value


def of_model(model: nn.Module, without: Sequence[str] = ()) -> Fingerprint:
    """The fingerprint of a model's base weights, except in the modules `without`, such as a new
    head.
    """
    return of(InMemory.of_model(model), without)


def of(weights: Weights, without: Sequence[str] = ()) -> Fingerprint:
    """The fingerprint of named weights, except the weights in the modules `without`."""
    outside = tuple(f"{path}." for path in without)
    shapes = {n: weights.shape(n) for n in weights.names if not n.startswith(outside)}
    # skip scalars, such as a contrastive model's temperature
    names = [n for n, s in shapes.items() if s and 0 not in s and weights.is_floating(n)]
    # sorted by hash, to mix module types and depths
    names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
    matrices = [n for n in names if len(shapes[n]) > 1]
    # only a few vectors, since norms and biases may be all ones and zeros
    vectors = [n for n in names if len(shapes[n]) == 1]
    # in a quantized base, only the vectors and the embedding (usually the largest matrix) can be
    # compared
    largest = sorted(matrices, key=lambda n: math.prod(shapes[n]))[-1:]
    fingerprint, most = {}, MAX_TENSORS - MAX_VECTORS
    ordered = [*largest, *matrices[:most], *vectors[:MAX_VECTORS], *matrices, *vectors]
    for name in [*dict.fromkeys(ordered)][:MAX_TENSORS]:
        values = weights.elements(name, _positions(shapes[name]))
        fingerprint[name] = {
            "shape": list(shapes[name]),
            "dtype": str(values.dtype).removeprefix("torch."),
            "values": values.float().numpy().tobytes().hex(),
        }
    return fingerprint


def differences(expected: Fingerprint, weights: Weights) -> list[str]:
    """A list with one message if the weights differ from a fingerprint, else an empty list. Missing
    tensors, which may be tied or renamed, are skipped unless all are missing.
    """
    stored = {name: found for name in expected if (found := weights.find(name)) is not None}
    if expected and not stored:
        return [
            f"none of the {len(expected)} fingerprinted weights was found, for"
            f" example {', '.join(list(expected)[:3])}"
        ]
    lines = (_difference(expected[name], weights, found) for name, found in stored.items())
    if not (wrong := [line for line in lines if line]):
        return []
    return [
        f"{len(wrong)} of {len(stored)} fingerprinted weights differ:"
        f" {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
    ]


def matches(expected: Fingerprint, weights: Weights) -> bool:
    """Whether the weights match a fingerprint. All shapes are compared first and then small
    tensors, so that little of a different model is read.
    """
    stored = dict[str, str]()
    for name, sample in expected.items():
        if found := weights.find(name):
            if _misshapen([*weights.shape(found)], sample["shape"]):
                return False
            stored[name] = found
    by_size = sorted(stored, key=lambda name: math.prod(expected[name]["shape"]))
    return bool(stored) and not any(_difference(expected[n], weights, stored[n]) for n in by_size)


def same_base(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether two fingerprints describe the same weights, possibly stored in different dtypes."""
    common = a.keys() & b.keys()
    return bool(common) and all(
        a[n]["shape"] == b[n]["shape"] and tensors_equal(_values(a[n]), _values(b[n]))
        for n in common
    )


def tensors_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two floating-point tensors (any shape) are equal in the narrower of their dtypes."""
    return bool(elements_equal(a, b).all())


def elements_equal(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise `tensors_equal`: a boolean tensor of the same shape."""
    narrow = min(a.dtype, b.dtype, key=lambda d: torch.finfo(d).bits)
    # rounding an fp32 value to fp16 and then to bf16 may differ by one unit from rounding it to
    # bf16 (at a tie), and by more for fp16's subnormals
    both_halves = {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}
    rtol, atol = (2**-7, 2**-24) if both_halves else (0.0, 0.0)
    a, b = (t.to(a.device).to(narrow).float() for t in (a, b))
    return torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)


def _positions(shape: Sequence[int]) -> Tensor:  # (16, rank)
    flat = [(k * STRIDE + 1) % math.prod(shape) for k in range(NUM_VALUES)]
    return torch.tensor(np.array(np.unravel_index(flat, shape))).T.reshape(NUM_VALUES, len(shape))


def _misshapen(shape: list[int], expected: list[int]) -> bool:
    """Whether shapes differ in more than the number of rows, which a resized vocabulary changes."""
    same_rows = shape[1:] == expected[1:] and len(shape) == len(expected)
    return not same_rows or (shape != expected and len(shape) < 2)


def _values(sample: dict[str, Any]) -> Tensor:  # (16,)
    values = torch.frombuffer(bytearray.fromhex(sample["values"]), dtype=torch.float32)
    return values.to(getattr(torch, sample["dtype"]))


def _difference(expected: dict[str, Any], weights: Weights, name: str) -> str | None:
    shape, wanted = list(weights.shape(name)), expected["shape"]
    if _misshapen(shape, wanted):
        return f"{name} (shape {shape}, expected {wanted})"
    positions = _positions(wanted)
    shared = positions[:, 0] < shape[0]  # the common tokens of a resized vocabulary
    agrees = tensors_equal(weights.elements(name, positions[shared]), _values(expected)[shared])
    return None if agrees else f"{name} (other values)"
