"""Attention over documents packed into one sequence, each attending only to itself.

A packed batch has ids (1, T) and positions (1, T) that restart at 0 in each document. The mask
function finds the documents on the host with transformers' mask predicate (a document begins at i
if i can't attend to i - 1), and passes a `Documents` to the attention function instead of a (T, T)
mask. Padding, caches, sinks, position bias and dropout need general attention with a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lorafold.core.contexts import evaluating
from lorafold.errors import LorafoldError, truncate
from lorafold.ops.attention import document_attention
from lorafold.ops.host_tensors import on_host
from lorafold.ops.packed_documents import Documents
from lorafold.training_step.score_head import run_to_head

log = logging.getLogger(__name__)
NAME = "lorafold_documents"
HOST = torch.device("cpu")
# the names of transformers' functions
FIND, REMAP = "find_packed_sequence_indices", "remap_positions_for_packed_sequence"


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[bool]:
    """Restricts the model's attention to each packed document and yields True. If the model can't
    do this, leaves it unchanged and yields False.
    """
    if not isolates(model):
        yield False
        return
    with attending(model, document_mask):
        yield True


def isolates(model: PreTrainedModel) -> bool:
    """Whether a document has the same outputs alone and packed with another document, tested with
    two documents.
    """
    n, m = 11, 13
    first, other, second = random_ids(model, 2 * n + m).split([n, n, m])
    documents = Documents((n, m))
    try:
        with evaluating(model):
            rows = [packed_logits(model, row, Documents((len(row),))) for row in (first, second)]
            with attending(model, document_mask):
                together = packed_logits(model, torch.cat([first, second]), documents)
                changed = packed_logits(model, torch.cat([other, second]), documents)
    except (AttributeError, TypeError, LorafoldError) as error:
        # the decoder does arithmetic on its masks, or has no head that covers every position
        reason = f"{type(error).__name__}: {truncate(str(error), 200)}"
        log.warning("this model does not support packed rows (%s)", reason)
        return False
    unmoved = near(model, changed[-m:], together[-m:], units=1)
    return unmoved and near(model, together, torch.cat(rows), units=8)


def random_ids(model: PreTrainedModel, n: int) -> Tensor:
    """n random token ids, (n,), the same at each call, on the model's device."""
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(0)).to(model.device)


def packed_logits(model: PreTrainedModel, ids: Tensor, docs: Documents) -> Tensor:
    """The fp32 logits (T, V) of packed documents with token ids (T,). For a model without output
    embeddings, these are the hidden states (T, d) that enter its head.
    """
    inputs = {"input_ids": ids[None], "position_ids": docs.positions().to(ids.device)}
    if model.get_output_embeddings() is None:
        return run_to_head(model, inputs).hidden[0].float()
    return model(**inputs, use_cache=False).logits[0].float()


def near(model: PreTrainedModel, logits: Tensor, expected: Tensor, units: int) -> bool:
    """Whether logits (T, V) agree by norm, up to `units` of the dtype's epsilon. They are not
    bit-identical, because MoE experts group the tokens of all documents.
    """
    allowed = max(1e-5, units * torch.finfo(model.dtype).eps)
    return bool((logits - expected).norm() <= allowed * expected.norm())


@contextmanager
def attending(
    model: PreTrainedModel,
    mask: Callable[..., Any],
    attention: Callable[..., Any] | None = None,
    name: str = NAME,
) -> Iterator[None]:
    AttentionInterface.register(name, attention or attend)
    AttentionMaskInterface.register(name, mask)
    implementations = _implementations(model.config)
    model.set_attn_implementation(_implementations(model.config, name))
    _on_host.use(1)
    try:
        yield
    finally:
        _on_host.use(-1)
        model.set_attn_implementation(implementations)


