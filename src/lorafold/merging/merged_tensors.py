"""Computes and writes the merged and rounded tensors of a checkpoint, one tensor at a time.

    W' = round(fold_n(... fold_1(W)))       with the `fold` of each delta

A parameter that transformers computes from several tensors is merged once for all of them. Rounded
tensors are cached until they are written, because files list the experts' tensors in another order
than the parameters.

Memory holds the adapters, and at most three times the largest changed tensor in fp32. Unchanged
tensors are copied byte for byte; names, dtypes and shards stay the same.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafold.core.attach import Adapted
from lorafold.core.expert_matrices import module_at
from lorafold.core.rounding import generator_of
from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_json
from lorafold.files.terminal import Progress, no_progress
from lorafold.fold.plan import deltas_of, fold
from lorafold.fold.quantization_round_trip import ROUND_TRIP
from lorafold.layers import layer_of
from lorafold.merging.plan import MergePlan
from lorafold.merging.rounding import RoundedTensor, Rounding, RoundingStats, round_to
from lorafold.models.weight_conversion import Conversion
from lorafold.models.weights import INDEX, write_container

# two parameters of a block's experts, and two whose tensors are split between two files
MAX_CACHED = 4


@torch.no_grad()
def encode_wide(module: nn.Module, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """New tensors, fp32 or wider, in which a module stores the weight w (out, in) and bias b."""
    layer = layer_of(module)
    stored = {}
    for name, value in layer.plain().encode(w, b).items():
        own = value if layer.quantized else layer.parameter(name)
        dtype = (layer.parameter("weight") if own is None else own).dtype
        stored[name] = torch.empty(
            value.shape, dtype=torch.promote_types(dtype, torch.float32), device=value.device
        ).copy_(value)
    return stored


def equate_rows(target: Tensor, original: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Makes target and original, both (n', k), equal in rows that adapters replace or append, so
    that these rows count neither as update nor as rounding noise.
    """
    replaced = torch.tensor(
        [*(i for i in rows if i < len(original)), *range(len(original), len(target))],
        dtype=torch.long,
    )
    if not len(replaced):
        return target, original
    nearest = target[replaced].to(original.dtype)
    original = torch.cat(
        [original, original.new_empty(len(target) - len(original), *original.shape[1:])]
    )
    original.index_copy_(0, replaced, nearest)
    return target.index_copy_(0, replaced, nearest.to(target.dtype)), original


class MergedValues:
    """The new values of tensors, each requested once, with rounding statistics."""

    def __init__(self, plan: MergePlan, rounding: Rounding, seed: int) -> None:
        self.plan, self.rounding, self.seed = plan, rounding, seed
        self.stats, self.rounded = RoundingStats(), Counter[str]()
        self._cache: dict[Conversion, dict[str, RoundedTensor]] = {}

    def new_values(self, name: str) -> Tensor | None:
        """The new values of a tensor (any shape) in its dtype; None if it does not change."""
        if (conversion := self.plan.converted.get(name)) is not None:
            tensors = self._cache.pop(conversion, {})
            if name not in tensors:
                while len(self._cache) >= MAX_CACHED:
                    del self._cache[next(iter(self._cache))]  # the least recently used
                tensors = self._convert(conversion)
            result = tensors.pop(name)
            if tensors:
                self._cache[conversion] = tensors
        elif name in self.plan.changed:
            result = self._rounded(name, *self._folded(self.plan.changed[name]))
        elif name in self.plan.dequantized:
            layer = layer_of(module_at(self.plan.model, self.plan.dequantized[name]))
            return layer.plain().encode(*layer.dense())["weight"]
        else:
            return self.plan.zeros.get(name)
        self.stats += result.stats
        self.rounded[result.mode] += 1
        return result.tensor

    def _folded(self, parameter: str) -> tuple[Tensor, Tensor]:
        """(merged, original) values of a parameter, of any shape."""
        path, leaf = self.plan.sites[parameter]
        module: Adapted = module_at(self.plan.model, path)  # type: ignore[assignment]
        before, after = before_and_after(module, self.plan.adapters, leaf)
        replaced = [
            i
            for delta in deltas_of(module, self.plan.adapters)
            for part in delta.parts()
            for i in part.values_at()
        ]
        return equate_rows(after, before, replaced if leaf == "weight" else ())

    def _rounded(self, name: str, target: Tensor, original: Tensor) -> RoundedTensor:
        try:
            return round_to(target, original, self.rounding, generator_of(self.seed, name))
        except LorafoldError as e:
            raise LorafoldError(f"{name}: {e}") from None

    @torch.no_grad()
    def _convert(self, conversion: Conversion) -> dict[str, RoundedTensor]:
        """The merged tensors from which transformers computes the parameters of a conversion."""
        targets, originals = {}, {}
        with conversion.made() as values:
            for parameter, value in values.items():
                targets[parameter], originals[parameter] = (
                    self._folded(parameter) if parameter in self.plan.sites else (value, value)
                )
        before = conversion.reversed(originals)
        originals.clear()
        after = conversion.reversed(targets)
        targets.clear()
        return {name: self._rounded(name, after[name], before[name]) for name in after}


