"""What a saved adapter says of what it was trained on: its base, and the adapters below it.

    "base_model_name_or_path": ...                in adapter_config.json: the base's name
    "base": {...}, "base_identity": ...           in lorafold.json: its fingerprint and identity
    "over": [{"adapter": "out/sft", "sha256": "5d1c..."}, ...]      and the adapters, lowest first

Directories that PEFT wrote have the name alone. An adapter that was trained over others is a change
of what they make of the base, so it is loaded over the same ones only. They are known by a digest
of the two files that say what they compute: neither a card, a record nor a tokenizer is part of it,
and PEFT's directories have one too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafold.core.attach import Origin
from lorafold.errors import LorafoldError, shortened
from lorafold.files.contents import Contents
from lorafold.files.model_card import OVER
from lorafold.files.record import BASE, RECORD, TRAINED_ON, named_as_now
from lorafold.models import fingerprint
from lorafold.models.fingerprint import Fingerprint
from lorafold.models.weights import Weights
from lorafold.peft.config import CONFIG, WEIGHTS, no_adapter

COMPUTED = (CONFIG, WEIGHTS)  # the files whose digest is an adapter's
SHOWN = 12  # digits of a digest in messages
BASE_IDENTITY = "base_identity"  # in a record: of the base's files, as `identity.of_model` gives it
ALLOWED = "--allow-other-base"
OTHER = "not the base it was trained on"
MOST = 290  # characters of a message that names an adapter, its base and the one at hand
BYTES = 8 << 20  # the most of both files
SHORT = 30  # characters of a name, so that a message has less than 300


@dataclass(frozen=True)
class TrainedOn:
    """The storage of a base in training, and the dtype that it computed in; None where the record
    of an earlier version does not name it.
    """

    storage: str
    dtype: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> TrainedOn | None:
        """From a record."""
        names = record.get(TRAINED_ON)
        if names is None:
            storage = named_as_now(record.get("recipe") or {}).get("storage")
            return None if storage is None else cls(str(storage))
        if not isinstance(names, dict) or {*map(type, names.values())} - {str}:
            raise LorafoldError(f"field {TRAINED_ON}: found {names!r}, expected two names")
        return cls(names.get("storage", "auto"), names.get("dtype"))

    def as_json(self) -> dict[str, str]:
        """As a record has it."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        computed = f", computed in {self.dtype}" * (self.dtype not in (None, self.storage))
        return f"{'bf16 or fp32' if self.storage == 'auto' else self.storage}{computed}"


