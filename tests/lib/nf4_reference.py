"""4-bit NormalFloat (NF4) in plain torch: the specification, byte for byte, of a 4-bit base's
storage, as the oracle of faster implementations (bitsandbytes). `lorafold.ops.nf4` has the levels.

    W (out, in), flattened, in blocks of 64:    c = max |w| of a block (fp32)
    code = the k with level[k] nearest to w / c, the lower one on a tie;
        two codes a byte, the first in the high nibble
    double quantization, of the constants in blocks of 256: c ~ m + d map[e]
        m = mean c, d = max |c - m|, e 8 bits
    W ~ level[code] * c         4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight

Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3. The 8-bit levels: Dettmers et al. 2021,
8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.ops.nf4 import BLOCK, BLOCK_OF_CONSTANTS, levels


def dynamic_map() -> Tensor:
    """The 256 levels (256,) of the 8-bit code, ascending, fp32: 0, 1 and, for e = 0 .. 6,
    +- 10^(e - 6) times the centres of 2^e bins of [0.1, 1].

    They are fine near zero and coarse at the ends. There is no -1; the lowest level is -0.993.
    """
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    positive = torch.cat(
        [10.0 ** (e - 6) * ((edge[:-1] + edge[1:]) / 2) for e, edge in enumerate(edges)]
    )
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


def normalized(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """w, of any shape -> w / c (blocks, block) in fp32, with the last block padded with zeros, and
    c (blocks,).
    """
    flat = w.flatten().float()
    x = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    c = x.abs().amax(1)
    # clamped, so that a block of zeros stays zero; kernels multiply by the reciprocal too
    return x * (1 / c.clamp(min=1e-38))[:, None], c


def nearest(x: Tensor, level: Tensor) -> Tensor:
    """The index (uint8, x's own shape) of the nearest of the ascending levels (n,); of two that are
    equally near, the lower one.
    """
    return torch.bucketize(x, ((level[:-1] + level[1:]) / 2).to(x.device)).to(torch.uint8)


@dataclass(frozen=True)
class BlockConstants:
    """Block constants in 8 bits."""

    codes: Tensor  # (blocks,) uint8
    absmax: Tensor  # (blocks / 256,) fp32
    mean: Tensor  # () fp32

    def dense(self) -> Tensor:  # (blocks,)
        """The dequantized constants (blocks,), fp32."""
        level = dynamic_map().to(self.codes.device)[self.codes.int()]
        return level * self.absmax.repeat_interleave(BLOCK_OF_CONSTANTS)[: len(level)] + self.mean


@dataclass(frozen=True)
class NF4Tensor:
    """A tensor of `shape` in NF4."""

    codes: Tensor  # (elements / 2,) uint8, the first of two elements in the high nibble
    constants: BlockConstants | Tensor  # (blocks,)
    shape: torch.Size
    block: int


def quantize(w: Tensor, block: int = BLOCK, double: bool = True) -> NF4Tensor:
    """Quantize a finite tensor w of any shape to NF4, with double quantization of the block
    constants if wanted.
    """
    x, c = normalized(w, block)
    # the last byte of an odd number of elements is padded with the code of zero
    code = nearest(x, levels()).flatten()[: w.numel() + w.numel() % 2]
    constants: BlockConstants | Tensor = c
    if double:
        y, d = normalized(c - c.mean(), BLOCK_OF_CONSTANTS)
        constants = BlockConstants(nearest(y, dynamic_map()).flatten()[: len(c)], d, c.mean())
    return NF4Tensor(code[::2] << 4 | code[1::2], constants, w.shape, block)


def dequantize(q: NF4Tensor, dtype: torch.dtype) -> Tensor:  # (any shape)
    """The tensor of `q.shape` that the codes represent, computed in fp32 and rounded once."""
    code = torch.stack([q.codes >> 4, q.codes & 15], 1).flatten()[: q.shape.numel()]
    c = q.constants.dense() if isinstance(q.constants, BlockConstants) else q.constants
    level = levels().to(code.device)[code.int()]
    return (level * c.repeat_interleave(q.block)[: len(level)]).view(q.shape).to(dtype)


def bits_per_weight(block: int = BLOCK, double: bool = True) -> float:
    """The bits per weight of a large tensor: 4.127 with double quantization in blocks of 64, 4.5
    without.
    """
    return 4 + (8 / block + 32 / (block * BLOCK_OF_CONSTANTS) if double else 32 / block)
