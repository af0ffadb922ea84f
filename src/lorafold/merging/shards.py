"""Fold adapters into a checkpoint, shard by shard straight from the safetensors files.

    W' = round(fold_n(... fold_1(W)))       one tensor at a time; each method's own `fold`, so
                                            nothing here knows a method

What no adapter changes is copied byte for byte; names, dtypes and the division into files are kept.
A weight that two modules share and an adapter changes in one of them is untied: each gets its own.
Memory: the factors and at most three times the largest changed tensor in fp32, whatever the size of
the model.
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
from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_json
from lorafold.fold.plan import deltas_of, fold
from lorafold.fold.rounding import Rounding, Sums, round_to
from lorafold.merging.into import PACKING
from lorafold.merging.plan import Plan
from lorafold.merging.stored import as_stored, settled
from lorafold.models.container import write_container
from lorafold.models.weights import INDEX

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Folded:
    """What was done: the update's inner products, tensors by the way they were rounded, tensors
    that had to be added to untie, biases that the model had not, and the size of the vocabulary if
    it grew.
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
    """Write the merged model to the empty directory `out`.

    LorafoldError if the disk has no room for it, or a folded value does not fit its dtype.
    """
    carried = plan.checkpoint.other_files()
    total = plan.weight_bytes
    need_space(out, total + sum((plan.checkpoint.path / p).stat().st_size for p in carried))
    sums, rounded, done = Sums(), Counter[str](), 0

    def new_values(name: str) -> Tensor | None:
        nonlocal sums
        if name not in plan.changed:
            return plan.zeros.get(name)
        path, _, parameter = plan.changed[name].rpartition(".")
        module: Adapted = plan.model.get_submodule(path)  # type: ignore[assignment]
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
    """The module's weight or bias as it stores them: what the named adapters are added to, in its
    own dtype, and what comes of it, in fp32 or wider.
    """
    layer = layer_of(module)
    before: Tensor = getattr(layer.bare, parameter)
    w, b = layer.dense()
    if PACKING in module.deltas:
        w, b = fold(module, [PACKING], w, b)
        before = as_stored(module, w, b)[parameter].to(before.dtype)
    return before, as_stored(module, *fold(module, adapters, w, b))[parameter]


def need_space(directory: Path, size: int) -> None:
    """LorafoldError unless the disk that `directory` lies on has room for `size` bytes."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise LorafoldError(
            f"the merged model takes {size / 1e9:.1f} GB, and {directory.parent} has"
            f" {free / 1e9:.1f} GB left"
        )
