"""Virtual tokens in every attention: the common part of prompt and prefix tuning.

    attention(q, [K_virtual, K], [V_virtual, V])        K_virtual (1, Hk, n, D) of each layer, seen
                                                        by every query

A delta on the decoder computes the keys and values of n virtual tokens, passes them as one keyword
argument, which transformers' decoders forward to their attentions, and shifts positions by n. On
each attention, a second delta removes the argument, wraps the KV cache to prepend the virtual keys
and values, and extends the mask by n columns. The KV cache itself contains only real tokens, so
lengths, reordering, cropping and resuming work as usual.

Virtual tokens stay visible under a sliding window. Models whose decoder does not forward keyword
arguments to its attentions are rejected.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.delta import Opaque
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.common.options_and_init import check
from lorafold.ops.host_tensors import add_int, send
from lorafold.ops.packed_documents import Documents, with_prefix_keys

# by layer_idx: K (1, Hk, n, D), V (1, Hk, n, Dv)
KVByLayer = dict[int, tuple[Tensor, Tensor]]

_KEYWORD = "virtual_tokens"
_CACHE_NAMES = ("cache", "layer_past")  # names of an attention's KV cache argument


class VirtualArgument:
    """The argument that decoders pass to attentions: the keys and values of each adapter's virtual
    tokens. If `kv_by_layer` is a dictionary, each layer stores the keys and values that it computes
    there.
    """

    def __init__(self, kvs: tuple[KVByLayer, ...], kv_by_layer: KVByLayer | None) -> None:
        self.kvs, self.kv_by_layer = kvs, kv_by_layer
        self.reached_layers: set[int] = set()
        self._documents: tuple[Documents, Documents] | None = None

    def at(self, layer_idx: int) -> list[tuple[Tensor, Tensor]]:
        """The keys (1, Hk, n, D) and values (1, Hk, n, Dv) of each adapter for one layer. The call
        marks the layer as reached.
        """
        self.reached_layers.add(layer_idx)
        return [kv[layer_idx] for kv in self.kvs]

    def mask(self, mask: Any, n: int, x: Tensor) -> Any:
        """`widen_mask` of a mask (B, 1, T, Tk), documents or None, for input x (B, T, d). Documents
        are widened only once for all layers.
        """
        if not isinstance(mask, Documents):
            return widen_mask(mask, n, x)
        if self._documents is None or self._documents[0] is not mask:
            wide = widen_mask(mask, n, x)
            if not isinstance(wide, Documents):
                return wide
            self._documents = mask, wide
        return self._documents[1]


class _Prepended:
    """A wrapper of an attention's KV cache (or None) that prepends the virtual tokens.

    Without a mask, attention is causal over the `tokens` of the input, so unused positions of a
    fixed-size cache are cut off.
    """

    def __init__(
        self, cache: Any, virtual: VirtualArgument, kvs: list[tuple[Tensor, Tensor]],
        tokens: int | None,
    ) -> None:  # fmt: skip
        self._cache, self._virtual, self._before, self._tokens = cache, virtual, kvs, tokens

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._virtual.kv_by_layer is not None:
            self._virtual.kv_by_layer[layer_idx] = key, value
        if self._cache is not None:
            key, value = self._cache.update(key, value, layer_idx, *args, **kwargs)
        keys = [k.to(key.dtype).expand(len(key), -1, -1, -1) for k, _ in self._before]
        values = [v.to(value.dtype).expand(len(value), -1, -1, -1) for _, v in self._before]
        key, value = (x[..., : self._tokens, :] for x in (key, value))
        return torch.cat([*keys, key], -2), torch.cat([*values, value], -2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class VirtualTokenReceiver(Opaque):
    """The delta on an attention, which adds the virtual tokens there. It has no parameters."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.names = argument_names(attention)
        if not any(name in self.names for name in _CACHE_NAMES):
            raise LorafoldError(
                f"{type(attention).__name__} does not accept a KV cache, which virtual tokens need;"
                " choose another method"
            )
        self.cache_name = next(name for name in _CACHE_NAMES if name in self.names)

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        virtual: VirtualArgument | None = kwargs.pop(_KEYWORD, None)
        if virtual is None:
            return layer(**kwargs)
        kvs = virtual.at(layer.module.layer_idx)  # type: ignore[arg-type]
        x, mask = kwargs["hidden_states"], kwargs.get("attention_mask")
        tokens = x.shape[1] if mask is None and x.shape[1] > 1 else None
        kwargs[self.cache_name] = _Prepended(kwargs.get(self.cache_name), virtual, kvs, tokens)
        if n := sum(k.shape[-2] for k, _ in kvs):
            kwargs["attention_mask"] = virtual.mask(mask, n, x)
        return layer(**kwargs)