@dataclass(frozen=True)
class OwnBase:
    """The base of an adapter as it says itself; what it does not say is empty.

    adapter: The directory of the adapter.
    name: The name or path by which the base was opened.
    revision: Of a hub model, as PEFT notes it.
    fingerprint: Of the base's weights.
    identity: Of the base's files.
    trained_on: How the base stored its weights in training, and the dtype that it computed in; None
        where the record has neither.
    """

    adapter: Path
    name: str
    revision: str | None
    fingerprint: Fingerprint
    identity: str
    trained_on: TrainedOn | None = None

    @classmethod
    def of(cls, adapter: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> OwnBase:
        """From the contents of both files."""
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        return cls(
            adapter,
            name if isinstance(name, str) else "",
            revision if isinstance(revision, str) and revision else None,
            fingerprint.parse(record.get(BASE, {})),
            str(record.get(BASE_IDENTITY, "")),
            TrainedOn.of(record),
        )

    @classmethod
    def read(cls, adapter: Path) -> OwnBase:
        """From the files of an adapter that is not opened."""
        if not (adapter / CONFIG).exists():
            raise no_adapter(adapter)
        contents = Contents(adapter, (CONFIG, RECORD), BYTES)
        return cls.of(adapter, contents.object(CONFIG), contents.record)

    @property
    def named_in(self) -> str:
        """The file that names it, in words."""
        return "the adapter's record" if self.fingerprint else f"the adapter's {CONFIG}"

    @property
    def known(self) -> bool:
        """Whether it says anything by which the base can be found."""
        return bool(self.name or self.fingerprint)

    def same_as(self, other: OwnBase) -> bool:
        """Whether both are one base: by what both say of it, and if only one has a fingerprint, by
        their names.
        """
        if self.identity and self.identity == other.identity:
            return True
        if self.fingerprint and other.fingerprint:
            return fingerprint.agree(self.fingerprint, other.fingerprint)
        return self.name == other.name

    def without(self, paths: Sequence[str]) -> OwnBase:
        """The same with a fingerprint that has nothing of these modules, which are not the base's.
        """
        inside = tuple(f"{path}." for path in paths)
        samples = {n: one for n, one in self.fingerprint.items() if not n.startswith(inside)}
        return replace(self, fingerprint=samples)

    def problems(self, base: Weights, called: str) -> list[str]:
        """A line that says that a base is another one, or no line. An adapter without a fingerprint
        fits any base.
        """
        if not (differences := fingerprint.differences(self.fingerprint, base)):
            return []
        message = OTHER
        if self.name not in ("", called):
            that, this = shortened(self.name, SHORT), shortened(called or "nameless", SHORT)
            message += f": that is {that}, this is {this}"
            differences = [differences[0].partition(":")[0]]
        return [
            f"{message} ({shortened(differences[0], 110)}); load that base, or allow this one:"
            f" {ALLOWED} (allow_other_base=True)"
        ]

    def check(self, base: Weights, called: str) -> None:
        """Raise LorafoldError for another base, as `problems`, whose arguments these are, but not
        where none of the weights is there: in files they may have other names than in the model.
        """
        known = any(base.find(name) for name in self.fingerprint)
        if known and (problems := self.problems(base, called)):
            path = shortened(str(self.adapter), max(SHORT, MOST - len(problems[0])))
            raise LorafoldError(f"{path}: {problems[0]}")

    def hint(self, called: str) -> str:
        """What a message about a base that does not fit ends with, if the adapter has no
        fingerprint and names another one.
        """
        if self.fingerprint or self.name in ("", called):
            return ""
        that, this = shortened(self.name, SHORT), shortened(called or "nameless", SHORT)
        return f"; {self.named_in} names the base {that}, and this is {this}"

    def other(self, base: Weights) -> str:
        """The line to tell where an adapter is loaded on another base all the same; else empty."""
        differences = fingerprint.differences(self.fingerprint, base)
        message = f"adapter {self.adapter} was trained on another base ({'; '.join(differences)})"
        return f"{message}; loaded all the same ({ALLOWED})" if differences else ""


def recorded(over: Sequence[Origin]) -> dict[str, Any]:
    """What a record says of the adapters below, as far as their files are known; empty if there is
    nothing to say.
    """
    entries = [{"adapter": o.path, "sha256": o.sha256} for o in over if o.sha256]
    return {OVER: entries} if entries else {}


def parse_over(record: Mapping[str, Any]) -> tuple[Origin, ...]:
    """The adapters that a record says its adapter lies over, lowest first."""
    entries = record.get(OVER, [])
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and all(isinstance(e.get(k), str) for k in ("adapter", "sha256"))
        for e in entries
    ):
        raise LorafoldError(
            f"field {OVER}: found {entries!r}, expected a list of objects with adapter"
            " and sha256"
        )
    return tuple(Origin(path=e["adapter"], sha256=e["sha256"]) for e in entries)


def expected_path(origin: Origin, over: Path) -> Path:
    """Where an adapter has to be for an engine or a server to find it: beside the one that lies
    over it, under the last part of its path. A record comes with an adapter, and may not choose
    what is read.
    """
    return over.resolve().parent / Path(origin.path).name


def not_found(origin: Origin, over: Path) -> str:
    """What is wrong if `expected_path` leads to nothing, or to another adapter; arguments as there.
    """
    return (
        f"{over}: it was trained over {listed([origin])}, which was not found in"
        f" {expected_path(origin, over)}; put it there, or merge both"
    )


def same_adapters(needed: Sequence[Origin], below: Sequence[Origin]) -> bool:
    """Whether an adapter that lies over those needed fits over those found, lowest first. One that
    lies over nothing fits over any.
    """
    return not needed or [o.sha256 for o in needed] == [o.sha256 for o in below]


def mismatch(needed: Sequence[Origin], below: Sequence[Origin]) -> str:
    """What is wrong where an adapter does not fit."""
    return (
        f"it was trained over {listed(needed)}; found {listed(below) or 'nothing'}"
        " below it"
    )


def loading_advice(path: Path, needed: Sequence[Origin]) -> str:
    """How to load an adapter over those that it needs."""
    options = " ".join(f"--adapter {p}" for p in (*(o.path for o in needed), path))
    first = ", ".join(f'lf.load(model, "{o.path}", "{Path(o.path).name}")' for o in needed)
    return (
        f"give the adapters in this order: {options} ({first} first), or override this with"
        " --allow-other-base (allow_other_base=True)"
    )


def listed(origins: Sequence[Origin]) -> str:
    """The adapters in a line, lowest first: the directory and the first digits of each digest."""
    return ", then ".join(
        f"{o.path} ({o.sha256[:SHOWN]})" if o.sha256 else f"{o.name!r} (not saved)" for o in origins
    )
