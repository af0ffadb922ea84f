"""Write a checkpoint with adapters folded in, one tensor at a time to safetensors files.

Tensors that no adapter changes are copied byte for byte; names, dtypes and the division into files
stay. Where two modules share a weight and adapters change only one of them, each module gets its
own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_json
from lorafold.merging.execute import Values, Written
from lorafold.merging.plan import Plan
from lorafold.models.weights import INDEX, write_container


def write_shards(out: Path, plan: Plan, values: Values, written: Written) -> None:
    """Write the merged model as a directory of transformers; a `Writer` but for `out`.

    Args:
        out: An empty directory.
        plan: What changes, and in which files.
        values: The new values of a tensor.
        written: Called after each tensor.

    Raises LorafoldError if the disk has no room.
    """
    carried = plan.checkpoint.other_files()
    total = plan.weight_bytes
    need_space(out, total + sum((plan.checkpoint.path / p).stat().st_size for p in carried))
    for path in carried:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.path / path, out / path)
    write_json(out / "config.json", plan.config)
    for file, container in plan.checkpoint.files.items():
        write_container(out / file, plan.layout(file), container.metadata, values, written)
    if plan.checkpoint.index is not None:
        where = {name: file for file in plan.checkpoint.files for name, _ in plan.layout(file)}
        metadata = {**plan.checkpoint.index.get("metadata", {}), "total_size": total}
        write_json(out / INDEX, {"metadata": metadata, "weight_map": where})


def need_space(directory: Path, size: int) -> None:
    """Raises LorafoldError unless the disk of `directory` has room for `size` bytes."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise LorafoldError(
            f"{directory.parent}: the disk has {free / 1e9:.1f} GB left, the merged model needs"
            f" {size / 1e9:.1f} GB; free some space or choose another --out"
        )
