"""The bytes of one step as they were traced, from which the terms of an estimate follow."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Traced:
    """The bytes that a step takes.

    weights, adapter, optimizer, gradients: The tensors of each.
    ahead: Gradients that exist before the forward pass.
    kept: Activations that exist when the forward pass is done.
    kv_cache: Keys and values of inference.
    engine: What draws completions beside the step, without keys and values.
    slots: Keys and values of completions that are drawn before the step.
    drawing: The peak meanwhile beyond weights, adapter, optimizer and engine.
    forward, backward: The peak in either pass beyond weights, adapter and optimizer. For inference
        these are the forward passes of the prompt and of the token after it.
    late: The same in the second half of the backward pass.
    exchanged: What is gathered from other processes and on its way to them.
    process: What the process holds besides tensors.

    forward_operations, backward_operations are no bytes, but the multiplications and additions of
    either pass in products of matrices.
    """

    weights: int
    adapter: int = 0
    optimizer: int = 0
    gradients: int = 0
    ahead: int = 0
    kept: int = 0
    kv_cache: int = 0
    forward: int = 0
    backward: int = 0
    late: int = 0
    engine: int = 0
    slots: int = 0
    drawing: int = 0
    exchanged: int = 0
    process: int = 0
    forward_operations: int = 0
    backward_operations: int = 0

    @property
    def in_backward(self) -> bool:
        """Whether the peak is in the backward pass."""
        return max(self.backward, self.late) > self.forward and not self.in_drawing

    @property
    def in_drawing(self) -> bool:
        """Whether the peak is while completions are drawn."""
        return self.drawing > max(self.forward, self.backward, self.late)

    @property
    def peak(self) -> int:
        """The largest of the peaks."""
        return max(self.forward, self.backward, self.late, self.drawing)

    def at(self, other: Traced, blocks: tuple[int, int, int]) -> Traced:
        """Extrapolate to blocks[2] blocks, given that this is for blocks[0] blocks and the other
        for blocks[1].
        """
        a, b, n = blocks
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Traced(*(x + (y - x) * (n - a) // (b - a) for x, y in pairs))

    def a_block(self, other: Traced, more: int) -> Traced:
        """What one block takes, given that the other is for so many blocks more."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Traced(*((y - x) // more for x, y in pairs))
