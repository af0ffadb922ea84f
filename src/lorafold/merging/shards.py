"""Write a checkpoint with adapters folded in, one tensor at a time from the safetensors files.

Tensors that no adapter changes are copied byte for byte; names, dtypes and the division into files
stay. Where two modules share a weight and adapters change only one of them, each module gets its
own. Memory: the adapters, and at most three times the largest changed tensor in fp32, whatever the
size of the model; where transformers computes a parameter from several tensors (`folding`), three
and a half times that parameter, and the rounded tensors that are not written yet.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_json
from lorafold.fold.rounding import Rounding, Sums
from lorafold.merging.folding import Folding
from lorafold.merging.plan import Plan
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
    folding, done = Folding(plan, rounding, seed), 0

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
        layout, values = plan.layout(file), folding.new_values
        write_container(out / file, layout, container.metadata, values, written)
    if plan.checkpoint.index is not None:
        where = {name: file for file in plan.checkpoint.files for name, _ in plan.layout(file)}
        metadata = {**plan.checkpoint.index.get("metadata", {}), "total_size": total}
        write_json(out / INDEX, {"metadata": metadata, "weight_map": where})
    biases = tuple(name for name, like in plan.added.items() if like.name == name)
    return Folded(
        folding.sums,
        dict(folding.rounded),
        tuple(name for name in plan.added if name not in biases),
        biases,
        plan.vocabulary,
    )


def need_space(directory: Path, size: int) -> None:
    """Raises LorafoldError unless the disk of `directory` has room for `size` bytes."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise LorafoldError(
            f"{directory.parent}: the disk has {free / 1e9:.1f} GB left, the merged model needs"
            f" {size / 1e9:.1f} GB; free some space or choose another --out"
        )
