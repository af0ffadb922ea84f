"""Documents packed end to end in one row, through transformers' public registries: no model class
is touched.

    with packed(model) as apart:
        batch = collate(examples, packed=apart, pad_id=tokenizer.pad_token_id)

A packed batch says nothing but ids (1, T) and positions (1, T) that restart at 0 in each document.
transformers finds the documents in the positions and hands our mask function a predicate, "may
query i see key j?". Its sub-diagonal tells where documents begin, so the mask function answers with
a `Documents` in place of a (T, T) mask, which the layers carry to our attention function. Whatever
isn't a plain causal run of documents (padding, a cache being decoded, custom masks, sinks, position
bias, attention dropout) takes a mask and the general path, so that generate() and gradient
checkpointing work as ever. Some models mix documents all the same (recurrent and convolutional
ones, those that ignore position_ids): `packed` asks the model first, and gives False for those that
must train padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lorafold.core.evaluating import evaluating
from lorafold.ops.attention import Documents, document_attention

NAME = "lorafold_documents"
NO_LOSS = -100  # torch's ignore_index


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[bool]:
    """True, with the model's attention kept inside documents until the block ends; or False, with
    the model as it was, if it leaks.
    """
    if not isolates(model):
        yield False
        return
    with attending(model, document_mask):
        yield True


def isolates(model: PreTrainedModel) -> bool:
    """Are two packed documents computed as the model in its present state computes each alone?
    Leaves no trace, in random state either.
    """
    if model.get_output_embeddings() is None:
        return False
    vocab, n, m = model.config.get_text_config().vocab_size, 11, 13
    draw = torch.randint(vocab, (1, 2 * n + m), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    first, other, second = draw.split([n, n, m], 1)

    def logits(*documents: Tensor) -> Tensor:
        positions = torch.cat([torch.arange(ids.shape[1], device=ids.device) for ids in documents])[
            None
        ]
        return (
            model(input_ids=torch.cat(documents, 1), position_ids=positions, use_cache=False)
            .logits[0]
            .float()
        )

    def near(found: Tensor, expected: Tensor, units: int) -> bool:
        # norms, since experts regroup their rows: not bit-equal even where nothing leaks
        return bool(
            (found - expected).norm()
            <= max(1e-5, units * torch.finfo(model.dtype).eps) * expected.norm()
        )

    try:
        with evaluating(model):
            alone = torch.cat([logits(first), logits(second)])
            with attending(model, document_mask):
                together, changed = logits(first, second), logits(other, second)
    except (AttributeError, TypeError):
        # a decoder that computes with its masks can't do so with Documents
        return False
    return near(changed[-m:], together[-m:], units=1) and near(together, alone, units=8)


@contextmanager
def attending(model: PreTrainedModel, mask: Callable[..., Any]) -> Iterator[None]:
    """The model's attention is `attend`, under the masks that a function of transformers' mask
    protocol makes.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    before = _implementations(model.config)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's attention implementations as set_attn_implementation takes them: its own under "",
    nested ones by name.
    """
    nested = {name: getattr(config, name) for name in config.sub_configs}
    return {"": config._attn_implementation} | {
        name: _implementations(c) for name, c in nested.items() if c is not None
    }


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **protocol: Any,
) -> Documents | Tensor | None:
    """transformers' mask protocol: `Documents` where the mask is a causal run of documents, else a
    boolean mask (B, 1, Tq, Tk).

    mask_function(b, head, i, j), on index tensors: may query i of row b see key j? `protocol` is
    what concerns sdpa and eager masks.
    """
    # a static cache counts its offset in a tensor
    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if attention_mask is None and not use_vmap and whole:
        b = torch.arange(batch_size, device=device)[:, None]
        earlier, later = (
            torch.arange(q_length - 1, device=device)[None],
            torch.arange(1, q_length, device=device)[None],
        )
        head = torch.zeros_like(b)
        if not mask_function(b, head, earlier, later).any():
            same = mask_function(b, head, later, earlier).expand(batch_size, q_length - 1)
            begins = (
                torch.cat([same.new_ones(batch_size, 1), ~same], 1)
                .flatten()
                .nonzero()[:, 0]
                .tolist()
            )
            return Documents(
                tuple(end - begin for begin, end in pairwise([*begins, batch_size * q_length])),
                local_size,
            )
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **(protocol | {"allow_is_causal_skip": False}),
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **protocol: Any,
) -> tuple[Tensor, None]:
    """transformers' attention protocol: query (B, H, Tq, D), key (B, Hk, Tk, D), value (B, Hk, Tk,
    Dv) -> (B, Tq, H, Dv).

    s_aux (H,): a sink's score, which takes its share of the probability. position_bias (B or 1, H,
    Tq, Tk) is added to the scores. A mask is boolean or added. `protocol` repeats what the mask
    says (windows, positions); `isolates` checks that nothing else hides there.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, Documents):
        if dropout == 0.0 and s_aux is None and position_bias is None:
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
            return (
                document_attention(q, k, v, attention_mask, scale, softcap).unflatten(
                    0, (len(query), -1)
                ),
                None,
            )
        attention_mask = attention_mask.dense(len(query), query.device)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(
            ~attention_mask[..., : key.shape[2]], torch.finfo(scores.dtype).min
        )
    elif attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    if s_aux is not None:
        scores = torch.cat(
            [scores, s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1
        )
    p = torch.softmax(scores, -1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return (torch.dropout(p, dropout, module.training) @ value).transpose(1, 2).contiguous(), None
