"""Virtual tokens at the attention level: what prompt and prefix tuning have in common.

    attention(q, [K_virtual, K], [V_virtual, V])        K_virtual (1, Hk, n, D) of each layer, seen
                                                        by every query

A delta on the decoder (the sender) gives every attention the keys and values of n virtual tokens
that come before the first real one; positions shift by n. They travel as one keyword argument,
which transformers' decoders hand on to their attentions, and a receiver laid on each attention
takes it there: it gives the attention a view of its cache that answers with the virtual columns in
front, and widens the mask by as many. So the real cache holds real tokens only: lengths,
reordering, cropping and resuming mean what they always mean, packed documents each see the virtual
tokens, and under gradient checkpointing the recomputation is handed the same tensors again.

The virtual tokens never age out of a sliding window. A model without attention layers, or whose
decoder keeps such arguments to itself, is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.delta import Opaque
from lorafold.core.layer import Layer
from lorafold.errors import LorafoldError
from lorafold.ops.attention import Documents

# by layer_idx: K (1, Hk, n, D), V (1, Hk, n, Dv)
KeysAndValues = Mapping[int, tuple[Tensor, Tensor]]
Seen = dict[int, tuple[Tensor, Tensor]]

_KEYWORD = "virtual_tokens"
_CACHE_NAMES = ("cache", "layer_past")  # what attentions call their cache


def check(method: str, tokens: int, init: str, inits: tuple[str, ...]) -> None:
    """LorafoldError lists the options of a virtual-token method that are out of range."""
    wrong = (
        []
        if isinstance(tokens, int) and tokens >= 1
        else [f"tokens {tokens!r} (a whole number from 1)"]
    )
    if init not in inits:
        wrong.append(f"init {init!r} ({' or '.join(inits)})")
    if wrong:
        raise LorafoldError(f"{method}: {'; '.join(wrong)}")


class Virtual:
    """What a sender hands down: the virtual tokens of every sender so far, and where to note a
    layer's own keys and values, if anywhere.
    """

    def __init__(self, before: tuple[KeysAndValues, ...], seen: Seen | None) -> None:
        self.before, self.seen = before, seen
        self.reached: set[int] = set()

    def at(self, layer_idx: int) -> list[tuple[Tensor, Tensor]]:
        self.reached.add(layer_idx)
        return [kv[layer_idx] for kv in self.before]


class _Prepended:
    """An attention's cache, seen with the virtual tokens in front; `cache` None where there is
    none.

    Without a mask attention is causal over its own `tokens`: columns that a cache of fixed size
    holds in reserve are left out then.
    """

    def __init__(
        self, cache: Any, virtual: Virtual, before: list[tuple[Tensor, Tensor]], tokens: int | None
    ) -> None:
        self._cache, self._virtual, self._before, self._tokens = cache, virtual, before, tokens

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._virtual.seen is not None:
            self._virtual.seen[layer_idx] = key, value
        if self._cache is not None:
            key, value = self._cache.update(key, value, layer_idx, *args, **kwargs)
        keys = [k.to(key.dtype).expand(len(key), -1, -1, -1) for k, _ in self._before]
        values = [v.to(value.dtype).expand(len(value), -1, -1, -1) for _, v in self._before]
        own = slice(self._tokens)
        return torch.cat([*keys, key[..., own, :]], -2), torch.cat(
            [*values, value[..., own, :]], -2
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Receiver(Opaque):
    """Laid on one attention: takes what a sender handed down. It has no parameters."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.names = argument_names(attention)
        if not any(name in self.names for name in _CACHE_NAMES):
            raise LorafoldError(
                f"{type(attention).__name__} takes no cache, so it can't be given virtual tokens"
            )
        self.cache_name = next(name for name in _CACHE_NAMES if name in self.names)

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        virtual: Virtual | None = kwargs.pop(_KEYWORD, None)
        if virtual is None:
            return layer(**kwargs)
        before = virtual.at(layer.module.layer_idx)  # type: ignore[arg-type]
        x, mask = kwargs["hidden_states"], kwargs.get("attention_mask")
        tokens = x.shape[1] if mask is None and x.shape[1] > 1 else None
        kwargs[self.cache_name] = _Prepended(kwargs.get(self.cache_name), virtual, before, tokens)
        if n := sum(k.shape[-2] for k, _ in before):
            kwargs["attention_mask"] = widened(mask, n, x)
        return layer(**kwargs)


def widened(mask: Tensor | Documents | None, n: int, x: Tensor) -> Tensor | None:
    """The mask of an attention over x (B, T, d) with n columns in front that every query sees: (B,
    1, T, n + Tk), boolean or added.
    """
    if isinstance(mask, Documents):
        mask = mask.dense(len(x), x.device)
    if mask is None:
        # without a mask attention is causal over T keys, or has a single query that sees all
        t = x.shape[1]
        return (
            None
            if t == 1
            else torch.ones(t, n + t, dtype=torch.bool, device=x.device).tril(n)[None, None]
        )
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise LorafoldError(
            "virtual tokens need attention with a mask of its own (sdpa or eager), found a mask of"
            f" {type(mask).__name__}"
        )
    return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)


def is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx")


def argument_names(module: nn.Module) -> list[str]:
    """The names of the arguments of the module's own forward, in order."""
    cls = type(module)
    return list(inspect.signature(getattr(cls, "base_class", cls).forward).parameters)[1:]


class Sender(Opaque):
    """Abstract: laid on the decoder, knows the n virtual tokens' keys and values in every layer."""

    def __init__(self, body: nn.Module, layers: list[int]) -> None:
        super().__init__()
        self.names, self.layers = argument_names(body), layers

    def send(
        self,
        run: Callable[..., Any],
        inputs: dict[str, Any],
        virtual: KeysAndValues | None,
        n: int,
        seen: Seen | None = None,
    ) -> Any:
        """Run the decoder on `inputs` with n virtual tokens in front; with `seen` given, note each
        layer's own keys and values there.
        """
        above: Virtual | None = inputs.get(_KEYWORD)
        before = () if above is None else above.before
        seen = above.seen if seen is None and above is not None else seen
        own = Virtual((*before, virtual) if virtual is not None else before, seen)
        output = run(**(inputs | {_KEYWORD: own, "position_ids": positions(inputs) + n}))
        if missed := [i for i in self.layers if i not in own.reached]:
            raise LorafoldError(
                f"the decoder hands no keyword arguments on to attention in layers {missed}: no"
                " virtual token gets there"
            )
        if above is not None:
            above.reached |= own.reached
        return output


def positions(inputs: dict[str, Any]) -> Tensor:
    """The positions (B or 1, T) that a decoder gives its input: what it is told, or on from what
    its cache holds.
    """
    if (told := inputs.get("position_ids")) is not None:
        return told
    x = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    cache = inputs.get("cache", inputs.get("past_key_values"))
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + x.shape[1], device=x.device)[None]
