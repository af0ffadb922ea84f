"""Exports a base model with adapters for another engine: truncates the adapters to a LoRA rank if
requested, writes the files, verifies them in the engine and writes export.json. The directory
appears only when it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from rich.console import Console
from torch import Tensor

from lorafold.errors import LorafoldError, NoTokenizer, join_problems
from lorafold.exporting.engines import ENGINES, run_engine
from lorafold.exporting.plain_lora import Cut, cut_to, sufficient_rank_note
from lorafold.exporting.proof import Proof, ReferenceAnswers, answers_on, compare, mean_distance
from lorafold.exporting.servers import ToPeft, ToSglang, ToVllm
from lorafold.exporting.target import ORIGINAL, ExportedFiles, Progress, Subject, Target, show_line
from lorafold.exporting.to_gguf import ToGguf, ToGgufModel, ToLlamaCpp
from lorafold.exporting.to_mlx import ToMlx
from lorafold.exporting.to_ollama import ToOllama
from lorafold.files.atomic import atomic_directory, check_out, write_json
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.paths import check_not_replaced
from lorafold.files.templates import render_text
from lorafold.files.terminal import progress_bars
from lorafold.merging.merge_target import ALIASES, Distance, MergeTarget, choose_merge_target
from lorafold.models.loading import prequantized_storage
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base
from lorafold.resolve.base import check_language_model

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        ToPeft(), ToGguf(), ToLlamaCpp(), ToGgufModel(), ToOllama(), ToVllm(), ToSglang(), ToMlx()
    )
}


def target_of(name: str) -> Target:
    if not isinstance(name, str) or name not in TARGETS:
        raise LorafoldError(f"--to: found {name!r}, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


REPORT_FILE, SCRATCH, PROOF_SCRATCH = "export.json", "scratch", "proving"
MAX_LOST = 0.01  # share of the adapters' effect that a proof may lose
MAX_BASE_KL = 1e-3  # nats, without adapters; above that, the engine computes another model
FEW_PROMPTS = 4  # prompts for figures that are only reported
ADVICE = (
    ", because engines support no other heads; merge it in Python with lf.load and"
    " adapter.merge(), or load the adapter with PEFT"
)


@dataclass(frozen=True)
class ExportOptions:
    to: str
    tensors: str | None = None
    as_lora: int | None = None
    prove: bool = True
    prompts: str | Path | None = None
    engine_python: str | None = None
    engine_url: str | None = None
    overwrite: bool = False
    into: str | None = None


@dataclass(frozen=True)
class Exported(ShownInNotebooks):
    """An export, as in `export.json`.

    Attributes:
        written: The files, and commands that use them.
        cut: The truncation to a LoRA rank; None if the adapters were exported exactly.
        proof: The comparison with the engine's outputs; None if `unproved` has a reason.
        unproved: The reason why the export was not verified in an engine, or "".
        beside: Further comparisons and notes, by name.
        into: The weights that the adapters are merged into or used with.
        away: The distance of these files from the trained model.
        from_original: The distance of the adapters on the original weights from the trained model.
    """

    to: str
    tensors: str | None
    model: str
    adapters: tuple[str, ...]
    out: str
    written: ExportedFiles
    cut: Cut | None
    proof: Proof | None
    unproved: str
    beside: Mapping[str, Proof | str]
    into: MergeTarget = ORIGINAL
    away: Distance | None = None
    from_original: Distance | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "to": self.to,
            "tensors": self.tensors,
            "model": self.model,
            "adapters": list(self.adapters),
            "out": self.out,
            "files": list(self.written.files),
            "launch": list(self.launch),
            "notes": list(self.written.notes),
            "as_lora": self.cut and asdict(self.cut),
            "proof": self.proof and self.proof.as_json(),
            "unproved": self.unproved,
            "trained_on": self.into.base and self.into.base.as_json(),
            "into": self.into.target,
            "from_trained": self.away and asdict(self.away),
            "from_original": self.from_original and asdict(self.from_original),
            "beside": {
                name: figures if isinstance(figures, str) else figures.as_json()
                for name, figures in self.beside.items()
            },
        }

    @property
    def launch(self) -> tuple[str, ...]:
        return tuple(show_line(line, self.out) for line in self.written.launch)

    def summary(self) -> str:
        merged = TARGETS[self.to].merged
        return render_text("exporting/exported.jinja", exported=self, merged=merged)


def export(
    base: Base,
    adapters: Sequence[SavedAdapter],
    out: Path,
    options: ExportOptions,
    console: Console | None = None,
) -> Exported:
    target = target_of(options.to)
    tensors, engine = _tensor_type(target, options.tensors), _engine(target, options)
    if (rank := options.as_lora) is not None and (type(rank) is not int or rank < 1):
        raise LorafoldError(f"as_lora: found {rank!r}, expected a positive integer")
    into = _merge_target(base, adapters, target, options.into)
    base = base.with_files_for(adapters)
    check_out(out, options.overwrite)
    check_not_replaced(out, [base.source.path, *(saved.path for saved in adapters)])
    check_language_model(base, adapters, ADVICE)
    unproved = _reason_unproved(target, options)
    with atomic_directory(out, options.overwrite) as tmp, progress_bars(console) as bar:
        subject, cut, reference = Subject(base, tuple(adapters), tensors, into=into), None, None
        quantized = into.trained_on is not None and not into.prequantized
        others = None
        beside: dict[str, Proof | str] = {**_base_name_notes(base, adapters)}
        if options.as_lora is None:
            _check_representable(target, subject, options, bar("trying ranks"))
        if not _has_tokenizer(subject):
            beside["the base"] = "no tokenizer, which engines need for text prompts"
            if not unproved:
                raise LorafoldError(
                    f"{subject.base.source.name}: found no tokenizer, which the proof's prompts"
                    " need; add its files next to config.json, or use --no-proof"
                )
        elif options.prove and quantized:  # the other weights, for comparison
            storage = "fp32" if into.target == "trained" else into.training_storage
            others = answers_on(subject, storage, options.prompts)
        if not unproved:
            reference = ReferenceAnswers.of(subject, options.prompts, bar("answering"))
        if options.as_lora is not None:
            subject, cut = cut_to(subject, options.as_lora, tmp / SCRATCH, reference)
            _check_representable(target, subject, options, bar("trying ranks"))
            reference = reference and ReferenceAnswers.of(
                subject, options.prompts, bar("answering")
            )
        written, verified, logprobs = target.write(subject, tmp, bar("writing")), None, None
        if reference is not None and engine is not None:
            for_proof = target.proof_job(subject, tmp / PROOF_SCRATCH, bar("preparing the proof"))
            job = {**written.job, **for_proof, "url": options.engine_url}
            verified, logprobs = _prove(reference, job, tmp, engine, options)
            _check_proof(verified, target, tensors)
            if adapters and not verified.distance:
                beside["the adapters"] = "no effect on these prompts"
            few = reference.first(FEW_PROMPTS)
            for name, over in target.further_jobs(subject).items():
                beside[name] = _prove(few, {**job, **over}, tmp, engine, options)[0]
        elif options.prove and target.engine is None:
            unproved = target.read_back(subject, tmp) or unproved
        for scratch in (SCRATCH, PROOF_SCRATCH):
            rmtree(tmp / scratch, ignore_errors=True)
        names = tuple(map(str, adapters))
        answers = None if reference is None else reference.answers.adapted
        if answers is None and others is not None:
            answers = answers_on(subject, subject.training_storage, options.prompts)
        away, from_original = None, None
        if answers is not None:
            pair = [answers, answers if others is None else others]
            trained, original = pair if into.target == "trained" else reversed(pair)
            away = mean_distance(trained, answers if logprobs is None else logprobs)
            if others is not None:
                from_original = mean_distance(trained, original)
        result = Exported(
            options.to, tensors, base.name, names, str(out), written, cut, verified, unproved,
            beside, into, away, from_original,
        )  # fmt: skip
        write_json(tmp / REPORT_FILE, result.as_json())
    return result


def _has_tokenizer(subject: Subject) -> bool:
    try:
        return subject.tokenizer is not None
    except NoTokenizer:
        return False


def _base_name_notes(base: Base, adapters: Sequence[SavedAdapter]) -> dict[str, str]:
    notes = {str(saved): saved.own_base.hint(base.name).removeprefix("; ") for saved in adapters}
    names = {str(saved): Path(saved.own_base.name).name for saved in adapters}
    return {saved: n for saved, n in notes.items() if n and names[saved] != Path(base.name).name}


def _check_representable(
    target: Target, subject: Subject, options: ExportOptions, progress: Progress
) -> None:
    """Raises unless the target supports the subject; the error may suggest a LoRA rank."""
    try:
        problems = target.problems(subject)
    except LorafoldError as error:
        problems = [str(error)]
    if problems:
        dense = not target.merged and subject.update.dense and not subject.update.other
        enough = sufficient_rank_note(subject, options.prompts, progress) if dense else ""
        raise LorafoldError(f"{options.to}: {join_problems(problems)}{enough}")


def _merge_target(
    base: Base, adapters: Sequence[SavedAdapter], target: Target, into: str | None
) -> MergeTarget:
    in_files = prequantized_storage(base.source)
    expected = ("trained", "original", *ALIASES) if target.merged else ("original",)
    if into is not None and into not in expected:
        raise LorafoldError(
            f"--into: found {into} for {target.name}, expected {' or '.join(expected[:2])}"
        )
    if not target.merged and in_files is None:
        into = "original"
    return choose_merge_target(into, adapters, base.storage, in_files)


def _prove(
    of: ReferenceAnswers,
    needs: Mapping[str, Any],
    directory: Path,
    engine: str,
    options: ExportOptions,
) -> tuple[Proof, Tensor]:
    """The comparison, and the engine's log-probabilities (prompts, vocabulary)."""
    answers = run_engine(engine, of.job(needs, directory), options.engine_python)
    return compare(of.answers, answers, of.margin, of.exchanged_experts), answers.adapted


