"""A delta changes one layer; `fold` makes the same change to the layer's weight.

Invariant: the folded layer gives the same output as the layer with its delta. For a layer with
several matrices (`Layer.matrices`), every tensor has a leading dimension (E,).

Attributes that affect a delta's output, such as a scale, are saved in the state dict as `<module
path>.deltas.<adapter>.settings`, one uint8 tensor of JSON, because some file formats hold only
tensors. Loading a state dict with different settings is an error; state dicts without settings,
which earlier versions wrote, are loaded.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafold.core.layer import Layer, WeightAndBias
from lorafold.core.rounding import rounded
from lorafold.errors import LorafoldError, NotMergeable, differing_keys, listed, truncate


class Gained(NamedTuple):
    """An output of the form g z + c. z is the output of `under` on the layer, or of the layer if
    `under` is None; g and c (*matrices, out) are fp32 or wider, and c may be None.
    """

    under: Delta | None
    g: Tensor
    c: Tensor | None


class Delta(nn.Module, ABC):
    """Abstract: a trainable change of one layer.

    The parameters are fp32, on the layer's device.
    """

    up_names: tuple[str, ...] = ()  # parameters that train at the up factor's learning rate (LoRA+)
    whole = False  # trains the full module (PEFT's modules_to_save)
    in_place = False  # its parameters are the module's own, so folding changes nothing
    # tensors saved in training checkpoints but not in adapter files
    run_names: tuple[str, ...] = ()
    # weight decay applies to parameters of two or more dimensions, except `vector_names` (a vector
    # for each matrix of the layer), and to one-dimensional `entry_names` (entries of matrices)
    vector_names: tuple[str, ...] = ()
    entry_names: tuple[str, ...] = ()
    # attributes that its output depends on, saved as settings in its state
    setting_names: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """Computes the output of the adapted layer.

        For a linear layer: x (..., in) -> (..., out); `onto` (..., out) is added before the sum is
        rounded once. For any other layer: the inputs and outputs of the module.

        Args:
            layer: the layer below; calling it runs the module and the deltas below this one.
            *args: the inputs of the module's forward.
            **kwargs: the keyword inputs of the module's forward.
        """

    @abstractmethod
    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        """Returns the changed weight (out, in) and bias (out,) or None, in the wider of the
        weight's and the delta's dtype.

        Raises NotMergeable if the change can't be expressed in the weight.
        """

    def factors(self) -> Factors | None:
        """Returns up (out, r), including every scale, and down (r, in) if folding gives W + up @
        down; None if the change has no such factors.
        """
        return None

    def gained(self, layer: Layer) -> Gained | None:
        """Returns the delta's output as gains and offsets, or None if the output does not have that
        form.
        """
        return None

    def change(self, w: Tensor) -> Tensor:  # (out, in)
        """Returns the update dW (out, in) that folding adds to W. Raises NotMergeable like `fold`.
        """
        return self.fold(w, None)[0] - w

    def parts(self) -> Iterable[Delta]:
        """Returns the deltas inside a combinator, lowest first; any other delta returns itself."""
        return (self,)

    def borrowed(self) -> Iterable[nn.Parameter]:
        """Returns the parameters of other deltas that this delta uses."""
        return ()

    @property
    def twin(self) -> Delta | None:
        """The delta that makes the same change on another module with the same tied weight, so that
        the weight can stay tied; None if there is none.
        """
        return None

    def values_at(self) -> Sequence[int]:
        """Returns the indices that folding overwrites in the first dimension of the stored weight.
        """
        return ()


Factors = tuple[Tensor, Tensor]  # up (*matrices, out, r), down (*matrices, r, in)
DeltasByPath = Mapping[str, Delta]  # the deltas of one adapter by module path


class Opaque(Delta):
    """Abstract: a change that can't be expressed in the weight."""

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        raise NotMergeable(
            f"{type(self).__name__} is not a change of weights, so it can't be merged"
        )


class Additive(Delta):
    """Abstract: a change that adds dW to W."""

    @abstractmethod
    def delta(self) -> Tensor:  # (out, in)
        """Returns dW (out, in), including every scale."""

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        return w + self.delta(), b

    def change(self, w: Tensor) -> Tensor:
        return self.delta()

    def row_squares(self, layer: Layer, own: Tensor) -> Tensor:  # (*matrices, out)
        """Returns the squared norm (*matrices, out) of each row of W + dW (*matrices, out, in);
        rounding can make it negative. `own` (*matrices, out) holds the squared norms of the rows of
        W.
        """
        return torch.linalg.vector_norm(layer.dense()[0] + self.delta(), dim=-1).square()


