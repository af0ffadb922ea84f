"""What folding will do to a model, found out before anything is changed: by folding shapes.

    plan = plan_fold(model, ["sft"])    every module that carries the named deltas is folded once on
    plan.shapes, plan.problems          the meta device, so no method and no storage is known here

It decides which parameters change and their shapes, which of those that modules share stay shared
and which part, the config's switches for biases that are gained, the size of the vocabulary, and
all that stands in the way. It is carried out twice: in memory (`fold.in_memory`) and shard by shard
(`merging.shards`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafold.bases import layer_of
from lorafold.core.anatomy import tied_parameters
from lorafold.core.attach import Adapted, adapted_modules
from lorafold.core.delta import Delta, alike, on_meta
from lorafold.errors import NotMergeable
from lorafold.fold.biases import Switches, gained_with
from lorafold.fold.vocabulary import grown

WHOLE = "the model as a whole"
NAMES = ("weight", "bias")


@dataclass(frozen=True)
class FoldPlan:
    """`shapes`, by parameter: of those that change or are added, as their module stores them.

    `together` are those that modules share and that all of them change alike, so that they stay
    shared; `apart` those that one side changes alone. Both map a parameter to the others that are
    the same tensor. `switches` are the config's, for biases that the model lacks; `vocabulary` is
    its size where it grows. `problems` are places with what is wrong there.
    """

    shapes: dict[str, tuple[int, ...]]
    together: dict[str, tuple[str, ...]]
    apart: dict[str, tuple[str, ...]]
    switches: Switches
    vocabulary: int | None
    problems: tuple[tuple[str, str], ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules that change."""
        return tuple(dict.fromkeys(module_of(parameter) for parameter in self.shapes))


def module_of(parameter: str) -> str:
    """The path of the module that has the parameter."""
    return parameter.rpartition(".")[0]


def plan_fold(model: nn.Module, names: Sequence[str]) -> FoldPlan:
    """The plan for the deltas of these names, lowest first. Nothing is computed or changed."""
    problems: list[tuple[str, str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in adapted_modules(model):
        if not any(True for _ in deltas_of(module, names)):
            continue
        lowest = next(iter(module.deltas))
        if lowest not in names:
            problems.append((path, f"adapter {lowest!r} lies beneath; merge that one first"))
            continue
        try:
            found = changes(module, names)
            shapes |= {f"{path}.{name}" if path else name: shape for name, shape in found.items()}
        except NotMergeable as e:
            problems.append((path or WHOLE, str(e)))
    shared = {name: others for name, others in tied_parameters(model).items() if name in shapes}
    together = {name: o for name, o in shared.items() if _all_alike(model, (name, *o), names)}
    apart = {name: others for name, others in shared.items() if name not in together}
    switches, vocabulary = {}, None
    try:
        biased = [module_of(name) for name in shapes if name.endswith("bias")]
        lacking = [p for p in biased if not layer_of(model.get_submodule(p)).has_bias]
        switches = gained_with(model, lacking)
    except NotMergeable as e:
        problems.append(("added biases", str(e)))
    try:
        vocabulary = grown(model, _rows(shapes))
    except NotMergeable as e:
        problems.append(("new tokens", str(e)))
    return FoldPlan(shapes, together, apart, switches, vocabulary, tuple(problems))


def deltas_of(module: nn.Module, names: Sequence[str]) -> Iterator[Delta]:
    """Those of the named deltas that the module carries, in the order of the names."""
    deltas: Any = module.deltas if isinstance(module, Adapted) else {}
    return (deltas[name] for name in names if name in deltas)


def fold(
    module: Adapted, names: Sequence[str], w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W (out, in) and b (out,) with the named deltas folded in. NotMergeable as the deltas'."""
    for delta in deltas_of(module, names):
        w, b = delta.fold(w, b)
    return w, b


def changes(module: Adapted, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that folding changes or adds, as the module stores them.

    NotMergeable where a delta, or the storage, has no form in weight space.
    """
    layer = layer_of(module)
    try:
        before = layer.dense_like()
    except NotMergeable as e:
        parts = (part for delta in deltas_of(module, names) for part in delta.parts())
        kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
        raise NotMergeable(f"{kinds} has no form in weight space ({e})") from None
    w, b = before
    for delta in deltas_of(module, names):
        w, b = on_meta(delta).fold(w, b)
    stored = layer.plain().encode(w, b)
    changed = [n for n, old, new in zip(NAMES, before, (w, b), strict=True) if new is not old]
    return {name: tuple(stored[name].shape) for name in changed}


def _all_alike(model: nn.Module, shared: Sequence[str], names: Sequence[str]) -> bool:
    """Do the named deltas make the same change of all modules that share this parameter?"""
    first, *others = (
        list(deltas_of(model.get_submodule(module_of(name)), names)) for name in shared
    )
    return all(len(o) == len(first) and all(map(alike, first, o)) for o in others)


def _rows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {module_of(n): shape[0] for n, shape in shapes.items() if n.endswith("weight")}
