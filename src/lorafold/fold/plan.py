"""The plan of a merge: every adapted module is folded on the meta device, so that no method or
quantization needs special code.

    W' = round(fold(W))         summed in fp32, rounded once to the stored dtype

`execute_fold` executes the plan in memory, one module at a time; `lorafold.merging` executes it on
files, tensor by tensor. A config switch for biases (Llama: attention_bias, mlp_bias) affects
several linear layers; those without an adapter get zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy, tied_parameters
from lorafold.core.attach import Adapted, adapted_modules
from lorafold.core.delta import Delta, alike, on_meta
from lorafold.core.expert_matrices import module_at, parameter_path
from lorafold.core.layer import bare
from lorafold.errors import NotMergeable, join_problems, listed
from lorafold.layers import layer_of

TensorShape = tuple[int, ...]
WHOLE_MODEL = "the model as a whole"
# config switch -> path of each module that gets a bias by it -> the shape of that bias
Switches = dict[str, dict[str, torch.Size]]


@dataclass(frozen=True)
class FoldPlan:
    """The changes of a merge.

    shapes: the stored shapes of changed and added parameters.
    sites: the target path of each of these parameters, and its name there (weight or bias).
    tied, untied: the tied parameters that stay tied, or can't, with their other names.
    switches: the config switches that add biases.
    vocabulary: the new size of the vocabulary, or None if it does not grow.
    problems: module paths, with the reasons why a merge is impossible.
    """

    shapes: dict[str, TensorShape]
    sites: dict[str, tuple[str, str]]
    tied: dict[str, tuple[str, ...]]
    untied: dict[str, tuple[str, ...]]
    switches: Switches
    vocabulary: int | None
    problems: tuple[tuple[str, str], ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for path, _ in self.sites.values()))


def module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def plan_fold(model: nn.Module, names: Sequence[str]) -> FoldPlan:
    """Plans the merge of these adapters, lowest first; the model is not changed."""
    problems = []
    shapes = {}
    sites = {}
    for path, module in adapted_modules(model):
        # the parameters of in-place deltas are the module's own: nothing to fold
        if all(delta.in_place for delta in deltas_of(module, names)):
            continue
        lowest = next(iter(module.deltas))
        if lowest not in names:
            problems.append((path, f"adapter {lowest!r} is attached below; merge that first"))
            continue
        try:
            for name, shape in changed_shapes(module, names).items():
                parameter = parameter_path(module, path, name)
                shapes[parameter], sites[parameter] = shape, (path, name)
        except NotMergeable as e:
            problems.append((path or WHOLE_MODEL, str(e)))
    shared = {name: others for name, others in tied_parameters(model).items() if name in shapes}
    tied = {}
    for name, others in shared.items():  # stays tied if all its modules change alike
        modules = (model.get_submodule(module_of(n)) for n in (name, *others))
        first, *rest = (list(deltas_of(module, names)) for module in modules)
        if all(len(o) == len(first) and all(map(alike, first, o)) for o in rest):
            tied[name] = others
    untied = {name: others for name, others in shared.items() if name not in tied}
    switches, vocabulary = {}, None
    try:
        biased = [path for path, name in sites.values() if name == "bias"]
        lacking = [p for p in biased if not layer_of(module_at(model, p)).has_bias]
        switches = switches_adding_biases(model, lacking)
    except NotMergeable as e:
        problems.append(("added biases", str(e)))
    try:
        rows = {module_of(n): shape[0] for n, shape in shapes.items() if n.endswith("weight")}
        vocabulary = grown_vocabulary(model, rows)
    except NotMergeable as e:
        problems.append(("new tokens", str(e)))
    return FoldPlan(shapes, sites, tied, untied, switches, vocabulary, tuple(problems))


def deltas_of(module: nn.Module, names: Sequence[str]) -> Iterator[Delta]:
    deltas: Any = module.deltas if isinstance(module, Adapted) else {}
    return (deltas[name] for name in names if name in deltas)


def fold(
    module: Adapted, names: Sequence[str], w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the weight (out, in) and bias (out,) or None with the named deltas folded in."""
    for delta in deltas_of(module, names):
        w, b = delta.fold(w, b)
    return w, b


def changed_shapes(module: Adapted, names: Sequence[str]) -> dict[str, TensorShape]:
    layer = layer_of(module)
    try:
        before = layer.dense_like()
    except NotMergeable as e:
        raise NotMergeable(f"adapters on this module can't be merged ({e})") from None
    w, b = before
    for delta in deltas_of(module, names):
        w, b = on_meta(delta).fold(w, b)
    stored = layer.plain().encode(w, b)
    values = zip(("weight", "bias"), before, (w, b), strict=True)
    return {name: tuple(stored[name].shape) for name, old, new in values if new is not old}