class Dense(Additive):
    """Abstract: dW is computed explicitly and added to W, so the layer is one matmul.

    In bf16, the sum is rounded with a dither, which preserves changes below half a unit in the last
    place on average. The backward pass computes it again, so that a step holds only one such matrix
    at a time.
    """

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        return layer.built(x, self.added, onto)

    def added(self, w: Tensor) -> Tensor:  # (out, in)
        """Returns W + dW (out, in), rounded once to W's dtype, for the current forward pass."""
        return rounded(w + self.delta(), w.dtype)


class LowRank(Additive):
    """Abstract: dW is a product of two factors, with dropout on this branch only."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    @abstractmethod
    def factors(self) -> Factors:
        """Returns up (out, r), including every scale, and down (r, in): dW = up @ down."""

    def scaled(self) -> tuple[Tensor, Tensor, float]:
        """Returns up (out, r), down (r, in) and a factor k that the layer applies: dW = k up @
        down.
        """
        return *self.factors(), 1.0

    def delta(self) -> Tensor:  # (out, in)
        up, down = self.factors()
        return up @ down

    # |w|^2 + 2 b.(A w) + b (A A^T) b for each row, without W + dW
    def row_squares(self, layer: Layer, own: Tensor) -> Tensor:
        up, down, k = self.scaled()
        up, down = up.to(own.dtype), down.to(own.dtype)
        cross = layer.weight_times(down)  # (*matrices, out, r)
        add = torch.baddbmm if up.dim() == 3 else torch.addmm
        both = add(cross, up, down @ down.mT, beta=2, alpha=k)
        r = up.shape[-1]
        rows, columns = up.reshape(-1, 1, r), both.view(-1, r, 1)
        return torch.baddbmm(own.reshape(-1, 1, 1), rows, columns, alpha=k).view(own.shape)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        up, down, k = self.scaled()
        return layer.low_rank(x, down, up, self.dropout if self.training else 0.0, onto, k)


def alike(a: Delta, b: Delta) -> bool:
    """Returns whether the deltas of two modules with a tied weight change it in the same way."""
    pairs = zip_longest(a.parts(), b.parts())
    return all(x is not None and y is not None and (x.twin is y or y.twin is x) for x, y in pairs)


def on_meta(delta: Delta) -> Delta:
    tensors = [*delta.parameters(), *delta.buffers()]
    return copy.deepcopy(
        delta, {id(t): nn.Parameter(t.to("meta"), requires_grad=False) for t in tensors}
    )


def set_tensor(delta: Delta, name: str, value: Tensor) -> None:
    """Sets a delta's tensor by its dotted name; a value (any shape) of the same shape is copied in
    place.
    """
    owner, _, leaf = name.rpartition(".")
    module = delta.get_submodule(owner)
    old = getattr(module, leaf)
    if old is not None and old.shape == value.shape:
        with torch.no_grad():
            old.copy_(value)
    elif leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = value.clone()


def of_under(name: str) -> Any:
    return property(lambda layer: getattr(layer.under, name))


class Upon(Layer):
    """Abstract: a layer on top of another layer, `under`, which computes all that it does not."""

    under: Layer

    op = of_under("op")
    op_once = of_under("op_once")
    reading_once = of_under("reading_once")
    drop = of_under("drop")
    branch = of_under("branch")
    scale = of_under("scale")
    each = of_under("each")
    matrices = of_under("matrices")
    window = of_under("window")
    shape = of_under("shape")
    takes_ids = of_under("takes_ids")
    takes_vectors = of_under("takes_vectors")
    has_bias = of_under("has_bias")
    module = of_under("module")


@dataclass(eq=False)
class Over(Upon):
    """A layer with one delta attached."""

    delta: Delta
    under: Layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta(self.under, *args, **kwargs)

    def dense(self) -> WeightAndBias:
        return self.delta.fold(*self.under.dense())

    def original(self) -> Tensor:
        return self.delta.fold(self.under.original(), None)[0]

    def sources(self) -> list[Tensor] | None:
        return None


SETTINGS = "settings"
SHOWN = 200  # characters of a value in a message


def encoded_settings(delta: Delta) -> Tensor | None:  # (bytes,)
    settings = {
        f"{path}.{name}".removeprefix("."): getattr(module, name)
        for path, module in delta.named_modules()
        for name in getattr(module, "setting_names", ())
    }
    if not settings:
        return None
    return torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)


def check_settings(delta: Delta, given: Tensor, what: str) -> None:
    """Raises if the settings `given` (bytes,) in a state dict differ from the delta's."""
    both = encoded_settings(delta), given
    expected, found = ({} if t is None else json.loads(bytes(t.tolist())) for t in both)
    if expected != found:
        lines = [
            f"found {name} {_shown(found.get(name))}, expected {_shown(expected.get(name))}"
            for name in differing_keys(expected, found)
        ]
        raise LorafoldError(
            f"{what}: the state dict is of an adapter with other options: {listed(lines, '; ')};"
            " attach an adapter with the options of the state dict"
        )


def _shown(value: Any) -> str:
    return "none" if value is None else truncate(json.dumps(value), SHOWN)