def _tensor_type(target: Target, tensors: str | None) -> str | None:
    if tensors is not None and tensors not in target.tensors:
        expected = ", ".join(target.tensors) or "none, because the target has a single type"
        raise LorafoldError(f"--tensors: found {tensors!r} for {target.name}, expected {expected}")
    return tensors or next(iter(target.tensors), None)


def _engine(target: Target, options: ExportOptions) -> str | None:
    if options.engine_url is None:
        return target.engine
    if options.engine_python is not None:
        raise LorafoldError("--engine-url: can't be combined with --engine-python")
    if target.server is None:
        raise LorafoldError(
            f"--engine-url: found {options.engine_url} for {target.name}, but only --to vllm"
            " supports a running server"
        )
    return target.server


def _reason_unproved(target: Target, options: ExportOptions) -> str:
    if not options.prove:
        return "--no-proof was given"
    if target.engine is None:
        return f"lorafold runs no engine for {target.name}"
    engine = ENGINES[target.engine]
    if options.engine_python is None and options.engine_url is None and not engine.is_installed:
        return f"{engine.title} is not installed here ({engine.install})"
    return ""


def _check_proof(proof: Proof, target: Target, tensors: str | None) -> None:
    allowed = target.tolerance.get(tensors or "", MAX_LOST)
    start = f"{proof.engine} {proof.version} does not reproduce lorafold's outputs"
    if proof.unused:
        raise LorafoldError(f"{start}: it did not load as written: {join_problems(proof.unused)}")
    if proof.distance and proof.changed == 0:
        raise LorafoldError(f"{start}: the adapter has no effect in the engine")
    if not proof.distance and allowed == MAX_LOST and proof.kl > MAX_BASE_KL:
        raise LorafoldError(
            f"{start}: KL {proof.kl:.1e} nats, expected at most {MAX_BASE_KL}; nothing was written"
        )
    lost = proof.share is not None and allowed is not None and proof.share > allowed
    if lost and proof.alone is not None and proof.alone > MAX_BASE_KL:
        raise LorafoldError(
            f"{start}: KL {proof.alone:.1e} nats even without adapters, expected at most"
            f" {MAX_BASE_KL}, so the engine computes the base differently; nothing was written"
        )
    if lost and not proof.rounding:
        raise LorafoldError(
            f"{start}: KL {proof.kl:.1e} nats, {proof.share:.1%} of the adapters' effect,"
            f" expected at most {allowed:.0%}; nothing was written"
        )
