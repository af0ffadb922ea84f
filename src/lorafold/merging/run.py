"""From a base and adapters to a plain Hugging Face directory with a certificate.

    plan -> fold -> certify      folding keeps one tensor in memory, the certificate one model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafold.adapter import load
from lorafold.data.probes import probe_ids
from lorafold.errors import listed
from lorafold.files.atomic import atomic_directory, check_out, write_json
from lorafold.files.page import Shown
from lorafold.files.paths import check_kept
from lorafold.fold.rounding import Rounding
from lorafold.merging.certificate import Gap, compare
from lorafold.merging.execute import Folded, execute
from lorafold.merging.into import Distance, Into, check_saved, choose_into
from lorafold.merging.plan import Plan, plan
from lorafold.merging.shards import write_shards
from lorafold.models.load_errors import loading
from lorafold.models.loading import load_model, stored_in_files
from lorafold.models.storages import Storage
from lorafold.models.tokenizer import write_tokenizer
from lorafold.opening import Base
from lorafold.opening.base import check_language_model
from lorafold.peft.saved import Saved

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

CERTIFICATE = "merge.json"
INSTEAD = "; merge another one in Python, with adapter.merge() and model.save_pretrained(out)"


@dataclass(frozen=True)
class Wanted:
    """The choices of `lf.merge` besides the model and the adapters."""

    into: str | None = None
    rounding: Rounding = "auto"
    seed: int = 0
    certificate: bool = True
    probe: str | Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Merged(Shown):
    """A merged model, as `merge.json` describes it. `gap` is None without the certificate;
    `from_original` is how far the adapters over the original weights are from the model that was
    trained, where these are others; `other_base` has a line for each adapter that was trained on
    another base.
    """

    gap: Gap | None
    folded: Folded
    into: Into
    rounding: Rounding
    seed: int
    model: str
    adapters: tuple[str, ...]
    out: str
    other_base: tuple[str, ...] = ()
    from_original: Distance | None = None

    @property
    def kl(self) -> float | None:
        """The certificate's KL divergence in nats a token, or None without a certificate."""
        return None if self.gap is None else self.gap.kl

    def as_json(self) -> dict[str, Any]:
        """The content of `merge.json`. update_survival and rounding_noise are shares of the norm of
        the update; `rounded` counts the changed tensors by the way they were rounded.
        """
        gap: dict[str, Any] = (
            asdict(self.gap) if self.gap else dict.fromkeys(f.name for f in fields(Gap))
        )
        folded = {
            "update_survival": self.folded.sums.survival,
            "rounding_noise": self.folded.sums.noise,
        }
        done = {
            "rounded": self.folded.rounded,
            "untied": list(self.folded.untied),
            "biases": list(self.folded.biases),
        }
        grown = {"vocabulary": self.folded.vocabulary}
        asked = {
            "rounding": self.rounding,
            "seed": self.seed,
            "model": self.model,
            "adapters": list(self.adapters),
            "out": self.out,
            "other_base": list(self.other_base),
        }
        into = {
            "into": self.into.target,
            "trained_on": self.into.trained_on,
            "computed_in": self.into.base and self.into.base.dtype,
            "recorded": list(self.into.recorded),
            "from_original": self.from_original and asdict(self.from_original),
        }
        return {**gap, **folded, **done, **grown, **into, **asked}

    def summary(self) -> str:
        """A few lines to read."""
        ways = {
            "exact": "kept as computed",
            "nearest": "rounded to nearest",
            "stochastic": f"rounded stochastically, seed {self.seed}",
        }
        how = ", ".join(
            f"{count} {'tensor' if count == 1 else 'tensors'} {ways[way]}"
            for way, count in self.folded.rounded.items()
        )
        sums = self.folded.sums
        lines = [f"merged: {self.out}, into {self.into} ({how or 'nothing changed'})"]
        lines.append(
            f"  {sums.survival:.2%} of the update survives; the noise that rounding added is"
            f" {sums.noise:.2%} of its norm{', before quantization' * bool(self.into.quantized)}"
        )
        if untied := self.folded.untied:
            lines.append(
                f"  weights are no longer shared: {listed(untied)}"
                f" {'was' if len(untied) == 1 else 'were'} added"
            )
        if self.folded.biases:
            n = len(self.folded.biases)
            added = "1 bias was" if n == 1 else f"{n} biases were"
            lines.append(f"  {added} added and enabled in config.json")
        if self.folded.vocabulary:
            lines.append(f"  the vocabulary grew to {self.folded.vocabulary:,} tokens")
        here = None if self.gap is None else self.gap.distance
        lines.append(f"  {self.into.compared(self.model, 'this file', here, self.from_original)}")
        if self.gap:
            lines.append(
                f"  compared at {self.gap.positions:,} positions in fp32; logits differ by at most"
                f" {self.gap.max_logit_gap:.3g}"
            )
        return "\n".join(lines)


