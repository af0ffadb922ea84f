"""The base and the base adapters that a saved adapter was trained on.

    "base_model_name_or_path": ...                in adapter_config.json: the base's name
    "base": {...}, "base_identity": ...           in lorafold.json: its fingerprint and identity
    "over": [{"adapter": "out/sft", "sha256": "5d1c..."}, ...]      its base adapters, lowest first

Directories written by PEFT contain only the base's name and revision. An adapter that was trained
on top of base adapters is only loaded on top of the same adapters, unless --allow-other-base is
set. An adapter is identified by a digest of its config and weights, which does not depend on the
model card, the record or the tokenizer, and exists for PEFT's directories too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafold.core.attach import Origin
from lorafold.errors import LorafoldError, truncate_middle
from lorafold.files.contents import Contents
from lorafold.files.model_card import OVER
from lorafold.files.record import BASE, RECORD, TRAINED_ON, current_names
from lorafold.models import fingerprint
from lorafold.models.fingerprint import Fingerprint
from lorafold.models.weights import Weights
from lorafold.peft.config import CONFIG, WEIGHTS, missing_config_error
from lorafold.peft.table_types import JsonObject

DIGEST_FILES = (CONFIG, WEIGHTS)  # the files that an adapter's digest covers
DIGEST_DIGITS = 12  # digits of a digest in messages
BASE_IDENTITY = "base_identity"  # in lorafold.json: `identity.of_model` of the base's files
ALLOW_OPTION = "--allow-other-base"
OTHER_BASE_MESSAGE = "the adapter was trained on another base"
MAX_MESSAGE = 290  # maximum characters of a message that names an adapter and two bases
MAX_BYTES = 8 << 20  # maximum size of both files
MAX_NAME = 30  # maximum characters of a name in a message


@dataclass(frozen=True)
class TrainingStorage:
    """The quantization and compute dtype of a base in training. Records of earlier versions have no
    compute dtype.
    """

    storage: str
    dtype: str | None = None

    @classmethod
    def of(cls, record: JsonObject) -> TrainingStorage | None:
        """The training storage recorded in lorafold.json, or None."""
        names = record.get(TRAINED_ON)
        if names is None:
            storage = current_names(record.get("recipe") or {}).get("storage")
            return None if storage is None else cls(str(storage))
        if not isinstance(names, dict) or {*map(type, names.values())} - {str}:
            raise LorafoldError(f"field {TRAINED_ON}: found {names!r}, expected an object of texts")
        return cls(names.get("storage", "auto"), names.get("dtype"))

    def as_json(self) -> dict[str, str]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        computed = f", computed in {self.dtype}" * (self.dtype not in (None, self.storage))
        return f"{'bf16 or fp32' if self.storage == 'auto' else self.storage}{computed}"


@dataclass(frozen=True)
class RecordedBase:
    """The base that an adapter directory records: its name or path, Hub revision, fingerprint and
    identity, and its storage in training. Unknown fields are empty.
    """

    adapter: Path
    name: str
    revision: str | None
    fingerprint: Fingerprint
    identity: str
    trained_on: TrainingStorage | None = None

    @classmethod
    def of(cls, adapter: Path, config: JsonObject, record: JsonObject) -> RecordedBase:
        """Parses the contents of adapter_config.json and lorafold.json."""
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        return cls(
            adapter,
            name if isinstance(name, str) else "",
            revision if isinstance(revision, str) and revision else None,
            fingerprint.parse(record.get(BASE, {})),
            str(record.get(BASE_IDENTITY, "")),
            TrainingStorage.of(record),
        )

    @classmethod
    def read(cls, adapter: Path) -> RecordedBase:
        """Reads adapter_config.json and lorafold.json, but not the weights."""
        if not (adapter / CONFIG).exists():
            raise missing_config_error(adapter)
        contents = Contents(adapter, (CONFIG, RECORD), MAX_BYTES)
        return cls.of(adapter, contents.object(CONFIG), contents.record)

    @property
    def named_in(self) -> str:
        """The file that contains the base's name, as messages call it."""
        return "the adapter's record" if self.fingerprint else f"the adapter's {CONFIG}"

    @property
    def known(self) -> bool:
        """Whether the adapter records a name or fingerprint of its base."""
        return bool(self.name or self.fingerprint)

    def same_as(self, other: RecordedBase) -> bool:
        """Whether both are the same base, by identity, by fingerprint, or otherwise by name."""
        if self.identity and self.identity == other.identity:
            return True
        if self.fingerprint and other.fingerprint:
            return fingerprint.same_base(self.fingerprint, other.fingerprint)
        return self.name == other.name

    def without(self, paths: Sequence[str]) -> RecordedBase:
        """A copy whose fingerprint omits these modules, because they are not part of the base."""
        inside = tuple(f"{path}." for path in paths)
        samples = {n: one for n, one in self.fingerprint.items() if not n.startswith(inside)}
        return replace(self, fingerprint=samples)

    def problems(self, base: Weights, called: str) -> list[str]:
        """A list with one message if `base` does not match the fingerprint, else an empty list."""
        if not (differences := fingerprint.differences(self.fingerprint, base)):
            return []
        message = OTHER_BASE_MESSAGE
        if self.name not in ("", called):
            names = (self.name, called or "a model without a name")
            recorded, found = (truncate_middle(name, MAX_NAME) for name in names)
            message += f": {recorded}, not {found}"
            differences = [differences[0].partition(":")[0]]
        return [
            f"{message} ({truncate_middle(differences[0], 110)}); load that base, or allow this one"
            f" with {ALLOW_OPTION} (allow_other_base=True)"
        ]

    def check(self, base: Weights, called: str) -> None:
        """Checks that `base` matches the fingerprint. A base that has none of the recorded weights
        is accepted, because its files may use other names.
        """
        known = any(base.find(name) for name in self.fingerprint)
        if known and (problems := self.problems(base, called)):
            path = truncate_middle(str(self.adapter), max(MAX_NAME, MAX_MESSAGE - len(problems[0])))
            raise LorafoldError(f"{path}: {problems[0]}")

    def hint(self, called: str) -> str:
        """A hint for error messages that the adapter names another base; otherwise empty."""
        if self.fingerprint or self.name in ("", called):
            return ""
        recorded, found = (truncate_middle(n, MAX_NAME) for n in (self.name, called or "unnamed"))
        return f"; the base in {self.named_in} is {recorded}, but this base is {found}"

    def other_base_warning(self, base: Weights) -> str:
        """The warning for an adapter that is loaded on another base; empty if the base matches."""
        differences = fingerprint.differences(self.fingerprint, base)
        message = f"adapter {self.adapter} was trained on another base ({'; '.join(differences)})"
        return f"{message}; loaded anyway ({ALLOW_OPTION})" if differences else ""


