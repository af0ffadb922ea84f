"""What a merge will do, found out before a byte is written: which tensors change, where they lie,
and all that stands in the way.

The adapters are laid over the model, whose weights stay in their files, by the ordinary loader, and
`fold.plan` says what they change: here it is said in terms of the files' tensors and of the config.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafold.adapter import load
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.fold.plan import WHOLE, module_of, plan_fold
from lorafold.merging.config import declared, untied_config, with_biases
from lorafold.merging.into import PACKING, lay_packing
from lorafold.models.checkpoint import Checkpoint, MappedModel, mapped_model, open_checkpoint
from lorafold.models.container import Entry
from lorafold.models.sources import HUB_FILES, ModelSource

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Plan:
    """What will be written.

    `changed` maps the name of a tensor to the parameter that it is; `added` are tensors that the
    files lack, each with the entry that it is like: the one that it was tied to, or its
    own for a bias; `zeros` are biases that come along with those; `shapes` are those of the changed
    tensors, which `vocabulary` rows have where it grew.
    """

    checkpoint: Checkpoint
    model: nn.Module
    adapters: tuple[str, ...]
    changed: dict[str, str]
    added: dict[str, Entry]
    zeros: dict[str, Tensor]
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    vocabulary: int | None

    def layout(self, file: str) -> list[tuple[str, Entry]]:
        entries = [
            *self.checkpoint.files[file].entries.items(),
            *((name, e) for name, e in self.added.items() if e.file.name == file),
        ]
        return [(name, entry.shaped(self.shapes.get(name, entry.shape))) for name, entry in entries]

    @property
    def weight_bytes(self) -> int:
        return sum(entry.size for file in self.checkpoint.files for _, entry in self.layout(file))


def plan(
    source: ModelSource,
    adapters: Sequence[str | Path],
    *,
    packing: str | None = None,
    allow_other_base: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Lay the adapters, in order, over the model and see what they change.

    Nothing is computed or written.

    `packing`: a round trip that the weights make beneath the adapters (`into`).
    LorafoldError lists everything that stands in the way of the merge.
    """
    checkpoint = open_checkpoint(source, HUB_FILES)  # what is not changed is carried over
    mapped = mapped_model(checkpoint, trust_remote_code)
    if packing is not None:
        lay_packing(mapped.model, packing)
    names = tuple(f"merged{i}" for i in range(len(adapters)))
    for name, path in zip(names, adapters, strict=True):
        load(mapped.model, path, name, allow_other_base=allow_other_base)
    planned = plan_fold(mapped.model, (PACKING, *names))
    problems: dict[str, list[str]] = defaultdict(list)
    for place, reason in planned.problems:
        problems[reason].append(place)
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    biases: dict[str, Entry] = {}
    try:
        config, biases = with_biases(config, mapped, planned.switches)
    except NotMergeable as e:
        problems[str(e)].append("added biases")
    changed: dict[str, str] = {}
    sources: dict[str, Entry] = {}
    known = {*mapped.entries, *mapped.tied, *mapped.converted}
    for parameter in planned.shapes:
        if parameter in planned.together and parameter not in mapped.entries:
            continue  # written under the name of one that it is shared with
        if parameter not in known:
            continue  # a bias that the architecture has no place for: a problem already
        try:
            name, entry = _place(mapped, parameter)
            changed[name], sources[name] = parameter, entry
        except NotMergeable as e:
            problems[str(e)].append(module_of(parameter) or WHOLE)
    if any(parameter in planned.apart for parameter in changed.values()):
        try:
            config = untied_config(config, mapped, trust_remote_code)
        except LorafoldError as e:
            problems[str(e)].append("tied weights")
    if planned.vocabulary is not None:
        config = declared(config, planned.vocabulary)
    if not changed and not problems:
        problems["the adapters change no weight"].append(str(checkpoint.path))
    if problems:
        raise NotMergeable(
            "; ".join(f"{_few(paths)}: {reason}" for reason, paths in problems.items())
        )
    zeros = {
        entry.name: _stored(mapped.model, name)
        for name, entry in biases.items()
        if entry.name not in changed
    }
    loose = {name: at for name, at in changed.items() if at not in planned.together}
    return Plan(
        checkpoint,
        mapped.model,
        names,
        changed,
        _untied(mapped, loose, sources) | {entry.name: entry for entry in biases.values()},
        zeros,
        config,
        {name: planned.shapes[parameter] for name, parameter in changed.items()},
        planned.vocabulary,
    )


def _stored(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path)._parameters[leaf].data  # type: ignore[union-attr]


def _place(mapped: MappedModel, parameter: str) -> tuple[str, Entry]:
    """The name under which a parameter is written, and the entry that holds its values: its own, or
    that of one it is tied to.
    """
    names = (parameter, *mapped.tied.get(parameter, ()))
    if any(n in mapped.converted for n in names):
        raise NotMergeable(
            "the files hold this weight in a form that transformers converts on loading, so it"
            " can't be written back"
        )
    entry = next(mapped.entries[n] for n in names if n in mapped.entries)
    if entry.dtype not in FLOATS:
        raise NotMergeable(
            f"its weight is stored as {entry.dtype}, expected one of {', '.join(FLOATS)}"
        )
    return (entry.name if parameter in mapped.entries else parameter), entry


def _untied(
    mapped: MappedModel, changed: dict[str, str], sources: dict[str, Entry]
) -> dict[str, Entry]:
    """The tensors to add, so that every module whose weight was shared with a changed one has its
    own.
    """
    added = {}
    for name, parameter in changed.items():
        for n in (parameter, *mapped.tied.get(parameter, ())):
            if n not in mapped.entries:
                added[n] = sources[name]
    return added


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
