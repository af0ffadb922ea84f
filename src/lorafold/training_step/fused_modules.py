"""Replaces norms, rotary embeddings, gated MLPs and frozen linear layers by fused operations
during training.

A norm, rotary embedding or MLP is replaced if it has the expected structure and gives the same
output, up to rounding, as the fused operation on test inputs. Norms, MLPs and linear layers with a
delta or a trained weight of their own keep their code, except a trained head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy, beneath
from lorafold.core.attach import Adapted
from lorafold.core.contexts import evaluating, is_fake, replace_attribute
from lorafold.core.expert_matrices import expert_parameters
from lorafold.kernels.registry import TRAINING, enable
from lorafold.layers import is_linear, layer_of
from lorafold.ops.elementwise import ACTIVATIONS, gated, rms_norm, rotary

ROTARY = "apply_rotary_pos_emb"  # the function's name in the model files of transformers
Forward = Callable[..., Any]


@dataclass(frozen=True)
class FastPath:
    """The coverage of `fused`: `fast` of `blocks` transformer blocks (not counting those of vision
    and audio encoders) are fully fused. `plain` lists the unfused parts of the others. `in_torch`
    is the reason why PyTorch operators are used instead of lorafold's kernels, or empty.
    """

    fast: int
    blocks: int
    plain: tuple[str, ...]
    in_torch: str = ""

    def __str__(self) -> str:
        lacking = f"; not fused: {', '.join(self.plain)}" if self.plain else ""
        slower = f"; PyTorch operators are used: {self.in_torch}" if self.in_torch else ""
        return f"fast path: {self.fast} of {self.blocks} blocks{lacking}{slower}"


@contextmanager
def fused(
    model: nn.Module,
    linears: bool = True,
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotary,
    gate: Callable[[Tensor, Tensor, str], Tensor] = gated,
) -> Iterator[FastPath]:
    """Context manager that replaces all modules that can be fused, and yields the coverage.

    Args:
        linears: whether to fuse frozen linear layers and the head.
        norm: a replacement for `lorafold.ops.elementwise.rms_norm`, on inputs (..., d).
        rotate: a replacement for `lorafold.ops.elementwise.rotary`, on inputs (B, H, T, D).
        gate: a replacement for `lorafold.ops.elementwise.gated`, on inputs (..., k).
    """
    rotation = cache(partial(fused_rotary, rotate))  # one result per function of transformers
    # the part's name, the replaced attribute, whether the module must be frozen and unadapted, and
    # a function that returns the fused form or None
    parts: tuple[tuple[str, str, bool, Callable[[nn.Module], Forward | None]], ...] = (
        ("norms", "forward", True, partial(_fused_norm, norm)),
        ("MLP", "forward", True, partial(_fused_mlp, gate)),
        ("MLP", "_apply_gate", False, partial(_fused_gate, gate)),
        ("rotary embedding", "forward", False, partial(_rotated, rotation)),
    )
    kinds = {p.device.type for p in model.parameters()}
    reason = "; ".join(filter(None, (enable(TRAINING, kind) for kind in sorted(kinds))))
    anatomy = Anatomy.of(model)
    blocks, outer = {path: list[nn.Module]() for path in anatomy.blocks}, ""
    for path, module in anatomy.modules:
        outer = path if path in blocks else outer
        if outer and f"{path}.".startswith(f"{outer}."):
            blocks[outer].append(module)
    lacking = {path: {part for part, *_ in parts} for path in blocks}
    with ExitStack() as stack:
        with evaluating(model):
            for part, name, strict, fuse in parts:
                for path, block in blocks.items():
                    for module in block:
                        if (_is_plain(module) or not strict) and (form := fuse(module)) is not None:
                            replace_attribute(stack, module, name, form)
                            lacking[path].discard(part)
            if linears:
                plain = [m for block in blocks.values() for m in block if _is_plain(m)]
                head: Any = getattr(model, "get_output_embeddings", lambda: None)()
                adapted = head is None or isinstance(head, Adapted)
                if not adapted and "forward" not in vars(head):  # whether it is trained or not
                    plain.append(head)
                for module in filter(is_linear, plain):
                    # `called` uses the fastest dtype of this processor, for any weight format
                    layer = layer_of(module)
                    replace_attribute(stack, module, "forward", partial(layer.called, layer))
        counted = [*filter(beneath(anatomy.language_blocks), blocks)]
        fast = sum(not lacking[path] for path in counted)
        plain_parts = set[str]().union(*(lacking[path] for path in counted))
        yield FastPath(fast, len(counted), tuple(sorted(plain_parts)), reason)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is frozen and unadapted, and runs its class's forward on one input."""
    trained = any(p is not None and p.requires_grad for p in module._parameters.values())
    unchanged = not (trained or isinstance(module, Adapted) or "forward" in vars(module))
    # one input, because some norms also take a gate, which the fused norm does not support
    return unchanged and len(inspect.signature(module.forward).parameters) == 1