def over_record(over: Sequence[Origin]) -> dict[str, Any]:
    """The entry for base adapters in lorafold.json; empty if their files are unknown."""
    entries = [{"adapter": o.path, "sha256": o.sha256} for o in over if o.sha256]
    return {OVER: entries} if entries else {}


def parse_over(record: JsonObject) -> tuple[Origin, ...]:
    """The base adapters according to lorafold.json, lowest first."""
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
    """The path at which engine and server look for a base adapter, which is beside the adapter on
    top. The recorded path is not used, because a downloaded record must not choose which files are
    read.
    """
    return over.resolve().parent / Path(origin.path).name


def missing_message(origin: Origin, over: Path) -> str:
    """The error message if a base adapter of the adapter `over` is not at the expected path."""
    return (
        f"{over}: trained on top of {describe_adapters([origin])}, which was not found in"
        f" {expected_path(origin, over)}; copy that adapter there, or merge both"
    )


def same_adapters(needed: Sequence[Origin], below: Sequence[Origin]) -> bool:
    """Whether the adapters `below` are the `needed` base adapters, in order. An adapter without
    base adapters can be loaded on any adapters.
    """
    return not needed or [o.sha256 for o in needed] == [o.sha256 for o in below]


def mismatch_message(needed: Sequence[Origin], below: Sequence[Origin]) -> str:
    """The error message if the adapters `below` are not the `needed` base adapters."""
    return (
        f"trained on top of {describe_adapters(needed)}, but loaded on top of"
        f" {describe_adapters(below) or 'the base alone'}"
    )


def loading_advice(path: Path, needed: Sequence[Origin]) -> str:
    """Advice on how to load an adapter on top of its base adapters."""
    options = " ".join(f"--adapter {p}" for p in (*(o.path for o in needed), path))
    first = ", ".join(f'lf.load(model, "{o.path}", "{Path(o.path).name}")' for o in needed)
    return (
        f"load the adapters in this order: {options} ({first} first), or skip this check with"
        " --allow-other-base (allow_other_base=True)"
    )


def describe_adapters(origins: Sequence[Origin]) -> str:
    """The directories and shortened digests of adapters in one line, lowest first."""
    return ", then ".join(
        f"{o.path} ({o.sha256[:DIGEST_DIGITS]})" if o.sha256 else f"{o.name!r} (not saved)"
        for o in origins
    )
