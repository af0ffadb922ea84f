"""Fold adapters into a checkpoint, shard by shard straight from the safetensors files: the whole of `lorafold merge`.

    W' = round(fold_n(... fold_1(W)))       one tensor at a time; each method's own `fold`, so nothing here knows a method

What no adapter changes is copied byte for byte; names, dtypes and the division into files are kept. A weight that two modules share
and an adapter changes in one of them is untied: each gets its own. Memory: the factors and at most three times the largest
changed tensor in fp32, whatever the size of the model. The certificate is a second stage, which loads one model at a time.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafold.adapter import load
from lorafold.bases import layer_of
from lorafold.core.attach import Adapted
from lorafold.errors import LorafoldError
from lorafold.io.atomic import atomic_directory, write_json
from lorafold.io.models import choose_device, load_model, load_tokenizer, resolve_model
from lorafold.merge.certificate import Gap, compare, probe_ids
from lorafold.merge.checkpoint import INDEX
from lorafold.merge.container import write_container
from lorafold.merge.plan import Plan, deltas_of, plan
from lorafold.merge.rounding import Rounding, Sums, generator_of, round_to

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

CERTIFICATE = "merge.json"
Progress = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True)
class Folded:
    """What was done: the update's inner products, tensors by the way they were rounded, tensors that had to be added to untie."""

    sums: Sums
    rounded: dict[str, int]
    untied: tuple[str, ...]


@dataclass(frozen=True)
class Merged:
    """A merged model: what `merge.json` says. `gap` is None without the certificate."""

    gap: Gap | None
    folded: Folded
    rounding: Rounding
    seed: int
    model: str
    adapters: tuple[str, ...]
    out: str

    @property
    def kl(self) -> float | None:
        return None if self.gap is None else self.gap.kl

    def as_json(self) -> dict[str, Any]:
        """update_survival and rounding_noise are shares of the update's norm; `rounded` counts the changed tensors."""
        gap: dict[str, Any] = asdict(self.gap) if self.gap else dict.fromkeys(f.name for f in fields(Gap))
        folded = {"update_survival": self.folded.sums.survival, "rounding_noise": self.folded.sums.noise}
        done = {"rounded": self.folded.rounded, "untied": list(self.folded.untied)}
        asked = {"rounding": self.rounding, "seed": self.seed, "model": self.model, "adapters": list(self.adapters), "out": self.out}
        return {**gap, **folded, **done, **asked}

    def summary(self) -> str:
        """A few lines to read."""
        words = {"exact": "kept as computed", "nearest": "rounded to nearest", "stochastic": f"rounded stochastically, seed {self.seed}"}
        how = ", ".join(f"{count} tensors {words[word]}" for word, count in self.folded.rounded.items())
        sums = self.folded.sums
        lines = [f"merged: {self.out} ({how or 'nothing changed'})"]
        lines.append(f"  {sums.survival:.2%} of the update survives; rounding added noise of {sums.noise:.2%} of its norm")
        if self.folded.untied:
            lines.append(f"  embedding and head share their weight no longer: {', '.join(self.folded.untied)} was added")
        if self.gap:
            lines.append(f"  against the adapted model, {self.gap.positions:,} positions in fp32: KL {self.gap.kl:.2e}, same token at "
                         f"{self.gap.argmax_agreement:.2%}, logits at most {self.gap.max_logit_gap:.3g} apart")  # fmt: skip
        return "\n".join(lines)


def merge(
    model: str, adapters: Sequence[str | Path], out: str | Path, *, rounding: Rounding = "auto", seed: int = 0, certificate: bool = True,
    probe: str | Path | None = None, allow_other_base: bool = False, overwrite: bool = False, revision: str | None = None,
    trust_remote_code: bool = False, device: str | None = None, console: Console | None = None,
) -> Merged:  # fmt: skip
    """Fold adapters, in the order given, into a model and write a plain Hugging Face directory, which appears whole or not at all.

    `probe` is a data file whose rows the certificate is measured on (None: built-in texts); `device` computes the certificate.
    Raises LorafoldError, with nothing left behind, listing what is wrong with the model, an adapter, the probe or `out`.
    """
    if not adapters:
        raise LorafoldError("nothing to merge: found no adapter, expected at least one")
    where = choose_device(device)
    with atomic_directory(out, overwrite) as tmp, _bars(console) as bar:
        source = resolve_model(model, revision)
        texts = probe_ids(load_tokenizer(source, trust_remote_code=trust_remote_code), probe) if certificate else []
        planned = plan(source.path, adapters, allow_other_base=allow_other_base, trust_remote_code=trust_remote_code)
        folded = execute(planned, tmp, rounding=rounding, seed=seed, progress=bar("folding"))
        del planned

        def adapted() -> PreTrainedModel:
            base = load_model(source, torch.float32, where, trust_remote_code=trust_remote_code)
            for i, path in enumerate(adapters):
                load(base, path, f"adapter{i}", allow_other_base=allow_other_base)
            return base

        def merged() -> PreTrainedModel:
            return load_model(tmp, torch.float32, where, trust_remote_code=trust_remote_code)

        gap = compare(adapted, merged, texts, tmp, bar("comparing")) if certificate else None
        result = Merged(gap, folded, rounding, seed, source.name, tuple(map(str, adapters)), str(out))
        write_json(tmp / CERTIFICATE, result.as_json())
    return result


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
    for delta in deltas_of(module, adapters):
        w, b = delta.fold(w, b)
    own = {n: p for n, p in module._parameters.items() if p is not None}
    wide = {n: torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in own.items()}
    with _holding(module, wide):
        layer_of(module).write(w, b)
    return wide[parameter]


def need_space(directory: Path, size: int) -> None:
    """LorafoldError unless the disk that `directory` lies on has room for `size` bytes."""
    if (free := shutil.disk_usage(directory).free) < size:
        raise LorafoldError(f"the merged model takes {size / 1e9:.1f} GB, and {directory.parent} has {free / 1e9:.1f} GB left")


@contextmanager
def _holding(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let these tensors stand in the places of the module's parameters."""
    before = dict(module._parameters)
    module._parameters.update({n: nn.Parameter(t, requires_grad=False) for n, t in tensors.items()})
    try:
        yield
    finally:
        module._parameters.update(before)


@contextmanager
def _bars(console: Console | None) -> Iterator[Callable[[str], Progress]]:
    """Makes progress bars, one a stage, on a terminal; without one, progress goes nowhere."""
    from rich.progress import Progress as Bars

    with Bars(console=console, disable=console is None or not console.is_terminal, transient=True) as bars:

        def bar(stage: str) -> Progress:
            task = bars.add_task(stage, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar
