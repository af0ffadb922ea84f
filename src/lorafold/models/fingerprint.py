"""A model's fingerprint: the shapes and a few sampled values of some of its weights, before any
quantization.

    {name: {"shape": [out, in], "dtype": "bfloat16", "values": "<16 fp32 numbers in hex>"}}
    up to 32 tensors

An adapter is useless on another base than its own, but its shapes may fit all the same. The
fingerprint shows that the base is another one. It does not depend on the dtype in which the base is
loaded (fp32, bf16 or fp16): two values agree if they are equal after both are rounded to the
narrower dtype. A base whose vocabulary was resized counts as the same base. A fingerprint reads 512
numbers.
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

TENSORS, VECTORS, VALUES = 32, 7, 16
# a prime far from any row length, so that positions spread over rows and columns
STRIDE = 2_654_435_761


class TensorSample(BaseModel, extra="forbid"):
    """The shape, dtype and sampled values of one tensor, as `lorafold.json` stores them."""

    shape: list[PositiveInt]
    dtype: Literal["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
    values: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{8 * VALUES}}}$")]


def parse(value: Any) -> Fingerprint:
    """Check a fingerprint that was read from JSON."""
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
    """The fingerprint of a model's base weights, without its adapters. `without` gives the paths of
    modules that are not part of the base, such as a new head.
    """
    return of(InMemory.of_model(model), without)


def of(weights: Weights, without: Sequence[str] = ()) -> Fingerprint:
    """The fingerprint of named weights; `without` as `of_model` takes it."""
    outside = tuple(f"{path}." for path in without)
    shapes = {n: weights.shape(n) for n in weights.names if not n.startswith(outside)}
    # a scalar, such as the temperature of two encoders, has no positions to compare
    names = [n for n, s in shapes.items() if s and 0 not in s and weights.is_floating(n)]
    # the order of hashes mixes types of modules and depths
    names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
    matrices = [n for n in names if len(shapes[n]) > 1]
    # only a few of the vectors are taken: norms and biases may be all ones and zeros
    vectors = [n for n in names if len(shapes[n]) == 1]
    # in a quantized base only the vectors and the largest matrix, usually the embedding, can be
    # compared: all its linears are quantized
    largest = sorted(matrices, key=lambda n: math.prod(shapes[n]))[-1:]
    chosen = [*largest, *matrices[: TENSORS - VECTORS], *vectors[:VECTORS], *matrices, *vectors]
    fingerprint = {}
    for name in [*dict.fromkeys(chosen)][:TENSORS]:
        values = weights.elements(name, _positions(shapes[name]))
        fingerprint[name] = {
            "shape": list(shapes[name]),
            "dtype": str(values.dtype).removeprefix("torch."),
            "values": values.float().numpy().tobytes().hex(),
        }
    return fingerprint


def differences(expected: Fingerprint, weights: Weights) -> list[str]:
    """A line that says how the weights differ from a fingerprint, or no line if they agree. Tensors
    that are missing here (tied, or under another name) are skipped, unless all are missing.
    """
    here = {name: found for name in expected if (found := weights.find(name)) is not None}
    if expected and not here:
        return [
            f"none of its {len(expected)} fingerprinted weights was found:"
            f" {', '.join(list(expected)[:3])}, ..."
        ]
    lines = (_difference(expected[name], weights, found) for name, found in here.items())
    if not (wrong := [line for line in lines if line]):
        return []
    return [
        f"{len(wrong)} of {len(here)} fingerprinted weights differ:"
        f" {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
    ]


def fits(expected: Fingerprint, weights: Weights) -> bool:
    """Whether the weights are those of a fingerprint. For another model little is read: all shapes
    are compared before any values, and the small tensors' values first, up to the first that differ
    (among 50 models of one shape, not yet in the page cache: 0.6 s instead of 54).
    """
    here = dict[str, str]()
    for name, sample in expected.items():
        if found := weights.find(name):
            if _misshapen([*weights.shape(found)], sample["shape"]):
                return False
            here[name] = found
    by_size = sorted(here, key=lambda name: math.prod(expected[name]["shape"]))
    return bool(here) and not any(_difference(expected[n], weights, here[n]) for n in by_size)


def agree(a: Fingerprint, b: Fingerprint) -> bool:
    """Tell whether two fingerprints are of the same weights, which may be stored otherwise."""
    both = a.keys() & b.keys()
    return bool(both) and all(
        a[n]["shape"] == b[n]["shape"] and same(_values(a[n]), _values(b[n])) for n in both
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two floating-point tensors of the same shape, any shape, are equal after both are
    rounded to the narrower of their dtypes.
    """
    return bool(equal(a, b).all())


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Compare as `same` does, element by element: a boolean tensor of the same shape."""
    narrow = min(a.dtype, b.dtype, key=lambda d: torch.finfo(d).bits)
    # if one fp32 number was rounded to bf16 and to fp16, rounding the latter to bf16 may differ by
    # one unit (at a tie), and more among fp16's subnormals
    both_halves = {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}
    rtol, atol = (2**-7, 2**-24) if both_halves else (0.0, 0.0)
    a, b = (t.to(a.device).to(narrow).float() for t in (a, b))
    return torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)


def _positions(shape: Sequence[int]) -> Tensor:  # (16, rank)
    flat = [(k * STRIDE + 1) % math.prod(shape) for k in range(VALUES)]
    return torch.tensor(np.array(np.unravel_index(flat, shape))).T.reshape(VALUES, len(shape))


def _misshapen(shape: list[int], expected: list[int]) -> bool:
    """Of a resized vocabulary, the rows may be others."""
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
    both = positions[:, 0] < shape[0]  # of a resized vocabulary, the tokens that both have
    agrees = same(weights.elements(name, positions[both]), _values(expected)[both])
    return None if agrees else f"{name} (other values)"
