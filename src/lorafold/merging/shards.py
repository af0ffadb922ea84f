"""Fold adapters into a checkpoint, one tensor at a time from the safetensors files.

    W' = round(fold_n(... fold_1(W)))       with each delta's own `fold`

Tensors that no adapter changes are copied byte for byte; names, dtypes and the division into files
stay. Where two modules share a weight and adapters change only one of them, each module gets its
own. Memory: the adapters, and at most three times the largest changed tensor in fp32, whatever the
size of the model.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorafold.bases import layer_of
from lorafold.core.attach import Adapted
from lorafold.core.rounding import generator_of
from lorafold.core.stacked import module_at
from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_json
from lorafold.fold.plan import deltas_of, fold
from lorafold.fold.rounding import Rounding, Sums, round_to
from lorafold.merging.into import ROUND_TRIP
from lorafold.merging.plan import Plan
from lorafold.merging.stored import as_stored, settled
from lorafold.models.container import write_container
from lorafold.models.weights import INDEX

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Folded:
    """What was done: the inner products of the update and its rounding errors, the number of
    tensors by the way they were rounded, the tensors added to untie weights, the biases added, and
    the size of the vocabulary if it grew.
    """

    sums: Sums
    rounded: dict[str, int]
    untied: tuple[str, ...]
    biases: tuple[str, ...]
    vocabulary: int | None


def execute(
    plan: Plan,
    out: Path,
    *,
    rounding: Rounding = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Folded:
    """Write the merged model.

    Args:
        plan: What changes, and in which files.
        out: An empty directory.
        rounding: nearest, stochastic or auto.
        seed: The seed of stochastic rounding.
        progress: Called as progress(bytes written, bytes in all) after each tensor.

    Raises LorafoldError if the disk has no room, or a folded value does not fit its dtype.
    """
    carried = plan.checkpoint.other_files()
    total = plan.weight_bytes
    need_space(out, total + sum((plan.checkpoint.path / p).stat().st_size for p in carried))
    sums, rounded, done = Sums(), Counter[str](), 0

    def dequantized(name: str) -> Tensor:
        return layer_of(plan.model.get_submodule(plan.dequantized[name])).dense()[0]

    def new_values(name: str) -> Tensor | None:
        nonlocal sums
        if name not in plan.changed:
            return plan.zeros.get(name) if name not in plan.dequantized else dequantized(name)
        path, parameter = plan.sites[plan.changed[name]]
        module: Adapted = module_at(plan.model, path)  # type: ignore[assignment]
        before, after = before_and_after(module, plan.adapters, parameter)
        values = [
            i
            for delta in deltas_of(module, plan.adapters)
            for part in delta.parts()
            for i in part.values_at()
        ]
        target, original = settled(after, before, values if parameter == "weight" else ())
        try:
            result = round_to(target, original, rounding, generator_of(seed, name))
        except LorafoldError as e:
            raise LorafoldError(f"{name}: {e}") from None
        sums += result.sums
        rounded[result.how] += 1
        return result.tensor

    def written(_: str, size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    for path in carried:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.path / path, out / path)
    write_json(out / "config.json", plan.config)
    for file, container in plan.checkpoint.files.items():
        write_container(out / file, plan.layout(file), container.metadata, new_values, written)
    if plan.checkpoint.index is not None:
        where = {name: file for file in plan.checkpoint.files for name, _ in plan.layout(file)}
        metadata = {**plan.checkpoint.index.get("metadata", {}), "total_size": total}
        write_json(out / INDEX, {"metadata": metadata, "weight_map": where})
    biases = tuple(name for name, like in plan.added.items() if like.name == name)
    return Folded(
        sums,
        dict(rounded),
        tuple(name for name in plan.added if name not in biases),
        biases,
        plan.vocabulary,
    )


@torch.no_grad()
def before_and_after(
    module: Adapted, adapters: Sequence[str], parameter: str
) -> tuple[Tensor, Tensor]:
    """A parameter in the module's layout, of any shape, before and after folding: (the value that
    the adapters change, in the module's dtype; the changed value, in fp32 or wider).

    Args:
        module: With the adapters attached.
        adapters: Their names, in the order of folding.
        parameter: weight or bias.
    """
    layer = layer_of(module)
    w, b = layer.dense()
    before: Tensor = (
        layer.plain().encode(w, b)[parameter] if layer.quantized else layer.parameter(parameter)
    )
    if ROUND_TRIP in module.deltas:
        w, b = fold(module, [ROUND_TRIP], w, b)
        before = as_stored(module, w, b)[parameter].to(before.dtype)
    return before, as_stored(module, *fold(module, adapters, w, b))[parameter]


def need_space(directory: Path, size: int) -> None:
    """Raises LorafoldError unless the disk of `directory` has room for `size` bytes."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise LorafoldError(
            f"{directory.parent}: the disk has {free / 1e9:.1f} GB left, the merged model needs"
            f" {size / 1e9:.1f} GB; free some space or choose another --out"
        )