def widen_mask(mask: Tensor | Documents | None, n: int, x: Tensor) -> Tensor | Documents | None:
    """An attention mask (B, 1, T, n + Tk) whose first n columns are visible to every query, or
    documents with n keys before them; None if there is nothing to mask.
    """
    if isinstance(mask, Documents):
        if mask.window is None:
            return with_prefix_keys(mask, n, len(x), x.device)
        mask = mask.dense(len(x), x.device)
    if mask is None:
        # without a mask, attention is causal over T keys, or one query attends to all keys
        if (t := x.shape[1]) == 1:
            return None
        return torch.ones(t, n + t, dtype=torch.bool, device=x.device).tril(n)[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise LorafoldError(
            "virtual tokens need an attention mask that is a tensor of 4 dimensions (sdpa or"
            f" eager), found {type(mask).__name__}; load the model with attn_implementation='sdpa'"
        )
    return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)


def argument_names(module: nn.Module) -> list[str]:
    """The parameter names of a module's original forward, in order."""
    cls = type(module)
    return list(inspect.signature(getattr(cls, "base_class", cls).forward).parameters)[1:]


class VirtualTokenDelta(Opaque):
    """Abstract: the delta on the decoder, which provides the keys and values of the virtual tokens
    for every layer.
    """

    def __init__(self, body: nn.Module, layers: list[int]) -> None:
        super().__init__()
        self.names, self.layers = argument_names(body), layers

    @property
    @abstractmethod
    def positions(self) -> int:
        """The number of positions that virtual tokens take before the first token of a row."""

    @abstractmethod
    def keys_and_values(self, layer: Layer, cache: Any) -> KVByLayer:
        """The keys (1, Hk, n, D) and values (1, Hk, n, Dv) of the virtual tokens, by `layer_idx`.
        Implementations may store them on the KV cache.
        """

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        virtual = self.keys_and_values(layer, inputs.get("cache"))
        return self.run_decoder(layer, inputs, virtual, self.positions)

    def run_decoder(
        self,
        run: Callable[..., Any],
        inputs: dict[str, Any],
        virtual: KVByLayer | None,
        n: int,
        kv_by_layer: KVByLayer | None = None,
    ) -> Any:
        """Runs the decoder with virtual tokens before its input, and returns its output."""
        outer = inputs.get(_KEYWORD) or VirtualArgument((), None)
        kvs = outer.kvs if virtual is None else (*outer.kvs, virtual)
        own = VirtualArgument(kvs, outer.kv_by_layer if kv_by_layer is None else kv_by_layer)
        output = run(**(inputs | {_KEYWORD: own, "position_ids": add_int(positions(inputs), n)}))
        if missed := [i for i in self.layers if i not in own.reached_layers]:
            raise LorafoldError(
                "the decoder does not pass keyword arguments to the attention of layers"
                f" {missed}, so virtual tokens can't reach these layers; choose another method"
            )
        outer.reached_layers |= own.reached_layers
        return output


def positions(inputs: dict[str, Any]) -> Tensor:
    """The positions (B or 1, T) of a decoder's input: `position_ids` if given, otherwise the
    positions after the tokens in the KV cache.
    """
    if (given := inputs.get("position_ids")) is not None:
        return given
    x = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    cache = inputs.get("cache", inputs.get("past_key_values"))
    past = 0 if cache is None else cache.get_seq_length()
    return send(torch.arange(past, past + x.shape[1])[None], x.device)


class VirtualTokens(Spec):
    """Abstract: n virtual tokens, with one delta on the decoder and one on each attention."""

    tokens: int
    init: str
    inits: ClassVar[tuple[str, ...]]  # the choices of `init`

    targets = "decoder"
    lr = 1e-2

    def __post_init__(self) -> None:
        check(self, whole=("tokens",), one_of={"init": self.inits})

    @property
    def positions(self) -> int:  # type: ignore[override]
        return self.tokens

    def build(self, layer: Layer) -> VirtualTokenDelta | VirtualTokenReceiver:
        module = layer.module
        if hasattr(module, "layer_idx"):
            return VirtualTokenReceiver(module)
        attentions = [module.get_submodule(path) for path in Anatomy.of(module).attentions]
        if not attentions:
            raise LorafoldError(
                f"{type(self).__name__}: found {type(module).__name__}, expected a decoder with"
                " attention layers (targets 'decoder')"
            )
        return self.build_delta(layer, attentions)

    def random_ids(self, embedding: nn.Embedding) -> Tensor:  # (n,)
        """The ids of n random tokens of the vocabulary."""
        return torch.randint(embedding.num_embeddings, (self.tokens,)).to(embedding.weight.device)

    @abstractmethod
    def build_delta(self, layer: Layer, attentions: list[nn.Module]) -> VirtualTokenDelta:
        """Creates the delta on the decoder, for its attentions."""
