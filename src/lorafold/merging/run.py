"""Merges adapters into their base, and writes a Hugging Face model with a merge report.

The report compares the merged model with base + adapters, in fp32 on probe texts:

    p = softmax(adapted(text)), q = softmax(merged(text)),     at every position of every text
    kl                  mean of sum_v p log(p / q)      (nats)
    max_logit_gap       max |adapted - merged|
    relative_logit_gap  |adapted - merged| / |adapted|  (Frobenius)
    argmax_agreement    fraction of positions with the same top-1 token

Only one model at a time is in memory; the logits of the first model are stored in a file.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.adapter import load_all
from lorafold.data.examples import probe_ids
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, check_out, write_json
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.paths import check_not_replaced
from lorafold.files.templates import render_text
from lorafold.files.terminal import Progress, print_lines, progress_bars
from lorafold.merging.merge_target import Distance, MergeTarget, check_savable, choose_merge_target
from lorafold.merging.merged_tensors import MergeResult, write_merged, write_shards
from lorafold.merging.plan import plan_merge
from lorafold.merging.rounding import Rounding
from lorafold.models.load_errors import loading
from lorafold.models.loading import load_model, prequantized_storage
from lorafold.models.quantizations import Storage
from lorafold.models.tokenizer import write_tokenizer
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base
from lorafold.resolve.base import check_language_model


@dataclass(frozen=True)
class Gap:
    """The difference between the logits of the merged model and of base + adapters.

    Attributes:
        kl: The mean KL divergence in nats per token.
        max_logit_gap: The largest absolute difference of two logits.
        relative_logit_gap: The norm of the difference relative to the norm of the logits.
        argmax_agreement: The fraction of positions with the same top-1 token.
        positions: The number of compared positions.
    """

    kl: float
    max_logit_gap: float
    relative_logit_gap: float
    argmax_agreement: float
    positions: int

    @property
    def distance(self) -> Distance:
        """KL and top-1 agreement."""
        return Distance(self.kl, self.argmax_agreement)


def compare_logits(
    load_adapted: Callable[[], PreTrainedModel],
    others: Sequence[Callable[[], PreTrainedModel]],
    texts: Sequence[tuple[int, ...]],
    scratch: Path,
    progress: Progress,
) -> list[Gap]:
    """The differences between a model's logits and each other model's; loads one at a time."""
    done, total = count(1), (1 + len(others)) * len(texts)

    def with_progress(logits: Iterator[Tensor]) -> Iterator[Tensor]:
        for text_logits in logits:
            yield text_logits
            progress(next(done), total)

    with tempfile.TemporaryFile(dir=scratch) as file:
        for logits in with_progress(_logits(load_adapted, texts)):
            file.write(logits.numpy().data)
        gaps = []
        for other in others:
            file.seek(0)
            gaps.append(_gap(file, with_progress(_logits(other, texts))))
        return gaps


def _gap(file: BinaryIO, others: Iterator[Tensor]) -> Gap:
    """The difference between logits in a file and other logits, (T, vocabulary) for each text."""
    kl = gap = squares = total = 0.0
    agreed = positions = 0
    for logits in others:
        data = bytearray(4 * logits.numel())
        file.readinto(data)  # type: ignore[attr-defined]
        before = torch.frombuffer(data, dtype=torch.float32).view(logits.shape)
        p, q = before.double().log_softmax(-1), logits.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        difference = before - logits
        gap = max(gap, difference.abs().max().item())
        squares += difference.double().square().sum().item()
        total += before.double().square().sum().item()
        agreed += int((before.argmax(-1) == logits.argmax(-1)).sum())
        positions += len(logits)
    return Gap(
        max(kl / positions, 0.0), gap, (squares / total) ** 0.5, agreed / positions, positions
    )


def _logits(
    build: Callable[[], PreTrainedModel], texts: Sequence[tuple[int, ...]]
) -> Iterator[Tensor]:
    """Yields the logits of each text, (T, vocabulary) in fp32 on the CPU."""
    model = build()
    for ids in texts:
        input_ids = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=input_ids, use_cache=False).logits[0].float().cpu()
        if not logits.isfinite().all():
            raise LorafoldError(
                "certificate: the model's logits on a probe text are not finite, so they can't be"
                " compared; check the weights of the model and its adapters"
            )
        yield logits
    del model
    gc.collect()


REPORT_FILE = "merge.json"
ADVICE = "; merge other models in Python with adapter.merge() and model.save_pretrained(out)"


@dataclass(frozen=True)
class MergeOptions:
    """The options of `lf.merge` besides the model and the adapters."""

    into: str | None = None
    rounding: Rounding = "auto"
    seed: int = 0
    certificate: bool = True
    probe: str | Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Merged(ShownInNotebooks):
    """A merged model, as in `merge.json`.

    Attributes:
        gap: The difference from base + adapters; None without the merge report.
        folded: Rounding statistics, and tensors that the merge added.
        into: The weights that the adapters were merged into.
        rounding: The requested rounding mode.
        other_base: A message for each adapter that was trained on another base.
        from_original: The distance between the adapters on the original and on the quantized
            weights; None if it was not measured.
    """

    gap: Gap | None
    folded: MergeResult
    into: MergeTarget
    rounding: Rounding
    seed: int
    model: str
    adapters: tuple[str, ...]
    out: str
    other_base: tuple[str, ...] = ()
    from_original: Distance | None = None

    @property
    def kl(self) -> float | None:
        """The merge report's KL divergence in nats per token; None without a report."""
        return None if self.gap is None else self.gap.kl

    def as_json(self) -> dict[str, Any]:
        """The content of `merge.json`; survival and noise are fractions of the update's norm."""
        gap, folded, into = self.gap, self.folded, self.into
        return {
            **(asdict(gap) if gap else dict.fromkeys(f.name for f in fields(Gap))),
            "update_survival": folded.stats.survival,
            "rounding_noise": folded.stats.noise,
            "rounded": folded.rounded,
            "untied": list(folded.untied),
            "biases": list(folded.biases),
            "vocabulary": folded.vocabulary,
            "into": into.target,
            "trained_on": into.trained_on,
            "computed_in": into.base and into.base.dtype,
            "recorded": list(into.recorded_storages),
            "from_original": self.from_original and asdict(self.from_original),
            "rounding": self.rounding,
            "seed": self.seed,
            "model": self.model,
            "adapters": list(self.adapters),
            "out": self.out,
            "other_base": list(self.other_base),
        }

    def summary(self) -> str:
        """The report as a few lines of text."""
        return render_text("merging/merged.jinja", merged=self)


