"""The plan of what folding will change in a model, made before anything is changed, by folding on
the meta device.

    plan = plan_fold(model, ["sft"])    every module with a delta of these names is folded once, so
    plan.shapes, plan.problems          no method and no storage has to be known here

The plan has the parameters that change and their new shapes, the tied weights that stay tied and
those that can't, the config's switches for added biases, the size of the vocabulary, and all
problems. It is carried out in memory (`fold.in_memory`) or tensor by tensor for a writer
(`merging.execute`).
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
from lorafold.core.matrices import module_at, parameter_path
from lorafold.errors import NotMergeable
from lorafold.fold.biases import Switches, gained_with
from lorafold.fold.vocabulary import grown

WHOLE = "the model as a whole"
NAMES = ("weight", "bias")


@dataclass(frozen=True)
class FoldPlan:
    """What folding will change.

    Attributes:
        shapes: the shape of each parameter that changes or is added, as its module stores it.
        sites: the site of each of these parameters, and its name there: weight or bias.
        together: the tied parameters that all their modules change in the same way, so that they
            stay tied, each with the other names of the same tensor.
        apart: the tied parameters that their modules do not change in the same way, likewise.
        switches: the config's switches for the biases that are added.
        vocabulary: the size of the vocabulary if it grows, else None.
        problems: pairs of a module path and what is wrong there.
    """

    shapes: dict[str, tuple[int, ...]]
    sites: dict[str, tuple[str, str]]
    together: dict[str, tuple[str, ...]]
    apart: dict[str, tuple[str, ...]]
    switches: Switches
    vocabulary: int | None
    problems: tuple[tuple[str, str], ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The sites that change."""
        return tuple(dict.fromkeys(path for path, _ in self.sites.values()))


def module_of(parameter: str) -> str:
    """The path of the module that has the parameter."""
    return parameter.rpartition(".")[0]


def plan_fold(model: nn.Module, names: Sequence[str]) -> FoldPlan:
    """Plan the folding of the adapters of these names, lowest first; the model is not changed."""
    problems: list[tuple[str, str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    sites: dict[str, tuple[str, str]] = {}
    for path, module in adapted_modules(model):
        # the parameters of a delta in place are the module's own: there is nothing to fold
        if all(delta.in_place for delta in deltas_of(module, names)):
            continue
        lowest = next(iter(module.deltas))
        if lowest not in names:
            problems.append((path, f"adapter {lowest!r} is attached below; merge that one first"))
            continue
        try:
            for name, shape in changes(module, names).items():
                parameter = parameter_path(module, path, name)
                shapes[parameter], sites[parameter] = shape, (path, name)
        except NotMergeable as e:
            problems.append((path or WHOLE, str(e)))
    shared = {name: others for name, others in tied_parameters(model).items() if name in shapes}
    together = {name: o for name, o in shared.items() if _all_alike(model, (name, *o), names)}
    apart = {name: others for name, others in shared.items() if name not in together}
    switches, vocabulary = {}, None
    try:
        biased = [path for path, name in sites.values() if name == "bias"]
        lacking = [p for p in biased if not layer_of(module_at(model, p)).has_bias]
        switches = gained_with(model, lacking)
    except NotMergeable as e:
        problems.append(("added biases", str(e)))
    try:
        vocabulary = grown(model, _rows(shapes))
    except NotMergeable as e:
        problems.append(("new tokens", str(e)))
    return FoldPlan(shapes, sites, together, apart, switches, vocabulary, tuple(problems))


def deltas_of(module: nn.Module, names: Sequence[str]) -> Iterator[Delta]:
    """Yield those of the named deltas that are attached to the module, in the names' order."""
    deltas: Any = module.deltas if isinstance(module, Adapted) else {}
    return (deltas[name] for name in names if name in deltas)


def fold(
    module: Adapted, names: Sequence[str], w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight (out, in) and bias (out,) or None with the named deltas folded in.

    Raises NotMergeable if a delta has no weight-space form.

    Args:
        module: the module that the deltas are attached to.
        names: the names of the adapters, lowest first.
        w: the weight (out, in).
        b: the bias (out,), or None.
    """
    for delta in deltas_of(module, names):
        w, b = delta.fold(w, b)
    return w, b


def changes(module: Adapted, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that folding changes or adds, as the module stores them.

    Raises NotMergeable if a delta or the module has no weight-space form.
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
    """Whether the named deltas make the same change in all modules of a tied parameter."""
    first, *others = (
        list(deltas_of(model.get_submodule(module_of(name)), names)) for name in shared
    )
    return all(len(o) == len(first) and all(map(alike, first, o)) for o in others)


def _rows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {module_of(n): shape[0] for n, shape in shapes.items() if n.endswith("weight")}