def _implementations(config: PreTrainedConfig, name: str | None = None) -> dict[str, Any]:
    """The argument of set_attn_implementation: `name`, or the current implementations.
    Configurations without an implementation (MPT, DBRX) are omitted, because transformers can't
    reset them.
    """
    nested = {key: getattr(config, key) for key in config.sub_configs}
    return {"": name or config._attn_implementation} | {
        key: _implementations(sub, name)
        for key, sub in nested.items()
        if sub is not None and sub._attn_implementation is not None
    }


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **protocol: Any,
) -> Documents | Tensor | None:
    """transformers' mask interface: returns a `Documents` for causal documents, otherwise a boolean
    mask (B, 1, Tq, Tk).
    """
    # with a static cache, an offset is a tensor
    offsets = protocol.get("q_offset", 0), protocol.get("kv_offset", 0)
    whole = q_length == kv_length and all(isinstance(n, int) and n == 0 for n in offsets)
    if attention_mask is None and not protocol.get("use_vmap") and whole:
        places = HOST, torch.device(protocol.get("device") or HOST)
        for where in dict.fromkeys(places):
            b = torch.arange(batch_size, device=where)[:, None]
            earlier, head = torch.arange(q_length - 1, device=where)[None], torch.zeros_like(b)
            later = earlier + 1
            try:
                ahead = mask_function(b, head, earlier, later)
                break
            except RuntimeError:  # the predicate of chunked attention reads tensors on the device
                if where == places[-1]:
                    raise
        if not ahead.any():
            same = mask_function(b, head, later, earlier).expand(batch_size, q_length - 1)
            first = torch.cat([same.new_ones(batch_size, 1), ~same], 1).flatten()
            begins = [*first.nonzero()[:, 0].tolist(), batch_size * q_length]
            lens = tuple(end - begin for begin, end in pairwise(begins))
            return Documents(lens, protocol.get("local_size"))
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **(protocol | {"allow_is_causal_skip": False}),
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float | None = None,
    **protocol: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns the attention output (B, Tq, H, Dv). query is (B,
    H, Tq, D), key (B, Hk, Tk, D), value (B, Hk, Tk, Dv) and attention_mask a `Documents`, a mask
    (B, 1, Tq, Tk) or None.
    """
    softcap, s_aux, position_bias = map(protocol.get, ("softcap", "s_aux", "position_bias"))
    dropout = protocol.get("dropout", 0.0)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, Documents):
        # virtual tokens of prefix tuning precede the documents; they are only keys
        virtual = attention_mask.without_prefix is not None
        if not virtual and query.shape[2] != key.shape[2]:
            raise LorafoldError(
                f"{type(module).__name__}: found {key.shape[2]} keys for {query.shape[2]} queries,"
                " expected as many keys as queries in packed documents"
            )
        if dropout == 0.0 and s_aux is None and position_bias is None:
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
            y = document_attention(q, k, v, attention_mask, scale, softcap)
            return y.unflatten(0, (len(query), -1)), None
        attention_mask = attention_mask.dense(len(query), query.device)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    keys = key.shape[2]
    if attention_mask is not None:
        mask = attention_mask[..., :keys]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    p = torch.softmax(scores, -1, dtype=torch.float32)[..., :keys].to(query.dtype)
    return (torch.dropout(p, dropout, module.training) @ value).transpose(1, 2).contiguous(), None


@dataclass
class _HostValues:
    """Values (B, T) on the host that tensors on the host or the device can index."""

    here: Tensor
    device: torch.device

    def __getitem__(self, at: tuple[Tensor, ...]) -> Tensor:
        there = any(i.device.type != "cpu" for i in at)
        return (self.here.to(self.device) if there else self.here)[at]


class _HostDocumentSearch:
    """Replaces transformers' functions that find packed documents by a search on the host, while
    any `with` block needs it.
    """

    def __init__(self) -> None:
        self.users, self.positions = 0, _HostValues(torch.empty(0), HOST)
        self.originals: dict[str, Any] = {}
        self.replacements: dict[str, Callable[..., Any]] = {
            FIND: self._find,
            REMAP: lambda mask, positions: self.originals[REMAP](mask, self.positions),
        }

    def use(self, more: int) -> None:
        """Counts a `with` block that begins (1) or ends (-1)."""
        if not self.users:
            self.originals = {name: vars(masking_utils).get(name) for name in self.replacements}
        self.users += more
        if None not in self.originals.values():  # other versions of transformers stay unchanged
            vars(masking_utils).update(self.replacements if self.users else self.originals)

    def _find(self, position_ids: Tensor) -> Any:
        self.positions = _HostValues(on_host(position_ids), position_ids.device)
        numbers = self.originals[FIND](self.positions.here)
        return None if numbers is None else _HostValues(numbers, position_ids.device)


_on_host = _HostDocumentSearch()
