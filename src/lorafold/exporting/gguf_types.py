"""The type that each tensor of a GGUF file has, and its bytes.

    F32, F16, BF16                    as they are, or rounded to nearest
    Q8_0, Q5_1, Q5_0, Q4_1, Q4_0      blocks of 32 with a scale, as llama.cpp's quantizer has them

Vectors, and the matrices of routers, are F32 in every file. The output's matrix, or the embedding
that serves as one, has 8 bits a weight where others have fewer: llama.cpp gives it 6 or 8. A matrix
whose rows are no whole blocks is F16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
BLOCK = 32
OUTPUT, EMBEDDING, ROUTER = "output.weight", "token_embd.weight", "ffn_gate_inp.weight"
AT_ONCE = 1 << 22  # weights that are converted together
LARGEST = 65504.0  # of F16


def type_of(name: str, shape: tuple[int, ...], tensors: str, tied: bool) -> str:
    """The type of a tensor.

    Args:
        name: in the file.
        tensors: the type that was asked for.
        tied: the embedding serves as the output's matrix.
    """
    if len(shape) < 2 or name.endswith(ROUTER):
        return "F32"
    if tensors in PLAIN:
        return tensors
    if shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if name == (EMBEDDING if tied else OUTPUT) else tensors


def size_of(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor."""
    import gguf

    per, size = gguf.GGML_QUANT_SIZES[number_of(kind)]
    return int(torch.Size(shape).numel()) // per * size


def number_of(kind: str) -> GGMLQuantizationType:
    """The number that a file has for a type."""
    import gguf

    return gguf.GGMLQuantizationType[kind]


def encoded(name: str, values: Tensor, kind: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor of any shape, in pieces. Raises LorafoldError for values that the type
    does not have.
    """
    import gguf

    rows = values.reshape(-1, values.shape[-1])
    step = max(AT_ONCE // rows.shape[-1], 1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        if kind in PLAIN:
            made = some.to(PLAIN[kind]).contiguous()
            if kind == "F16" and not made.isfinite().all():
                raise LorafoldError(
                    f"gguf: {name} has a value of {float(some.float().abs().max()):.3g}, and F16"
                    f" has none above {LARGEST:,.0f}; expected --tensors BF16 or F32"
                )
            yield made.view(torch.uint8).numpy()
        else:
            yield gguf.quants.quantize(some.float().contiguous().numpy(), number_of(kind))