def merge(
    base: Base,
    adapters: Sequence[Saved],
    out: Path,
    wanted: Wanted,
    console: Console | None = None,
) -> Merged:
    """Fold saved adapters into their base and write a plain Hugging Face model, as `lf.merge`,
    whose arguments these are.

    Args:
        base: In the storage on which the adapters were trained; auto takes it from their records.
    """
    check_out(out, wanted.overwrite)
    asked, base = base.storage, base.with_files_for(adapters)
    source, _ = base.source, base.held  # a wrong name or device is told before any work
    check_kept(out, [source.path, *(one.path for one in adapters)])
    with atomic_directory(out, wanted.overwrite) as tmp, bars(console) as bar:
        target = choose_into(wanted.into, adapters, asked, stored_in_files(source))
        if console is not None and (target.trained_on or target.asked or target.unmade):
            console.print(f"merging into {target}", highlight=False)
        check_language_model(base, adapters, INSTEAD)
        own = any(one.own_tokenizer for one in adapters)
        tokenizer = base.tokenizer(adapters) if own or wanted.certificate else None
        compared = tokenizer if wanted.certificate else None
        texts = [] if compared is None else probe_ids(compared, wanted.probe)
        shards, rounding = partial(write_shards, tmp), (wanted.rounding, wanted.seed)
        changes = planned(base, adapters, target)
        folded, others = execute(changes, shards, *rounding, bar("folding")), changes.other_base
        if own and tokenizer is not None:
            write_tokenizer(tokenizer, tmp)
        merged = replace(base, model=tmp, revision=None)
        if target.quantized is not None:
            quantize(merged, target.quantized)
        gap = from_original = None
        if wanted.certificate:
            merged = replace(merged, storage=target.quantized or "fp32", dtype="fp32")
            after: list[Callable[[], PreTrainedModel]] = [merged.load]
            if target.trained_on and not target.in_files:
                after.append(partial(adapted, base, adapters, "fp32"))
            before = partial(adapted, base, adapters, target.stored)
            gap, *rest = compare(before, after, texts, tmp, bar("comparing"))
            from_original = rest[0].distance if rest else None
        names = tuple(map(str, adapters))
        result = Merged(
            gap, folded, target, *rounding, base.name, names, str(out), others, from_original
        )
        write_json(tmp / CERTIFICATE, result.as_json())
    return result


def planned(base: Base, adapters: Sequence[Saved], into: Into) -> Plan:
    """The plan, if what it gives can be saved."""
    found = plan(base, adapters, round_trip=into.round_trip)
    if into.quantized is not None:
        check_saved(found.model, into.quantized)
    return found


def adapted(base: Base, adapters: Sequence[Saved], storage: str) -> PreTrainedModel:
    """The base in a storage, computed in fp32, with the adapters."""
    base = replace(base.stored(storage), dtype="fp32")
    model, weights = base.load(), base.weights()
    for i, saved in enumerate(adapters):
        name, other = f"adapter{i}", base.allow_other_base
        load(model, saved, name, allow_other_base=other, base=weights)
    return model


def quantize(plain: Base, quantization: str) -> None:
    """Replace the weights of a plain model by quantized ones, one tensor at a time.

    Args:
        plain: The saved model, by its directory.
        quantization: nf4 or int8.
    """
    directory = plain.source.path
    storage = Storage(torch.bfloat16, quantization)
    model = load_model(plain.source, storage)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    with loading(f"the model quantized to {quantization}"):
        model.save_pretrained(directory)


@contextmanager
def bars(console: Console | None) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """A function that makes the progress bar of a stage; bars are shown on terminals only."""
    from rich.progress import Progress

    with Progress(
        console=console, disable=console is None or not console.is_terminal, transient=True
    ) as bars:

        def bar(stage: str) -> Callable[[int, int], None]:
            task = bars.add_task(stage, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar
