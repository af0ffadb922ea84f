"""From a base with adapters to the files of another engine, proved there.

    cut -> check -> write -> prove -> export.json       whole or not at all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, NoTokenizer, as_one
from lorafold.exporting.cutting import Cut, cut_to, rank_enough
from lorafold.exporting.engines import ENGINES, ask
from lorafold.exporting.launching import placed
from lorafold.exporting.ours import Ours
from lorafold.exporting.proof import Proof, proof
from lorafold.exporting.table import target_of
from lorafold.exporting.target import Progress, Subject, Target, Written
from lorafold.files.apart import check_kept
from lorafold.files.atomic import atomic_directory, check_out, write_json
from lorafold.files.shown import Shown
from lorafold.merging.run import bars
from lorafold.opening import Base
from lorafold.opening.kinds import check_language_model
from lorafold.peft.saved import Saved

if TYPE_CHECKING:
    from rich.console import Console

EXPORT, SCRATCH, PROVING = "export.json", "scratch", "proving"
SHARE = 0.01  # of what the adapters change, that a proof may lose
ALONE = 1e-3  # nats, of a base without adapters; above that it is another model there
FEWER = 4  # prompts for figures that refuse nothing
INSTEAD = (
    ": engines take no heads of another kind; lf.load and adapter.merge() in Python make it a plain"
    " transformers model, and PEFT reads the adapter as it is"
)


@dataclass(frozen=True)
class Wanted:
    """The choices of `lf.export` besides the model and the adapters."""

    to: str
    tensors: str | None = None
    as_lora: int | None = None
    prove: bool = True
    prompts: str | Path | None = None
    engine_python: str | None = None
    engine_url: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Exported(Shown):
    """What was written, as `export.json` has it. `proof` is None where `unproved` says why;
    `beside` has figures that are told alone, or why there are none, by what they are of.
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
            "as_lora": None if self.cut is None else self.cut.as_json(),
            "proof": None if self.proof is None else self.proof.as_json(),
            "unproved": self.unproved,
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
        if self.cut is not None:
            lines.append(f"  {self.cut}")
        if self.proof is not None:
            lines.append(f"  proved in {self.proof}")
        else:
            lines.append(f"  not proved: {self.unproved}")
        lines += [f"  {name}: {found}" for name, found in self.beside.items()]
        return "\n".join([*lines, "use it so:", *(f"  {line}" for line in self.launch)])


def export(
    base: Base,
    adapters: Sequence[Saved],
    out: Path,
    wanted: Wanted,
    console: Console | None = None,
) -> Exported:
    """Write adapters over a base, or the base alone, for another engine, as `lf.export`, whose
    arguments these are.
    """
    target = target_of(wanted.to)
    tensors, engine = _tensors(target, wanted.tensors), _engine(target, wanted)
    if (rank := wanted.as_lora) is not None and (type(rank) is not int or rank < 1):
        raise LorafoldError(f"as_lora: found {rank!r}, expected a whole number from 1")
    check_out(out, wanted.overwrite)
    check_kept(out, [base.source.path, *(one.path for one in adapters)])
    check_language_model(base, adapters, INSTEAD)
    unproved = _unproved(target, wanted)
    with atomic_directory(out, wanted.overwrite) as tmp, bars(console) as bar:
        subject, cut, ours = Subject(base, tuple(adapters), tensors), None, None
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
        if not unproved:
            ours = Ours.of(subject, wanted.prompts, bar("answering"))
        if wanted.as_lora is not None:
            subject, cut = cut_to(subject, wanted.as_lora, tmp / SCRATCH, ours)
            _check_said(target, subject, wanted, bar("trying ranks"))
            ours = ours and Ours.of(subject, wanted.prompts, bar("answering"))
        written, found = target.write(subject, tmp, bar("writing")), None
        if ours is not None and engine is not None:
            made = target.proving(subject, tmp / PROVING, bar("preparing the proof"))
            job = {**written.job, **made, "url": wanted.engine_url}
            found = _proof(ours, job, tmp, engine, wanted)
            _check(found, target, tensors)
            if adapters and not found.distance:
                beside["the adapters"] = "they change nothing on these prompts"
            few = ours.first(FEWER)
            for name, other in target.beside(subject).items():
                beside[name] = _proof(few, {**job, **other}, tmp, engine, wanted)
        elif wanted.prove and target.engine is None:
            unproved = target.read_back(subject, tmp) or unproved
        for scratch in (SCRATCH, PROVING):
            rmtree(tmp / scratch, ignore_errors=True)
        names = tuple(map(str, adapters))
        result = Exported(
            wanted.to, tensors, base.name, names, str(out), written, cut, found, unproved, beside
        )
        write_json(tmp / EXPORT, result.as_json())
    return result


def _has_tokenizer(subject: Subject) -> bool:
    """Whether the adapters or the base have one."""
    try:
        return subject.tokenizer is not None
    except NoTokenizer:
        return False


def _named_otherwise(base: Base, adapters: Sequence[Saved]) -> dict[str, str]:
    """What adapters say that have nothing but a name to know their base by, and have another."""
    said = {str(one): one.own_base.hint(base.name).removeprefix("; ") for one in adapters}
    names = {str(one): Path(one.own_base.name).name for one in adapters}
    return {one: told for one, told in said.items() if told and names[one] != Path(base.name).name}


def _check_said(target: Target, subject: Subject, wanted: Wanted, progress: Progress) -> None:
    """Raise LorafoldError for what the target can't say, with the rank of a LoRA that is enough."""
    if problems := target.problems(subject):
        dense = not target.merged and subject.update.dense and not subject.update.beside
        enough = rank_enough(subject, wanted.prompts, progress) if dense else ""
        raise LorafoldError(f"{wanted.to}: {as_one(problems)}{enough}")


def _proof(
    ours: Ours, own: Mapping[str, Any], directory: Path, engine: str, wanted: Wanted
) -> Proof:
    theirs = ask(engine, ours.job(own, directory), wanted.engine_python)
    return proof(ours.answers, theirs, ours.margin, ours.exchanged)


def _tensors(target: Target, asked: str | None) -> str | None:
    """The type of the tensors. Raises LorafoldError for one that the target has not."""
    if asked is not None and asked not in target.tensors:
        expected = ", ".join(target.tensors) or "none, because it has one form alone"
        raise LorafoldError(f"--tensors: found {asked!r} for {target.name}, expected {expected}")
    return asked or next(iter(target.tensors), None)


def _engine(target: Target, wanted: Wanted) -> str | None:
    """What proves. Raises LorafoldError for a URL where no server is asked."""
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


def _unproved(target: Target, wanted: Wanted) -> str:
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
