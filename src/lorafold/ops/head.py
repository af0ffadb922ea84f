"""Next-token loss at labelled positions only, summed, in chunks whose gradients are computed as
they go.

    loss = sum_i -log softmax(f(h_i))[y_i],   h (n, d) the hidden states of the n labelled
                                              positions, f the model's head, y (n,)

f is the model's own business: Gemma caps its logits, Cohere and Granite scale them, a head may be
tied, biased, quantized or adapted. So the model runs as it is. What its decoder returns is caught
on the way to the head, which sees a single row; then the model is its own head, with the decoder's
work replaced by given hidden states, CHUNK rows at a time. Each chunk is differentiated on the
spot, so logits never exist for more than CHUNK rows, and the backward is one multiplication. A
frozen linear head that agrees with the model on that single row takes a shorter way without a
graph. Use it wherever a causal language model is trained or its loss measured.

1024 rows of SmolLM2-135M's head (V 49,152) in bf16: 31 MB of buffers where whole logits and their
gradients take 600, in 0.8 of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorafold.core.anatomy import decoder_of
from lorafold.core.valueless import telling, valueless
from lorafold.errors import LorafoldError
from lorafold.ops.arithmetic import arithmetic

CHUNK = 256  # rows whose logits exist at a time
SLAB = 2**22  # elements of W that exist in another dtype at a time: 16 MB
BLOCK = 32  # rows whose probabilities exist in fp32 at a time: 32 x 49,152 of them stay in cache
NO_LOSS = -100  # torch's ignore_index


def labelled_loss(model: Any, labels: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The loss in nats summed over the labelled positions, and their number n.

    Differentiable once; n = 0 gives 0 with gradients of 0.

    labels (B, T): the target of each position (already shifted), -100 for none. inputs: keyword
    arguments of the model, input_ids (B, T) among them. model: anything shaped like a transformers
    causal language model. Where config.output_router_logits is set, the model's load-balancing
    loss, times its coefficient and n, is part of the sum. LorafoldError where the model offers no
    decoder or no such loss. To train under DDP or FSDP, wrap a module whose forward calls this
    function.
    """
    h, targets, linear, output = _until_head(model, labels, inputs)
    if linear is not None:
        loss = _LinearHead.apply(h, targets, *linear)
    else:
        with _short_circuit(model) as head:
            loss = _ModelHead.apply(h, targets, head, *_leaves(output.logits))
    return loss + len(targets) * _router_loss(model, output), len(targets)


