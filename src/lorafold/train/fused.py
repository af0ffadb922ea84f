"""A model's norms, rotary embeddings, gated MLPs and frozen linears, run by fused operations while
it trains.

    with fused(model) as found:
        print(found)                        # fast path: 30 of 30 blocks

Nothing is known by a model's name. A part is taken over if it has the structure and, given random
numbers, answers as the fused operation does; any other runs as it is, and so does one that carries
a delta or whose weight is trained. When the `with` ends the model is as it was.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.bases import is_linear, layer_of
from lorafold.core.attach import Adapted
from lorafold.core.presets import bare_modules, blocks
from lorafold.core.valueless import valueless
from lorafold.ops.gated import ACTIVATIONS, gated
from lorafold.ops.norm import rms_norm
from lorafold.ops.rotary import rotary
from lorafold.train.asking import asking

ROTARY = "apply_rotary_pos_emb"  # what model files of transformers call it
Forward = Callable[..., Any]


@dataclass(frozen=True)
class FastPath:
    """How many blocks run norms, MLP and rotary embedding fused, and which of these the others
    lack.
    """

    fast: int
    blocks: int
    plain: tuple[str, ...]

    def __str__(self) -> str:
        lacking = f"; as the model's own code has it: {', '.join(self.plain)}" if self.plain else ""
        return f"fast path: {self.fast} of {self.blocks} blocks{lacking}"


@contextmanager
def fused(model: nn.Module) -> Iterator[FastPath]:
    """Fuse what can be fused until the `with` ends."""
    inside = [
        [module for _, module in bare_modules(model.get_submodule(path))] for path in blocks(model)
    ]
    with ExitStack() as stack:
        with asking(model):
            found = [
                {part for module in block if _free(module) for part in _fuse(stack, module)}
                for block in inside
            ]
            files = {_file(module) for block in inside for module in block}
            for module in (module for block in inside for module in block if _free(module)):
                _put(stack, module, "forward", _linear(module))
            _put(stack, *_trained_head(model))
            rotated = {
                file
                for file in files
                if _put(stack, file, ROTARY, _fused_rotary(getattr(file, ROTARY, None)))
            }
        for parts, block in zip(found, inside, strict=True):
            parts |= (
                {"rotary embedding"} if any(_file(module) in rotated for module in block) else set()
            )
        wanted = {*PARTS, "rotary embedding"}
        lacking = set[str]().union(*(wanted - parts for parts in found))
        yield FastPath(sum(parts == wanted for parts in found), len(found), tuple(sorted(lacking)))


def _file(module: nn.Module) -> ModuleType:
    return sys.modules[type(module).__module__]


def _free(module: nn.Module) -> bool:
    """Does it run its class's own forward, on one input, with a weight that stays?"""
    trained = any(p is not None and p.requires_grad for p in module._parameters.values())
    own = not (trained or isinstance(module, Adapted) or "forward" in vars(module))
    # some norms take a gate too
    return own and len(inspect.signature(module.forward).parameters) == 1


def _fuse(stack: ExitStack, module: nn.Module) -> Iterator[str]:
    """The kinds of part that this module is, and is fused as from now on."""
    return (part for part, fuse in PARTS.items() if _put(stack, module, "forward", fuse(module)))


def _put(stack: ExitStack, owner: Any, name: str, forward: Forward | None) -> bool:
    """Set it until the stack unwinds."""
    if forward is None:
        return False
    own, before = name in vars(owner), getattr(owner, name)
    stack.callback(setattr, owner, name, before) if own else stack.callback(delattr, owner, name)
    setattr(owner, name, forward)
    return True


def _agree(forward: Forward, plain: Forward, *inputs: Tensor) -> bool:
    """Do they answer alike, up to the roundings of a few operations? Without values they are taken
    to: such a model is what it seems.
    """
    if valueless(inputs[0]):
        return True
    answers = (f(*inputs) for f in (forward, plain))
    found, expected = (y if isinstance(y, Tensor) else torch.stack(y) for y in answers)
    close = (
        found.shape == expected.shape
        and (found - expected).norm() <= 4 * torch.finfo(expected.dtype).eps * expected.norm()
    )
    return bool(close)


def _random(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def _trained_head(model: nn.Module) -> tuple[Any, str, Forward | None]:
    """The head, where it is trained without a delta of its own, as one that is tied to a trained
    embedding: `ops.head` has a shorter way for a frozen one only.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    bare = head is not None and not isinstance(head, Adapted) and "forward" not in vars(head)
    trained = bare and any(p.requires_grad for p in head.parameters())
    return head, "forward", _linear(head) if trained else None


def _linear(module: nn.Module) -> Forward | None:
    """The forward of a linear that no delta lies on: in the numbers that this processor multiplies
    faster, and from packed ones as well.
    """
    return layer_of(module) if is_linear(module) else None


def _fused_norm(module: nn.Module) -> Forward | None:
    """The forward of a root mean square norm, whose gain is its weight or 1 + its weight."""
    weight, eps = (
        module._parameters.get("weight"),
        getattr(module, "variance_epsilon", getattr(module, "eps", None)),
    )
    if (
        len(module._parameters) != 1
        or weight is None
        or weight.dim() != 1
        or not isinstance(eps, float)
    ):
        return None
    # in the second row eps counts
    x = _random(2, len(weight), like=weight) * torch.tensor([[1.0], [eps**0.5]]).to(weight)
    for gain in (lambda: weight, lambda: 1 + weight.float()):
        forward = partial(_normed, gain, eps)
        if all(_agree(forward, module, row) for row in x):
            return forward
    return None


def _normed(gain: Callable[[], Tensor], eps: float, x: Tensor) -> Tensor:
    return rms_norm(x, gain(), eps)


def _fused_mlp(module: nn.Module) -> Forward | None:
    """The forward of down(act(gate(x)) * up(x)), by the names that transformers gives the parts."""
    parts = dict(module.named_children())
    if set(parts) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    gate, up, down, act = (parts[name] for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    z = torch.linspace(-6, 6, 97)
    known = next((known for known in ACTIVATIONS.values() if _agree(known.forward, act, z)), None)
    width = getattr(gate, "in_features", None)
    if known is None or not isinstance(width, int):
        return None

    def forward(x: Tensor) -> Tensor:
        return down(gated(gate(x), up(x), known))

    # a packed MLP may hold no number to take the dtype of: its activations have 16 bits
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.bfloat16)
    x = _random(
        1, 2, width, like=torch.empty(0, dtype=dtype, device=next(module.parameters()).device)
    )
    return forward if _agree(forward, module, x) else None


def _fused_rotary(plain: Forward | None) -> Forward | None:
    """The function that rotates queries and keys, (B, H, T, D) or with H and T exchanged, by the
    halves of D.
    """
    if plain is None or [*inspect.signature(plain).parameters] != [
        "q",
        "k",
        "cos",
        "sin",
        "unsqueeze_dim",
    ]:
        return None

    def forward(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    q, cos, sin = (_random(1, 3, 8, like=torch.empty(0)) + i for i in range(3))
    return forward if _agree(forward, plain, q[None], q[None], cos, sin) else None


PARTS = {"norms": _fused_norm, "MLP": _fused_mlp}
