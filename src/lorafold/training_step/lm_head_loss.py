"""The next-token loss at labelled positions only, in chunks, so that the full logits never exist.

    loss = sum_i -log softmax(f(h_i))[y_i],   h (n, d) the hidden states of the n labelled
                                              positions, f the model's head, y (n,)

The model itself computes f, including soft caps and scales: a hook captures the decoder's hidden
states and passes on only the last position; then the model runs once per chunk, with the chunk as
its decoder's output. A frozen linear head is computed directly if its logits agree with the
model's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.contexts import is_fake, replace_attribute
from lorafold.data.examples import NO_LOSS
from lorafold.errors import LorafoldError
from lorafold.ops.arithmetic import FEW
from lorafold.ops.autocast import at_least_fp32
from lorafold.ops.cross_entropy import (
    LinearHead,
    chunks,
    head_cross_entropy,
    head_losses,
    linear_cross_entropy,
)
from lorafold.ops.host_tensors import on_host, rows_at, send


class _HeadAgreement(NamedTuple):
    """The result of comparing a head's linear form with the model, for one state of the head."""

    model: ref[Any]
    weight: ref[Tensor]
    key: tuple[Any, ...]
    agree: bool


_head_agreements: WeakKeyDictionary[nn.Module, _HeadAgreement] = WeakKeyDictionary()


def linear_form(model: Any, logits: Tensor, h: Tensor) -> LinearHead | None:
    """The head's linear form, if the head is frozen and the form gives the model's `logits` for h
    (1, d); otherwise None.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    plain = type(layer) is nn.Linear and isinstance(w := layer.weight, nn.Parameter)
    if logits.requires_grad or not plain:
        return None
    if (w.dtype, w.device, layer.in_features) != (h.dtype, h.device, h.shape[-1]):
        return None
    scale = getattr(model, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    linear = LinearHead(w, layer.bias, scale, getattr(config, "final_logit_softcapping", None))
    with torch.no_grad():
        if is_fake(h):
            return linear if logits.shape == linear.logits(h).shape else None
        # cached, because reading the result synchronizes with the device
        key, known = (w._version, linear.scale, linear.cap), _head_agreements.get(layer)
        is_cached = known is not None and known.model() is model and known.weight() is w
        if known is None or not is_cached or known.key != key:
            z = linear.logits(h)
            agree = z.shape == logits.shape
            if agree:  # up to rounding
                wide = logits.to(at_least_fp32(z))
                error = (z.to(wide) - wide).norm()
                agree = bool(error <= 4 * torch.finfo(z.dtype).eps * wide.norm())
            _head_agreements[layer] = known = _HeadAgreement(ref(model), ref(w), key, agree)
    return linear if known.agree else None


def labelled_loss(
    model: Any, labels: Tensor, inputs: Mapping[str, Tensor], counts: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Returns the next-token loss in nats, summed over the n labelled positions of labels (B, T),
    and n. The label of all other positions is -100.

    With `counts` (B, T), positions are weighted, and n is the sum of the weights. `rows` (B, T) is
    the number of rows that share each position; it weights tokens in the load-balancing loss, which
    is multiplied by n and added.

    Without `counts`, or for a frozen linear head, the forward pass computes each chunk's gradients
    with its logits, so there is no second derivative. For DDP or FSDP, wrap a module whose forward
    calls this function.
    """
    h, targets, linear, output = run_decoder(model, labels, inputs)
    if linear is not None:
        losses = linear_cross_entropy(h, targets, linear)
    elif counts is not None:
        losses = head_losses(h, targets, partial(head_logits, model))
    else:
        with _decoder_bypassed(model) as head:
            losses = head_cross_entropy(h, targets, head, _leaves(output.logits), _chunks(h))
    if counts is None:
        loss, n = losses.sum(), len(targets)
    else:
        each = on_host(counts)[on_host(labels) != NO_LOSS]
        loss, n = losses @ send(each, h.device).to(losses.dtype), int(each.sum())
    return loss + n * balancing_loss(model, output, rows), n