def _agree(forward: Forward, plain: Forward, *inputs: Tensor) -> bool:
    """Whether the outputs are equal up to rounding; always true for fake tensors."""
    if is_fake(inputs[0]):
        return True
    outputs = (f(*inputs) for f in (forward, plain))
    y, expected = (y if isinstance(y, Tensor) else torch.stack(y) for y in outputs)
    allowed = 4 * torch.finfo(expected.dtype).eps * expected.norm()
    return y.shape == expected.shape and bool((y - expected).norm() <= allowed)


def _fused_norm(norm: Forward, module: nn.Module) -> Forward | None:
    """The fused forward of an RMS norm; None for other modules."""
    found = rms_gain(norm, module)
    return None if found is None else lambda x: norm(x, found[0](), found[1])


def rms_gain(norm: Forward, module: nn.Module) -> tuple[Callable[[], Tensor], float] | None:
    """A function that returns the gain (d,) of an RMS norm, `weight` or 1 + `weight`, and its eps;
    None for other modules.
    """
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = len(module._parameters) == 1 and weight is not None and weight.dim() == 1
    if weight is None or not alone or not isinstance(eps, float):
        return None
    inputs = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    # the second input is so small that eps matters
    inputs *= torch.tensor([[1.0], [eps**0.5]]).to(weight)
    for gain in (lambda: weight, lambda: 1 + weight.float()):
        if all(_agree(lambda x, gain=gain: norm(x, gain(), eps), module, x) for x in inputs):
            return gain, eps
    return None


def activation_of(act: nn.Module) -> str | None:
    """The key in ACTIVATIONS of the function that a module computes, or None."""
    z = torch.linspace(-6, 6, 97)
    return next((name for name, f in ACTIVATIONS.items() if _agree(f.forward, act, z)), None)


def _fused_mlp(gating: Forward, module: nn.Module) -> Forward | None:
    """The fused forward of an MLP down(act(gate(x)) * up(x)); None for other modules."""
    parts, names = dict(module.named_children()), ("gate_proj", "up_proj", "down_proj", "act_fn")
    if parts.keys() != {*names}:
        return None
    gate, up, down, act = map(parts.__getitem__, names)
    activation, width = activation_of(act), getattr(gate, "in_features", None)
    if activation is None or not isinstance(width, int):
        return None

    def forward(x: Tensor) -> Tensor:
        return down(gating(gate(x), up(x), activation))

    # a quantized MLP may have no floating-point parameter; its activations are 16-bit
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.bfloat16)
    x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0))
    x = x.to(next(module.parameters()).device, dtype)
    return forward if _agree(forward, module, x) else None


def _fused_gate(gating: Forward, module: nn.Module) -> Forward | None:
    """The fused act(gate) * up of an MoE experts module, in which gate and up are the halves of u
    (S, 2 k); None for other modules.
    """
    plain: Any = getattr(module, "_apply_gate", None)
    known_gate = plain is not None and plain.__func__.__name__ == "_default_apply_gate"
    if not known_gate or not expert_parameters(module):
        return None
    u = torch.linspace(-6, 6, 64).view(2, 32)
    for known in ACTIVATIONS:

        def forward(u: Tensor, known: str = known) -> Tensor:
            gate, up = u.chunk(2, dim=-1)
            return gating(gate, up, known)

        if _agree(forward, plain, u):
            return forward
    return None


def _rotated(rotation: Callable[[Forward], Forward | None], module: nn.Module) -> Forward | None:
    """A copy of an attention module's forward that calls the fused rotary embedding, or None."""
    if isinstance(module, Adapted) or "forward" in vars(module):
        return None
    own = inspect.unwrap(type(module).forward)  # without wrappers for deprecated arguments
    plain = rotary_of(module)
    if plain is None or (fused := rotation(plain)) is None:
        return None
    names = {**own.__globals__, ROTARY: fused}
    copied = FunctionType(own.__code__, names, "forward", own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copied, module)


def rotary_of(module: nn.Module) -> Forward | None:
    """The function of transformers by which an attention module rotates, or None."""
    own = inspect.unwrap(type(module).forward)
    if not isinstance(own, FunctionType) or ROTARY not in own.__code__.co_names:
        return None
    found = own.__globals__[ROTARY]
    if isinstance(found, nn.Module):  # of the package kernels, around the function
        return inspect.getclosurevars(type(found).forward).nonlocals.get("func")
    return found


def fused_rotary(rotate: Forward, plain: Forward) -> Forward | None:
    """The fused rotary embedding of queries and keys, (B, H, T, D) or (B, T, H, D); None if `plain`
    does not rotate the two halves of D.
    """
    if [*inspect.signature(plain).parameters] != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return None

    def forward(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    q = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    with suppress(RuntimeError):  # `plain` expects another size of cos and sin
        if _agree(forward, plain, q[None], q[None], q + 1, q + 2):
            return forward
    return None
