"""`lf.merge`: from a base and adapters to a plain Hugging Face directory with a certificate.

    plan -> fold -> certify      folding keeps one tensor in memory, the certificate one model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafold.adapter import load
from lorafold.data.probes import probe_ids
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, write_json
from lorafold.fold.rounding import Rounding
from lorafold.machine.devices import choose_device
from lorafold.merging.certificate import Gap, compare
from lorafold.merging.execute import Folded, execute
from lorafold.merging.into import Into, check_saved, choose_into
from lorafold.merging.plan import Plan, plan
from lorafold.merging.shards import write_shards
from lorafold.models.classifier import check_language_model
from lorafold.models.load_errors import loading
from lorafold.models.loading import load_model
from lorafold.models.sources import ModelSource, resolve_model
from lorafold.models.storage import Storage, stored_in_files, weights_of
from lorafold.models.tokenizer import has_tokenizer, tokenizer_of, write_tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

CERTIFICATE = "merge.json"
INSTEAD = "; merge another one in Python, with adapter.merge() and model.save_pretrained(out)"


@dataclass(frozen=True)
class Merged:
    """A merged model, as `merge.json` describes it. `gap` is None without the certificate."""

    gap: Gap | None
    folded: Folded
    into: Into
    rounding: Rounding
    seed: int
    model: str
    adapters: tuple[str, ...]
    out: str

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
        }
        into = {"into": self.into.target, "trained_on": self.into.trained_on}
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
            f" {sums.noise:.2%} of its norm"
        )
        if self.folded.untied:
            lines.append(
                "  embedding and head no longer share their weight:"
                f" {', '.join(self.folded.untied)} was added"
            )
        if self.folded.biases:
            n = len(self.folded.biases)
            added = "1 bias was" if n == 1 else f"{n} biases were"
            lines.append(f"  {added} added and enabled in config.json")
        if self.folded.vocabulary:
            lines.append(f"  the vocabulary grew to {self.folded.vocabulary:,} tokens")
        if self.gap:
            lines.append(
                f"  compared with the adapted model, {self.gap.positions:,} positions in fp32: KL"
                f" {self.gap.kl:.2e} nats a token, same token at {self.gap.argmax_agreement:.2%} of"
                f" positions, logits at most {self.gap.max_logit_gap:.3g} apart"
            )
        return "\n".join(lines)


def merge(
    model: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    into: str | None = None,
    storage: str = "auto",
    rounding: Rounding = "auto",
    seed: int = 0,
    certificate: bool = True,
    probe: str | Path | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> Merged:
    """Fold saved adapters into their base and write a plain Hugging Face model, with a certificate
    of how far it is from base plus adapters. The directory appears whole or not at all.

    Args:
        model: The base, as `lf.load_model` takes it.
        adapters: One saved adapter or several, folded in this order.
        out: The directory of the merged model.
        into: original (the base's weights before quantization), dequantized (the weights that the
            adapter was trained on), nf4 or int8 (quantized again). None is dequantized if the
            adapter was trained on a quantized base, else original.
        storage: How the base stored its weights in training; auto takes it from the records.
        rounding: nearest, stochastic, or auto: stochastic for the tensors whose update rounding to
            nearest would lose.
        seed: The seed of stochastic rounding.
        certificate: Compare the merged model with the adapted one, loaded one after the other.
        probe: A file of rows to compare on; None takes built-in texts.
        allow_other_base: Accept adapters whose fingerprint names another base.
        overwrite: Replace `out` if it exists.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        device: Where the certificate is computed; None takes the fastest that is available.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError, with nothing written, for a model, adapter, probe or `out` that can't be
    used, and NotMergeable with every reason for which the adapters can't be folded.
    """
    adapters = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    if not adapters:
        raise LorafoldError("adapters: found no adapter, expected at least one to merge")
    where = choose_device(device)
    with atomic_directory(out, overwrite) as tmp, _bars(console) as bar:
        source = resolve_model(model, revision)
        target = choose_into(into, adapters, storage, stored_in_files(source))
        if console is not None and target.trained_on is not None:
            console.print(f"merging into {target}", highlight=False)
        check_language_model(source, adapters, INSTEAD)
        parts = _Parts(source, adapters, target, allow_other_base, trust_remote_code)
        own = any(map(has_tokenizer, adapters))
        tokenizer = (
            tokenizer_of(source, adapters, trust_remote_code) if own or certificate else None
        )
        texts = probe_ids(tokenizer, probe) if tokenizer is not None and certificate else []
        folded = execute(
            parts.planned(), partial(write_shards, tmp), rounding, seed, bar("folding")
        )
        if own and tokenizer is not None:
            write_tokenizer(tokenizer, tmp)
        if target.quantized is not None:
            quantize(tmp, target.quantized, trust_remote_code)
        adapted, merged = partial(parts.adapted, where), partial(parts.merged, tmp, where)
        gap = compare(adapted, merged, texts, tmp, bar("comparing")) if certificate else None
        result = Merged(
            gap, folded, target, rounding, seed, source.name, tuple(map(str, adapters)), str(out)
        )
        write_json(tmp / CERTIFICATE, result.as_json())
    return result


@dataclass(frozen=True)
class _Parts:
    """What is merged, and into what."""

    source: ModelSource
    adapters: list[str | Path]
    into: Into
    allow_other_base: bool
    trust_remote_code: bool

    def planned(self) -> Plan:
        found = plan(
            self.source,
            self.adapters,
            round_trip=self.into.round_trip,
            allow_other_base=self.allow_other_base,
            trust_remote_code=self.trust_remote_code,
        )
        if self.into.quantized is not None:
            check_saved(found.model, self.into.quantized)
        return found

    def adapted(self, device: torch.device) -> PreTrainedModel:
        """The base as it was trained on, with the adapters, on the device."""
        trained = Storage(torch.float32, self.into.trained_on)
        base = load_model(
            self.source, trained, device, trust_remote_code=self.trust_remote_code
        )
        weights = weights_of(self.source, trained)
        for i, path in enumerate(self.adapters):
            name = f"adapter{i}"
            load(base, path, name, allow_other_base=self.allow_other_base, base=weights)
        return base

    def merged(self, directory: Path, device: torch.device) -> PreTrainedModel:
        """The merged model in the directory, on the device."""
        storage = Storage(torch.float32, self.into.quantized)
        return load_model(
            directory, storage, device, trust_remote_code=self.trust_remote_code
        )


def quantize(directory: Path, quantization: str, trust_remote_code: bool) -> None:
    """Replace the weights of a plain model by quantized ones, one tensor at a time.

    Args:
        directory: The saved model.
        quantization: nf4 or int8.
        trust_remote_code: Run Python code that comes with the model.
    """
    model = load_model(
        directory, Storage(torch.bfloat16, quantization), trust_remote_code=trust_remote_code
    )
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    with loading(f"the model quantized to {quantization}"):
        model.save_pretrained(directory)


@contextmanager
def _bars(console: Console | None) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """A function that makes the progress bar of a stage; bars are shown on terminals only."""
    from rich.progress import Progress

    with Progress(
        console=console, disable=console is None or not console.is_terminal, transient=True
    ) as bars:

        def bar(stage: str) -> Callable[[int, int], None]:
            task = bars.add_task(stage, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar
