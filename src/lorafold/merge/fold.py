"""Fold adapters into a checkpoint: plan, then execute, shard by shard straight from the safetensors files.

    W' = round(fold_n(... fold_1(W)))       one tensor at a time; each method's own `fold`, so nothing here knows a method

The plan finds everything that is wrong before a byte is written. What no adapter changes is copied byte for byte; names, dtypes and
the division into files are kept. A weight that two modules share and one adapter changes is untied: each gets its own.
Memory: the factors and about three times the largest changed tensor in fp32, whatever the size of the model.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapter import load
from lorafold.bases import layer_of
from lorafold.core.attach import Adapted, adapted_modules
from lorafold.core.delta import Delta
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.io.atomic import write_json
from lorafold.merge.checkpoint import INDEX, Checkpoint, Skeleton, open_checkpoint, skeleton, untied_config
from lorafold.merge.container import Entry, write_container
from lorafold.merge.rounding import Rounding, Sums, generator_of, round_to

FLOATS = ("F64", "F32", "F16", "BF16")
Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Plan:
    """What will be written. `changed` maps the name of a tensor to the module and the parameter it is; `added` are tensors that the
    files lack, each beside the one that it was tied to."""

    checkpoint: Checkpoint
    model: nn.Module
    adapters: tuple[str, ...]
    changed: dict[str, tuple[str, str]]
    added: dict[str, Entry]
    config: dict[str, Any]

    def layout(self, file: str) -> list[tuple[str, Entry]]:
        entries = self.checkpoint.files[file].entries
        return [*entries.items(), *((name, e) for name, e in self.added.items() if entries.get(e.name) is e)]

    @property
    def weight_bytes(self) -> int:
        return sum(entry.size for file in self.checkpoint.files for _, entry in self.layout(file))


@dataclass(frozen=True)
class Folded:
    """What was done: the update's inner products, tensors by the way they were rounded, tensors that had to be added to untie."""

    sums: Sums
    rounded: dict[str, int]
    untied: tuple[str, ...]


def plan(source: Path, adapters: Sequence[str | Path], *, allow_other_base: bool = False, trust_remote_code: bool = False) -> Plan:
    """Lay the adapters, in order, over the model in `source` and see what they change. Nothing is computed or written.

    LorafoldError lists everything that stands in the way of the merge.
    """
    checkpoint = open_checkpoint(source)
    bones = skeleton(checkpoint, trust_remote_code)
    names = tuple(f"merged{i}" for i in range(len(adapters)))
    for name, path in zip(names, adapters, strict=True):
        load(bones.model, path, name, allow_other_base=allow_other_base)
    problems: dict[str, list[str]] = defaultdict(list)
    changed: dict[str, tuple[str, str]] = {}
    sources: dict[str, Entry] = {}
    for path, module in adapted_modules(bones.model):
        try:
            for parameter in _changes(module, names):
                name, entry = _place(bones, f"{path}.{parameter}")
                changed[name], sources[name] = (path, parameter), entry
        except NotMergeable as e:
            problems[str(e)].append(path or "the model as a whole")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if any(f"{path}.{parameter}" in bones.tied for path, parameter in changed.values()):
        try:
            config = untied_config(config, bones, trust_remote_code)
        except LorafoldError as e:
            problems[str(e)].append("tied weights")
    if problems:
        raise NotMergeable("; ".join(f"{_few(paths)}: {reason}" for reason, paths in problems.items()))
    return Plan(checkpoint, bones.model, names, changed, _untied(bones, changed, sources), config)


def execute(plan: Plan, out: Path, *, rounding: Rounding = "auto", seed: int = 0, progress: Progress | None = None) -> Folded:
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
            return None
        path, parameter = plan.changed[name]
        module: Adapted = plan.model.get_submodule(path)  # type: ignore[assignment]
        try:
            result = round_to(fold(module, plan.adapters, parameter), getattr(module, parameter), rounding, generator_of(seed, name))
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
    return Folded(sums, dict(rounded), tuple(plan.added))


@torch.no_grad()
def fold(module: Adapted, adapters: Sequence[str], parameter: str) -> Tensor:
    """The module's weight or bias under the named adapters, in fp32 or wider, as the module stores it."""
    w, b = layer_of(module).dense()
    for delta in _deltas(module, adapters):
        w, b = delta.fold(w, b)
    wide = {n: torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in module._parameters.items() if p is not None}
    with _holding(module, wide):
        layer_of(module).write(w, b)
    return wide[parameter]


def need_space(directory: Path, size: int) -> None:
    """LorafoldError unless the disk that `directory` lies on has room for `size` bytes."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise LorafoldError(f"the merged model takes {size / 1e9:.1f} GB, and {directory.parent} has {free / 1e9:.1f} GB left")


def _deltas(module: Adapted, adapters: Sequence[str]) -> Iterator[Delta]:
    return (module.deltas[name] for name in adapters if name in module.deltas)  # type: ignore[misc]


def _changes(module: Adapted, adapters: Sequence[str]) -> list[str]:
    """The parameters that folding will change, found by folding shapes. NotMergeable as `fold`, or for a bias where none can be."""
    before = [t if t is None else t.to("meta") for t in layer_of(module).dense()]
    w, b = before
    for delta in _deltas(module, adapters):
        w, b = _on_meta(delta).fold(w, b)  # type: ignore[arg-type]
    if before[1] is None and b is not None:
        raise NotMergeable(f"the adapter adds a bias, and the plain model's {type(module).__name__} has none to hold it")
    return [name for name, old, new in zip(("weight", "bias"), before, (w, b), strict=True) if new is not old]


def _on_meta(delta: Delta) -> Delta:
    """A copy of the delta without its values."""
    tensors = [*delta.parameters(), *delta.buffers()]
    return copy.deepcopy(delta, {id(t): nn.Parameter(t.to("meta"), requires_grad=False) for t in tensors})


def _place(bones: Skeleton, parameter: str) -> tuple[str, Entry]:
    """The name under which a parameter is written, and the entry that holds its values: its own, or that of one it is tied to."""
    names = (parameter, *bones.tied.get(parameter, ()))
    if any(n in bones.converted for n in names):
        raise NotMergeable("the files hold this weight in a form that transformers converts on loading, so it can't be written back")
    entry = next(bones.entries[n] for n in names if n in bones.entries)
    if entry.dtype not in FLOATS:
        raise NotMergeable(f"its weight is stored as {entry.dtype}, expected one of {', '.join(FLOATS)}")
    return (entry.name if parameter in bones.entries else parameter), entry


def _untied(bones: Skeleton, changed: dict[str, tuple[str, str]], sources: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors to add, so that every module whose weight was shared with a changed one has its own."""
    added = {}
    for name, (path, parameter) in changed.items():
        for n in (f"{path}.{parameter}", *bones.tied.get(f"{path}.{parameter}", ())):
            if n not in bones.entries:
                added[n] = sources[name]
    return added


@contextmanager
def _holding(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let these tensors stand in the places of the module's parameters."""
    before = dict(module._parameters)
    module._parameters.update({n: nn.Parameter(t, requires_grad=False) for n, t in tensors.items()})
    try:
        yield
    finally:
        module._parameters.update(before)


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
