"""The export of a base with adapters for another engine, verified there.

    cut -> check -> write -> prove -> export.json       whole or not at all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from rich.console import Console
from torch import Tensor

from lorafold.errors import LorafoldError, NoTokenizer, as_one
from lorafold.exporting.engines import ENGINES, ask
from lorafold.exporting.plain_lora import Cut, cut_to, rank_enough
from lorafold.exporting.proof import Proof, Reference, answers_over, distance, proof
from lorafold.exporting.servers import ToPeft, ToSglang, ToVllm
from lorafold.exporting.target import ORIGINAL, Progress, Subject, Target, Written, placed
from lorafold.exporting.to_gguf import ToGguf, ToGgufModel, ToLlamaCpp
from lorafold.exporting.to_mlx import ToMlx
from lorafold.exporting.to_ollama import ToOllama
from lorafold.files.atomic import atomic_directory, check_out, write_json
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.paths import check_kept
from lorafold.merging.merge_target import ALIAS, Distance, Into, choose_into
from lorafold.merging.run import bars
from lorafold.models.loading import stored_in_files
from lorafold.peft.saved import Saved
from lorafold.resolve import Base
from lorafold.resolve.base import check_language_model

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        ToPeft(), ToGguf(), ToLlamaCpp(), ToGgufModel(), ToOllama(), ToVllm(), ToSglang(), ToMlx()
    )
}


def target_of(name: str) -> Target:
    """The target of this name."""
    if not isinstance(name, str) or name not in TARGETS:
        raise LorafoldError(f"--to: found {name!r}, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


EXPORT, SCRATCH, PROVING = "export.json", "scratch", "proving"
SHARE = 0.01  # of what the adapters change, that a proof may lose
ALONE = 1e-3  # nats, of a base without adapters; above that it is another model there
FEWER = 4  # prompts for figures that refuse nothing
INSTEAD = (
    ": engines take no heads of another kind; lf.load and adapter.merge() in Python make it a plain"
    " transformers model, and PEFT reads the adapter as it is"
)


@dataclass(frozen=True)
class ExportOptions:
    """The choices of `lf.export` besides the model and the adapters."""

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
    """What was written, as `export.json` has it. `proof` is None where `unproved` says why;
    `beside` has figures that are told alone, or why there are none, by what they are of. `into` are
    the weights that the files are for; `away` and `from_original` are how far from the model that
    was trained these files are, and the adapters over the original weights.
    """

    to: str
    tensors: str | None
    model: str
    adapters: tuple[str, ...]
    out: str
    written: Written
    cut: Cut | None
    proof: Proof | None
    unproved: str
    beside: Mapping[str, Proof | str]
    into: Into = ORIGINAL
    away: Distance | None = None
    from_original: Distance | None = None

    def as_json(self) -> dict[str, Any]:
        """The content of `export.json`."""
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
                name: found if isinstance(found, str) else found.as_json()
                for name, found in self.beside.items()
            },
        }

    @property
    def launch(self) -> tuple[str, ...]:
        """How the files are used, in lines."""
        return tuple(placed(line, self.out) for line in self.written.launch)

    def summary(self) -> str:
        """A few lines to read."""
        lines = [f"exported: {self.out} for {self.to} ({', '.join(self.written.files)})"]
        lines += [f"  {note}" for note in self.written.notes]
        if self.adapters:
            alone = "the adapters over the base that the engine loads"
            here = "this file" if TARGETS[self.to].merged else alone
            far = self.into.compared(self.model, here, self.away, self.from_original)
            lines.append(f"  {far}")
        if self.cut is not None:
            lines.append(f"  {self.cut}")
        proved = f"proved in {self.proof}" if self.proof else f"not proved: {self.unproved}"
        lines.append(f"  {proved}")
        lines += [f"  {name}: {found}" for name, found in self.beside.items()]
        return "\n".join([*lines, "use it so:", *(f"  {line}" for line in self.launch)])


def export(
    base: Base,
    adapters: Sequence[Saved],
    out: Path,
    wanted: ExportOptions,
    console: Console | None = None,
) -> Exported:
    """Write adapters over a base, or the base alone, for another engine, as `lf.export`, whose
    arguments these are.
    """
    target = target_of(wanted.to)
    tensors, engine = _tensors(target, wanted.tensors), _engine(target, wanted)
    if (rank := wanted.as_lora) is not None and (type(rank) is not int or rank < 1):
        raise LorafoldError(f"as_lora: found {rank!r}, expected a whole number from 1")
    into, base = _into(base, adapters, target, wanted.into), base.with_files_for(adapters)
    check_out(out, wanted.overwrite)
    check_kept(out, [base.source.path, *(one.path for one in adapters)])
    check_language_model(base, adapters, INSTEAD)
    unproved = _unproved(target, wanted)
    with atomic_directory(out, wanted.overwrite) as tmp, bars(console) as bar:
        subject, cut, reference = Subject(base, tuple(adapters), tensors, into=into), None, None
        quantized = into.trained_on is not None and not into.in_files
        other: Tensor | None = None
        beside: dict[str, Proof | str] = {**_named_otherwise(base, adapters)}
        if wanted.as_lora is None:
            _check_said(target, subject, wanted, bar("trying ranks"))
        if not _has_tokenizer(subject):
            beside["the base"] = "it has no tokenizer, without which engines take no texts"
            if not unproved:
                raise LorafoldError(
                    f"{subject.base.source.name}: found no tokenizer, which the proof's prompts"
                    " need; expected its files beside config.json, or --no-proof"
                )
        elif wanted.prove and quantized:  # the weights that the files are not for
            storage = "fp32" if into.target == "trained" else into.stored
            other = answers_over(subject, storage, wanted.prompts)
        if not unproved:
            reference = Reference.of(subject, wanted.prompts, bar("answering"))
        if wanted.as_lora is not None:
            subject, cut = cut_to(subject, wanted.as_lora, tmp / SCRATCH, reference)
            _check_said(target, subject, wanted, bar("trying ranks"))
            reference = reference and Reference.of(subject, wanted.prompts, bar("answering"))
        written, found, theirs = target.write(subject, tmp, bar("writing")), None, None
        if reference is not None and engine is not None:
            made = target.proving(subject, tmp / PROVING, bar("preparing the proof"))
            job = {**written.job, **made, "url": wanted.engine_url}
            found, theirs = _proof(reference, job, tmp, engine, wanted)
            _check(found, target, tensors)
            if adapters and not found.distance:
                beside["the adapters"] = "they change nothing on these prompts"
            few = reference.first(FEWER)
            for name, over in target.beside(subject).items():
                beside[name] = _proof(few, {**job, **over}, tmp, engine, wanted)[0]
        elif wanted.prove and target.engine is None:
            unproved = target.read_back(subject, tmp) or unproved
        for scratch in (SCRATCH, PROVING):
            rmtree(tmp / scratch, ignore_errors=True)
        names = tuple(map(str, adapters))
        own = None if reference is None else reference.answers.adapted
        if own is None and other is not None:
            own = answers_over(subject, subject.stored, wanted.prompts)
        away, from_original = None, None
        if own is not None:
            trained, original = (own, other) if into.target == "trained" else (other, own)
            away = distance(own if trained is None else trained, own if theirs is None else theirs)
            if trained is not None and original is not None:
                from_original = distance(trained, original)
        result = Exported(
            wanted.to, tensors, base.name, names, str(out), written, cut, found, unproved, beside,
            into, away, from_original,
        )  # fmt: skip
        write_json(tmp / EXPORT, result.as_json())
    return result


def _has_tokenizer(subject: Subject) -> bool:
    """Whether the adapters or the base have one."""
    try:
        return subject.tokenizer is not None
    except NoTokenizer:
        return False


def _named_otherwise(base: Base, adapters: Sequence[Saved]) -> dict[str, str]:
    """Notes on adapters that know their base by its name alone, and have another name for it."""
    notes = {str(one): one.own_base.hint(base.name).removeprefix("; ") for one in adapters}
    names = {str(one): Path(one.own_base.name).name for one in adapters}
    return {one: n for one, n in notes.items() if n and names[one] != Path(base.name).name}


def _check_said(
    target: Target, subject: Subject, wanted: ExportOptions, progress: Progress
) -> None:
    """Raise LorafoldError for what the target can't say, with the rank of a LoRA that is enough."""
    if problems := target.problems(subject):
        dense = not target.merged and subject.update.dense and not subject.update.beside
        enough = rank_enough(subject, wanted.prompts, progress) if dense else ""
        raise LorafoldError(f"{wanted.to}: {as_one(problems)}{enough}")