@torch.no_grad()
def row_losses(model: Any, labels: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss in nats of each row, summed over its labelled positions: (B,). Arguments and errors
    of `labelled_loss`; no router's loss.
    """
    h, targets, linear, _ = _until_head(model, labels, inputs)
    with nullcontext(linear.logits) if linear is not None else _short_circuit(model) as head:
        chunks = zip(h.split(CHUNK), targets.split(CHUNK), strict=True)
        losses = [
            F.cross_entropy(head(x).to(_wide(x)), y, reduction="none") for x, y in chunks if len(x)
        ]
    rows = (labels != NO_LOSS).nonzero()[:, 0].to(h.device)  # (n,)
    return (
        h.new_zeros(len(labels), dtype=_wide(h)).index_add_(0, rows, torch.cat(losses))
        if losses
        else h.new_zeros(len(labels))
    )


def _until_head(
    model: Any, labels: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, _Linear | None, Any]:
    """Hidden states (n, d) and targets (n,) of the labelled positions, the head's linear form if it
    has one, and the model's output.
    """
    with _caught(_decoder(model)) as caught:
        output = model(**inputs, use_cache=False)
    labels = labels.to(caught[0].device)
    h, targets = caught[0][:, -labels.shape[1] :].flatten(0, 1), labels.flatten()
    if not valueless(labels):  # which are all taken for labels
        labelled = targets != NO_LOSS
        h, targets = h[labelled], targets[labelled]
    return h, targets, _linear_form(model, output.logits[0], _last(caught[0])[0]), output


def _decoder(model: Any) -> Any:
    """The module between the token ids and the head."""
    _, decoder = decoder_of(model)
    if decoder is model or model.get_output_embeddings() is None:
        raise LorafoldError(
            f"{type(model).__name__}: found no decoder with a head over it, expected a causal"
            " language model"
        )
    return decoder


@contextmanager
def _caught(decoder: Any) -> Iterator[list[Tensor]]:
    """A list that receives the decoder's hidden states (B, T, d), while the model goes on with the
    last row of them.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> Any:
        caught.append(output.last_hidden_state)
        output.last_hidden_state = _last(output.last_hidden_state)
        return output

    handle = decoder.register_forward_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def _last(h: Tensor) -> Tensor:
    """One position of h (B, T, d), (1, 1, d) with the strides of a tensor of its own: with others
    torch copies the whole head.
    """
    return h.detach()[0, -1].view(1, 1, -1)


class _Given:
    """A decoder's output that holds hidden states and answers None to everything else."""

    def __init__(self, h: Tensor) -> None:
        self.last_hidden_state = h

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _short_circuit(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields f: hidden states (n, d) -> logits (n, V), exactly as the model computes them."""
    given: list[Tensor] = []
    decoder = _decoder(model)

    def forward(*args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> _Given:
        h = given.pop()
        # a model that puts soft prompts before its input may cut as many rows from its output
        prompts = 0 if inputs_embeds is None else inputs_embeds.shape[1] - len(h)
        return _Given(F.pad(h, (0, 0, prompts, 0))[None])

    def head(h: Tensor) -> Tensor:
        given.append(h)
        return model(inputs_embeds=h[None], use_cache=False).logits[0, -len(h) :]

    replaced = decoder.__dict__.get("forward")  # accelerate's hooks live there
    decoder.forward = forward
    try:
        yield head
    finally:
        del decoder.forward
        if replaced is not None:
            decoder.forward = replaced


def _leaves(y: Tensor) -> list[Tensor]:
    """The tensors behind y that collect gradients: whatever of the head is trained, wherever it is
    kept.
    """
    found, seen, ahead = [], set(), [y.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        ahead.extend(parent for parent, _ in node.next_functions)
    return found


def _wide(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _scaled(kept: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """kept * g, multiplied in g's precision: in bf16 the step's 1 / n would be off by up to 0.4%
    for every gradient alike.
    """
    return (kept.to(g.dtype) * g).to(dtype)


class _ModelHead(Function):
    """Any head f, with gradients for h (n, d) and for the leaves that f reads."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *leaves: Tensor
    ) -> Tensor:
        into_h = ctx.needs_input_grad[0]
        total = h.new_zeros((), dtype=_wide(h))
        grads = [torch.zeros_like(t, dtype=_wide(t)) for t in ((h, *leaves) if into_h else leaves)]
        for at in telling(range(0, len(h), CHUNK), h):
            rows = slice(at, at + CHUNK)
            with torch.set_grad_enabled(bool(grads)):
                x = h[rows].detach().requires_grad_(into_h)
                loss = F.cross_entropy(head(x).to(total.dtype), targets[rows], reduction="sum")
            total += loss.detach()
            if grads:
                chunk = torch.autograd.grad(
                    loss, (x, *leaves) if into_h else leaves, allow_unused=True
                )
                for grad, g in zip(
                    [grads[0][rows], *grads[1:]] if into_h else grads, chunk, strict=True
                ):
                    if g is not None:
                        grad += g
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t.dtype for t in (h, *leaves)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grads = list(ctx.saved_tensors)
        gh = _scaled(grads.pop(0), g, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        return (
            gh,
            None,
            None,
            *(_scaled(p, g, dtype) for p, dtype in zip(grads, ctx.dtypes[1:], strict=True)),
        )


class _Linear(NamedTuple):
    """f(h) = cap * tanh(scale * (W h + b) / cap), W (V, d) and b (V,) frozen."""

    w: Tensor
    b: Tensor | None
    scale: float
    cap: float | None

    def logits(self, h: Tensor, space: Tensor | None = None) -> Tensor:
        """h (n, d) -> (n, V), in the dtype that the product is computed in. space (at least n, V):
        of that dtype, to write them to.
        """
        wide = h.to(arithmetic(h) if space is None else space.dtype)
        z = wide.new_empty(len(h), len(self.w)) if space is None else space[: len(h)]
        for rows in self.slabs(wide.dtype):
            torch.mm(wide, self.w[rows].to(wide.dtype).t(), out=z[:, rows])
        if self.b is not None:
            z.add_(self.b)
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def back(self, gz: Tensor) -> Tensor:
        """The gradient (n, V) of W h + b -> that of h (n, d)."""
        gh = gz.new_zeros(len(gz), self.w.shape[1])
        for rows in self.slabs(gz.dtype):
            gh.addmm_(gz[:, rows], self.w[rows].to(gz.dtype))
        return gh

    def slabs(self, dtype: torch.dtype) -> list[slice]:
        """Runs of W's rows to multiply at a time: all of them where that takes no copy."""
        step = len(self.w) if dtype is self.w.dtype else max(1, SLAB // self.w.shape[1])
        return [slice(at, at + step) for at in telling(range(0, len(self.w), step), self.w)]


def _linear_form(model: Any, logits: Tensor, h: Tensor) -> _Linear | None:
    """The head in linear form if it is frozen and has one: if that form's logits for h (1, d) are
    those that the model computed.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if (
        logits.requires_grad
        or type(layer) is not nn.Linear
        or not isinstance(layer.weight, nn.Parameter)
    ):
        return None
    if (layer.weight.dtype, layer.weight.device, layer.in_features) != (
        h.dtype,
        h.device,
        h.shape[-1],
    ):
        return None
    scale = getattr(model, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    linear = _Linear(
        layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None)
    )
    with torch.no_grad():
        expected, found = logits.to(_wide(h)), linear.logits(h).to(_wide(h))
        close = expected.shape == found.shape and (
            valueless(h)
            or bool((found - expected).norm() <= 4 * torch.finfo(h.dtype).eps * expected.norm())
        )
    return linear if close else None


class _LinearHead(Function):
    """A frozen linear head, without an autograd graph: probabilities and their gradient share one
    buffer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        targets: Tensor,
        w: Tensor,
        b: Tensor | None,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        linear = _Linear(w, b, scale, cap)
        total = h.new_zeros((), dtype=_wide(h))
        gh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        buffer = h.new_empty(BLOCK, len(w), dtype=total.dtype)
        space = h.new_empty(min(CHUNK, len(h)), len(w), dtype=arithmetic(h))
        for at in telling(range(0, len(h), CHUNK), h):
            z = linear.logits(h[at : at + CHUNK], space)
            for z_block, y in telling(
                zip(z.split(BLOCK), targets[at : at + CHUNK, None].split(BLOCK), strict=True), h
            ):
                p = z_block if z.dtype is total.dtype else buffer[: len(z_block)].copy_(z_block)
                top, z_y = p.amax(-1), p.gather(1, y)[:, 0]
                # of the cap, 1 - (z / cap)^2
                slope = None if cap is None else (p / -cap).mul_(p).div_(cap).add_(1)
                torch.softmax(p, -1, out=p)
                # log sum exp(z) = top - log p(top), without another pass of exp
                total += (top - p.amax(-1).log() - z_y).sum()
                if gh is None:
                    continue
                p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
                if slope is not None:
                    p.mul_(slope)
                if scale != 1.0:
                    p.mul_(scale)
                if p is not z_block:
                    z_block.copy_(p)
            if gh is not None:
                gh[at : at + CHUNK] = linear.back(z)
        ctx.save_for_backward(gh)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (gh,) = ctx.saved_tensors
        return _scaled(gh, g, gh.dtype), None, None, None, None, None


def _router_loss(model: Any, output: Any) -> Tensor | float:
    """The load-balancing loss of a mixture of experts as the model itself would add it; 0 where it
    adds none.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    aux, coefficient = (
        getattr(output, "aux_loss", None),
        getattr(config, "router_aux_loss_coef", None),
    )
    if aux is None or coefficient is None:
        raise LorafoldError(
            f"{type(model).__name__}: config.output_router_logits is set; found aux_loss {aux},"
            f" router_aux_loss_coef {coefficient}; expected both. Set output_router_logits to false"
            " to train without the router's loss"
        )
    return coefficient * aux