@torch.no_grad()
def before_and_after(
    module: Adapted, adapters: Sequence[str], parameter: str
) -> tuple[Tensor, Tensor]:
    """A parameter (any shape) before merging, in its dtype, and after, in fp32 or wider."""
    layer = layer_of(module)
    w, b = layer.dense()
    before = (
        layer.plain().encode(w, b)[parameter] if layer.quantized else layer.parameter(parameter)
    )
    if ROUND_TRIP in module.deltas:
        w, b = fold(module, [ROUND_TRIP], w, b)
        before = encode_wide(module, w, b)[parameter].to(before.dtype)
    return before, encode_wide(module, *fold(module, adapters, w, b))[parameter]


NewValues = Callable[[str], Tensor | None]  # by name; None: the plan's entry is unchanged
OnWritten = Callable[[str, int], None]  # name and bytes of a tensor, after it was written
# A format of merged models. It writes the tensors of `MergePlan.layout`, requesting each once, and
# the other files of its format: `plan.config`, `plan.checkpoint.other_files()`.
Writer = Callable[[MergePlan, NewValues, OnWritten], None]


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge: rounding statistics, the number of tensors by rounding mode, tensors
    added for untied weights, added biases, and the vocabulary's size if it grew.
    """

    stats: RoundingStats
    rounded: dict[str, int]
    untied: tuple[str, ...]
    biases: tuple[str, ...]
    vocabulary: int | None


def write_merged(
    plan: MergePlan,
    writer: Writer,
    rounding: Rounding = "auto",
    seed: int = 0,
    progress: Progress = no_progress,
) -> MergeResult:
    """Writes the merged model; `progress` counts bytes."""
    values, total, done = MergedValues(plan, rounding, seed), plan.weight_bytes, 0

    def written(_: str, size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    writer(plan, values.new_values, written)
    biases = tuple(name for name, like in plan.added.items() if like.name == name)
    untied = tuple(name for name in plan.added if name not in biases)
    return MergeResult(values.stats, dict(values.rounded), untied, biases, plan.vocabulary)


def write_shards(out: Path, plan: MergePlan, values: NewValues, on_written: OnWritten) -> None:
    """Writes a transformers model directory; a `Writer` once `out` is bound."""
    other_files = plan.checkpoint.other_files()
    total = plan.weight_bytes
    other_bytes = sum((plan.checkpoint.path / path).stat().st_size for path in other_files)
    check_disk_space(out.parent, total + other_bytes, "the merged model")
    for path in other_files:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.path / path, out / path)
    write_json(out / "config.json", plan.config)
    for file, container in plan.checkpoint.files.items():
        write_container(out / file, plan.layout(file), container.metadata, values, on_written)
    if plan.checkpoint.index is not None:
        weight_map = {name: file for file in plan.checkpoint.files for name, _ in plan.layout(file)}
        metadata = {**plan.checkpoint.index.get("metadata", {}), "total_size": total}
        write_json(out / INDEX, {"metadata": metadata, "weight_map": weight_map})


def check_disk_space(directory: Path, size: int, content: str) -> None:
    """Checks that the disk of `directory` has `size` bytes left."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise LorafoldError(
            f"{directory}: the disk has {free / 1e9:.1f} GB left, {content} needs"
            f" {size / 1e9:.1f} GB; free some space or choose another --out"
        )