def token_losses(
    model: Any, labels: Tensor, inputs: Mapping[str, Tensor], own: bool = False,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The next-token loss in nats of each labelled position, (n,), without second derivatives. The
    backward pass recomputes the logits of a trained or adapted head, so the same adapters must be
    active. With `own`, the model itself computes the logits, in matmuls large enough to be
    bit-identical to sampling.
    """
    h, targets, linear, _ = run_decoder(model, labels, inputs)
    if linear is not None and not own and (temperature == 1 or linear.cap is None):
        scaled = linear._replace(scale=linear.scale / temperature)
        return linear_cross_entropy(h, targets, scaled)
    head = partial(head_logits, model, least=FEW if own else 0)
    return head_losses(h, targets, head, temperature)


def document_losses(
    model: Any, labels: Tensor, inputs: Mapping[str, Tensor], document: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The sum of `token_losses` and the number of labelled positions of each of n documents, (n,)
    each. document (B, T) is the document index of each position; negative ones do not count.
    """
    if is_fake(labels):
        losses, of = token_losses(model, labels, inputs), document.flatten()
    else:
        counted = on_host(labels).masked_fill(on_host(document) < 0, NO_LOSS)
        losses = token_losses(model, send(counted, labels.device), inputs)
        of = send(at_labels(document, counted), losses.device)
    return (
        losses.new_zeros(n).index_add(0, of, losses),
        of.new_zeros(n).index_add(0, of, torch.ones_like(of)),
    )


def run_decoder(
    model: Any, labels: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, LinearHead | None, Any]:
    """The hidden states (n, d) and targets (n,) at labelled positions, the head's linear form or
    None, and the model's output.
    """
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: Any, output: Any) -> Any:
        h = output.last_hidden_state
        # with the strides of h, torch would copy the whole weight of the head
        output.last_hidden_state = last = h.detach()[0, -1].view(1, 1, -1)
        captured.extend((h, last))
        return output

    with _decoder(model).register_forward_hook(capture):
        output = model(**inputs, use_cache=False)
    h, last, *_ = captured
    h = h[:, -labels.shape[1] :].flatten(0, 1)
    if is_fake(labels):  # fake tensors have no values, so all positions count as labelled
        targets = labels.flatten()
    else:
        targets = on_host(labels).flatten()
        places = (targets != NO_LOSS).nonzero()[:, 0]
        h, targets = rows_at(h, send(places, h.device)), send(targets[places], h.device)
    return h, targets, linear_form(model, output.logits[0], last[0]), output


def at_labels(x: Tensor, labels: Tensor) -> Tensor:
    """The values of x (B, T) at the labelled positions (n,) of labels (B, T), on the host."""
    return on_host(x)[on_host(labels) != NO_LOSS]


def _chunks(h: Tensor) -> list[slice]:
    """The chunks of positions; for fake tensors only the last three, which contain the memory peak.
    """
    return chunks(len(h))[-3:] if is_fake(h) else chunks(len(h))


def _decoder(model: Any) -> Any:
    anatomy = Anatomy.of(model)
    if not anatomy.decoder or anatomy.head is None:
        raise LorafoldError(
            f"{type(model).__name__}: found no decoder with an LM head, expected a causal"
            " language model"
        )
    return model.get_submodule(anatomy.decoder)


class _DecoderOutput:
    """A decoder's output with hidden states; every other attribute is None."""

    def __init__(self, h: Tensor) -> None:
        self.last_hidden_state = h

    def __getitem__(self, index: int | str) -> Tensor | None:
        return self.last_hidden_state if index in (0, "last_hidden_state") else None

    def keys(self) -> tuple[str, ...]:
        return ("last_hidden_state",)

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _decoder_bypassed(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields f: hidden states (n, d) -> logits (n, V), computed by the model itself."""
    hidden_states: list[Tensor] = []
    decoder = _decoder(model)

    def forward(*args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> _DecoderOutput:
        h = hidden_states.pop()
        # a model with soft prompts may remove as many positions from its output
        prompts = 0 if inputs_embeds is None else inputs_embeds.shape[1] - len(h)
        return _DecoderOutput(F.pad(h, (0, 0, prompts, 0))[None])

    def head(h: Tensor) -> Tensor:
        hidden_states.append(h)
        return model(inputs_embeds=h[None], use_cache=False).logits[0, -len(h) :]

    with ExitStack() as stack:
        replace_attribute(stack, decoder, "forward", forward)
        yield head


def head_logits(model: Any, h: Tensor, least: int = 0) -> Tensor:
    """The logits (n, V) of hidden states h (n, d), padded to at least `least` rows."""
    with _decoder_bypassed(model) as head:
        return head(F.pad(h, (0, 0, 0, max(0, least - len(h)))))[: len(h)]


def _leaves(y: Tensor) -> list[Tensor]:
    """The leaf tensors with gradients that y depends on: the trained tensors of the head."""
    leaves, visited, pending = [], set(), [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        pending.extend(parent for parent, _ in node.next_functions)
    return leaves


def has_balancing_loss(model: Any) -> bool:
    config = getattr(model, "config", None)
    return config is not None and getattr(config.get_text_config(), "output_router_logits", False)


def weights_balancing(model: Any) -> bool:
    """Whether transformers has a function for the load-balancing loss that can weight tokens."""
    return _balancing_function(model) is not None and hasattr(model, "num_experts_per_tok")


def balancing_loss(model: Any, output: Any, rows: Tensor | None = None) -> Tensor | float:
    """The load-balancing loss () times its coefficient, or 0 if the model has none. rows (B, T)
    weights the tokens.
    """
    if not has_balancing_loss(model):
        return 0.0
    config = model.config.get_text_config()
    aux = getattr(output, "aux_loss", None)
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if aux is None or coefficient is None:
        raise LorafoldError(
            f"{type(model).__name__}: config.output_router_logits needs aux_loss and"
            f" router_aux_loss_coef, found {aux} and {coefficient}; set output_router_logits to"
            " false to train without the router's loss"
        )
    if rows is not None and (function := _balancing_function(model)) is not None:
        aux = function(output.router_logits, model.num_experts, model.num_experts_per_tok, rows)
    return coefficient * aux


def _balancing_function(model: Any) -> Callable[..., Any] | None:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