def switches_adding_biases(model: nn.Module, paths: Collection[str]) -> Switches:
    """Returns the config switches that give these modules a bias, each with all modules that get
    one. Models outside transformers need none.
    """
    config: Any = getattr(model, "config", None)
    if not paths or not hasattr(type(model), "_from_config"):
        return {}
    switches, lacking = {}, set(paths)
    for name, value in config.get_text_config().to_dict().items():
        biases = _biases_added_by(model, name) if value is False and "bias" in name else {}
        if lacking & biases.keys():
            switches[name] = biases
            lacking -= biases.keys()
    if lacking:
        raise NotMergeable(
            f"{listed(sorted(lacking))}: the adapter adds a bias, but {type(model).__name__}"
            " can't have one there; keep the adapter separate"
        )
    return switches


def _biases_added_by(model: Any, switch: str) -> dict[str, torch.Size]:
    config = copy.deepcopy(model.config)
    setattr(config.get_text_config(), switch, True)
    with torch.device("meta"):
        switched = type(model)._from_config(config)
    lacking = {path for path, module in model.named_modules() if not has_bias(module)}
    modules = [(path, m) for path, m in switched.named_modules() if has_bias(m)]
    return {path: m._parameters["bias"].shape for path, m in modules if path in lacking}


def has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


@torch.no_grad()
def enable_switches(model: Any, switches: Switches) -> None:
    """Turns on these config switches, and gives the modules zero biases."""
    for switch, shapes in switches.items():
        setattr(model.config.get_text_config(), switch, True)
        for path, shape in shapes.items():
            module = model.get_submodule(path)
            like = next(module.parameters(recurse=False))
            zeros = torch.zeros(
                shape, dtype=layer_of(module).dense_like()[0].dtype, device=like.device
            )
            module.bias = nn.Parameter(zeros, requires_grad=like.requires_grad)


def grown_vocabulary(model: Any, rows: Mapping[str, int]) -> int | None:
    """Returns the size of the vocabulary if the modules have these numbers of rows; None if it is
    unchanged or unknown.
    """
    embeddings: dict[str, Any] = {
        path: bare(model.get_submodule(path)) for path in Anatomy.of(model).vocabulary_ends
    }
    before = {path: len(end.weight) for path, end in embeddings.items()}
    after = {path: rows.get(path, n) for path, n in before.items()}
    if after == before:
        return None
    if len(set(after.values())) > 1:
        sizes = ", ".join(f"{path} with {n} tokens" for path, n in after.items())
        raise NotMergeable(
            f"found {sizes}, expected the same vocabulary for embedding and head; train the new"
            " tokens' rows in both"
        )
    return max(after.values())


def set_vocabulary_size(model: Any, size: int) -> None:
    config = model.config.get_text_config()
    for part in model.modules():
        if getattr(part, "vocab_size", None) == config.vocab_size:
            part.vocab_size = size
    config.vocab_size = size


def untie_remaining(model: nn.Module) -> None:
    """Records in the config that weights are not tied, and copies weights that still are."""
    config = getattr(model, "config", None)
    parts = (config, getattr(config, "text_config", None))
    tied = [part for part in parts if getattr(part, "tie_word_embeddings", False)]
    for part in tied:
        part.tie_word_embeddings = False  # type: ignore[union-attr]
    if not tied:
        return
    seen = set()
    for _, module in Anatomy.of(model).modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                setattr(module, name, _copy_parameter(parameter))
            seen.add(id(parameter))


def _copy_parameter(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def execute_fold(
    model: nn.Module, plan: FoldPlan, names: Sequence[str], *, untie_weights: bool = False
) -> None:
    """Writes the folded weights into the model; the deltas stay attached."""
    problems = [f"{path}: {reason}" for path, reason in plan.problems]
    if not untie_weights:
        problems += [
            f"{module_of(name)}: the weight is tied to {listed(map(module_of, others))}, whose"
            " change would differ; use untie_weights=True to separate the weights"
            for name, others in plan.untied.items()
        ]
    if problems:
        raise NotMergeable(join_problems(problems))
    enable_switches(model, plan.switches)
    if plan.vocabulary is not None:
        set_vocabulary_size(model, plan.vocabulary)
    tied_modules = {module_of(name) for name in plan.tied}
    # all modules of a tied weight must be folded before the weight changes
    folded = {path: _fold_module(model, path, names) for path in plan.paths if path in tied_modules}
    for path in plan.paths:
        w, b = folded[path] if path in folded else _fold_module(model, path, names)
        module = module_at(model, path)
        if f"{path}.weight" in plan.untied:
            module.weight = _copy_parameter(bare(module).weight)  # type: ignore[arg-type]
        layer_of(module).dequantize()
        layer_of(module).write(w, b)
    for name, others in plan.tied.items():  # a grown weight is a new parameter
        merged = bare(module_at(model, module_of(name)))
        for other in others:
            path, _, leaf = other.rpartition(".")
            setattr(module_at(model, path), leaf, getattr(merged, leaf))
    if plan.untied:
        untie_remaining(model)


@torch.no_grad()
def _fold_module(model: nn.Module, path: str, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    module = module_at(model, path)
    wide = [
        None if t is None else t.detach().to(torch.promote_types(t.dtype, torch.float32))
        for t in layer_of(module).dense()
    ]
    return fold(module, names, *wide)  # type: ignore[arg-type]