def _into(base: Base, adapters: Sequence[Saved], target: Target, asked: str | None) -> Into:
    """The weights that the files are for. An adapter alone is for the base that its engine loads,
    which has the original weights.
    """
    in_files = stored_in_files(base.source)
    expected = ("trained", "original", *ALIAS) if target.merged else ("original",)
    if asked is not None and asked not in expected:
        raise LorafoldError(
            f"--into: found {asked} for {target.name}, expected {' or '.join(expected[:2])}"
        )
    if not target.merged and in_files is None:
        asked = "original"
    return choose_into(asked, adapters, base.storage, in_files)


def _proof(
    of: Reference, needs: Mapping[str, Any], directory: Path, engine: str, wanted: ExportOptions
) -> tuple[Proof, Tensor]:
    """The figures, and the engine's log-probabilities (prompts, vocabulary)."""
    answers = ask(engine, of.job(needs, directory), wanted.engine_python)
    return proof(of.answers, answers, of.margin, of.exchanged_experts), answers.adapted


def _tensors(target: Target, asked: str | None) -> str | None:
    """The type of the tensors."""
    if asked is not None and asked not in target.tensors:
        expected = ", ".join(target.tensors) or "none, because it has one form alone"
        raise LorafoldError(f"--tensors: found {asked!r} for {target.name}, expected {expected}")
    return asked or next(iter(target.tensors), None)