def merge(
    base: Base,
    adapters: Sequence[SavedAdapter],
    out: Path,
    options: MergeOptions,
    console: Console | None = None,
) -> Merged:
    check_out(out, options.overwrite)
    storage, base = base.storage, base.with_files_for(adapters)
    source, _ = base.source, base.loaded_as  # fails early for a wrong name or device
    check_not_replaced(out, [source.path, *(one.path for one in adapters)])
    with atomic_directory(out, options.overwrite) as tmp, progress_bars(console) as bar:
        target = choose_merge_target(options.into, adapters, storage, prequantized_storage(source))
        if target.trained_on or target.requested_storage or target.unsupported_storage:
            print_lines(console, f"merging into {target}")
        check_language_model(base, adapters, ADVICE)
        has_tokenizer = any(one.own_tokenizer for one in adapters)
        tokenizer = base.tokenizer(adapters) if has_tokenizer or options.certificate else None
        compared = tokenizer if options.certificate else None
        texts = [] if compared is None else probe_ids(compared, options.probe)
        shards, rounding = partial(write_shards, tmp), (options.rounding, options.seed)
        plan = plan_merge(base, adapters, round_trip=target.round_trip)
        if target.quantized is not None:
            check_savable(plan.model, target.quantized)
        folded = write_merged(plan, shards, *rounding, bar("merging"))
        if has_tokenizer and tokenizer is not None:
            write_tokenizer(tokenizer, tmp)
        merged = replace(base, model=tmp, revision=None)
        if target.quantized is not None:
            quantize_in_place(merged, target.quantized)
        gap = from_original = None
        if options.certificate:
            merged = replace(merged, storage=target.quantized or "fp32", dtype="fp32")
            after = [merged.load]
            if target.trained_on and not target.prequantized:
                after.append(partial(load_adapted, base, adapters, "fp32"))
            before = partial(load_adapted, base, adapters, target.training_storage)
            gap, *rest = compare_logits(before, after, texts, tmp, bar("comparing"))
            from_original = rest[0].distance if rest else None
        names, others = tuple(map(str, adapters)), plan.other_base
        result = Merged(
            gap, folded, target, *rounding, base.name, names, str(out), others, from_original
        )
        write_json(tmp / REPORT_FILE, result.as_json())
    return result


def load_adapted(base: Base, adapters: Sequence[SavedAdapter], storage: str) -> PreTrainedModel:
    """Loads the base in a quantization or dtype, with the adapters, for computation in fp32."""
    base = replace(base.stored(storage), dtype="fp32")
    model, other = base.load(), base.allow_other_base
    load_all(model, adapters, "adapter", allow_other_base=other, base=base.weights())
    return model


def quantize_in_place(plain: Base, quantization: str) -> None:
    """Quantizes the files of a model, one tensor at a time."""
    directory = plain.source.path
    model = load_model(plain.source, Storage(torch.bfloat16, quantization))
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    with loading(f"the model quantized to {quantization}"):
        model.save_pretrained(directory)