def _engine(target: Target, wanted: ExportOptions) -> str | None:
    """What proves."""
    if wanted.engine_url is None:
        return target.engine
    if wanted.engine_python is not None:
        raise LorafoldError("--engine-url: found --engine-python too, expected one of them")
    if target.server is None:
        raise LorafoldError(
            f"--engine-url: found {wanted.engine_url} for {target.name}, expected --to vllm, whose"
            " servers alone are asked"
        )
    return target.server


def _unproved(target: Target, wanted: ExportOptions) -> str:
    """Why nothing is proved, or nothing."""
    if not wanted.prove:
        return "--no-proof was given"
    if target.engine is None:
        return f"no engine here reads what {target.name} takes"
    engine = ENGINES[target.engine]
    if wanted.engine_python is None and wanted.engine_url is None and not engine.here:
        return f"{engine.title} is not installed here ({engine.install})"
    return ""


def _check(found: Proof, target: Target, tensors: str | None) -> None:
    """Raise LorafoldError if the engine computes something else than what was exported."""
    allowed = target.tolerance.get(tensors or "", SHARE)
    said = f"{found.engine} {found.version} does not compute what lorafold does"
    if found.unused:
        raise LorafoldError(f"{said}: it left out {as_one(found.unused)}")
    if found.distance and found.changed == 0:
        raise LorafoldError(f"{said}: the adapter changes nothing there")
    if not found.distance and allowed == SHARE and found.kl > ALONE:
        raise LorafoldError(
            f"{said}: KL {found.kl:.1e} nats, expected at most {ALONE}; nothing was written"
        )
    lost = found.share is not None and allowed is not None and found.share > allowed
    if lost and found.alone is not None and found.alone > ALONE:
        raise LorafoldError(
            f"{said}: without adapters KL {found.alone:.1e} nats, expected at most {ALONE}: it"
            " reads the base as another model; nothing was written"
        )
    if lost and not found.rounding:
        raise LorafoldError(
            f"{said}: KL {found.kl:.1e} nats, {found.share:.1%} of what the adapters change,"
            f" expected at most {allowed:.0%}; nothing was written"
        )
