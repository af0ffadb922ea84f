"""What a merge will do, found out before a byte is written: which tensors change, where they lie,
and all that stands in the way.

The adapters are laid over the checkpoint's skeleton by the ordinary loader, and each site is folded
once in shapes alone: so a method that has no weight-space form, a bias that a plain model can't
hold, or a tied weight is seen here, with nothing known of methods.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafold.adapter import load
from lorafold.bases import layer_of
from lorafold.bases.vocabulary import declared, grown
from lorafold.core.attach import Adapted, adapted_modules
from lorafold.core.delta import Delta, alike
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.io.models import HUB_FILES, ModelSource
from lorafold.merge.checkpoint import (
    Checkpoint,
    Skeleton,
    open_checkpoint,
    skeleton,
    untied_config,
    with_biases,
)
from lorafold.merge.container import Entry
from lorafold.merge.into import PACKING, lay_packing
from lorafold.merge.stored import as_stored

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Plan:
    """What will be written.

    `changed` maps the name of a tensor to the module and the parameter it is; `added` are tensors
    that the files lack, each with the entry that it is like: the one that it was tied to, or its
    own for a bias; `zeros` are biases that come along with those; `shapes` are those of the changed
    tensors, which `vocabulary` rows have where it grew.
    """

    checkpoint: Checkpoint
    model: nn.Module
    adapters: tuple[str, ...]
    changed: dict[str, tuple[str, str]]
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
    bones = skeleton(checkpoint, trust_remote_code)
    if packing is not None:
        lay_packing(bones.model, packing)
    names = tuple(f"merged{i}" for i in range(len(adapters)))
    for name, path in zip(names, adapters, strict=True):
        load(bones.model, path, name, allow_other_base=allow_other_base)
    names = (PACKING, *names)
    problems: dict[str, list[str]] = defaultdict(list)
    parameters: list[tuple[str, str]] = []  # (module path, name)
    folded: dict[str, tuple[int, ...]] = {}  # by parameter
    for path, module in adapted_modules(bones.model):
        try:
            parameters += [(path, name) for name in changes(module, names)]
            folded |= {f"{path}.{name}": shape for name, shape in shapes(module, names).items()}
        except NotMergeable as e:
            problems[str(e)].append(path or "the model as a whole")
    config, biases = (
        json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8")),
        dict[str, Entry](),
    )
    try:
        config, biases = with_biases(
            config, bones, [path for path, name in parameters if name == "bias"]
        )
    except NotMergeable as e:
        problems[str(e)].append("added biases")
        parameters = [(path, name) for path, name in parameters if name != "bias"]
    shared = {f"{p}.{name}" for p, name in parameters if _stays_tied(bones, p, name, names)}
    parameters = [
        (p, name)
        for p, name in parameters
        if f"{p}.{name}" not in shared or f"{p}.{name}" in bones.entries
    ]
    changed: dict[str, tuple[str, str]] = {}
    sources: dict[str, Entry] = {}
    for path, parameter in parameters:
        try:
            name, entry = _place(bones, f"{path}.{parameter}")
            changed[name], sources[name] = (path, parameter), entry
        except NotMergeable as e:
            problems[str(e)].append(path or "the model as a whole")
    loose = {name: at for name, at in changed.items() if ".".join(at) not in shared}
    if any(".".join(at) in bones.tied for at in loose.values()):
        try:
            config = untied_config(config, bones, trust_remote_code)
        except LorafoldError as e:
            problems[str(e)].append("tied weights")
    vocabulary = None
    try:
        rows = {
            name.removesuffix(".weight"): shape[0]
            for name, shape in folded.items()
            if name.endswith(".weight")
        }
        if (vocabulary := grown(bones.model, rows)) is not None:
            config = declared(config, vocabulary)
    except NotMergeable as e:
        problems[str(e)].append("new tokens")
    if not changed and not problems:
        problems["the adapters change no weight"].append(str(checkpoint.path))
    if problems:
        raise NotMergeable(
            "; ".join(f"{_few(paths)}: {reason}" for reason, paths in problems.items())
        )
    zeros = {
        entry.name: bones.model.get_parameter(name).data
        for name, entry in biases.items()
        if entry.name not in changed
    }
    added = _untied(bones, loose, sources) | {entry.name: entry for entry in biases.values()}
    shaped = {name: folded[".".join(at)] for name, at in changed.items()}
    return Plan(
        checkpoint, bones.model, names[1:], changed, added, zeros, config, shaped, vocabulary
    )


def deltas_of(module: Adapted, adapters: Sequence[str]) -> Iterator[Delta]:
    return (module.deltas[name] for name in adapters if name in module.deltas)  # type: ignore[misc]


def changes(module: Adapted, adapters: Sequence[str]) -> list[str]:
    """The parameters that folding will change, or add, found by folding shapes.

    NotMergeable as `fold`.
    """
    try:
        before = [t if t is None else t.to("meta") for t in layer_of(module).dense()]
    except NotMergeable as e:
        kinds = ", ".join(
            sorted(
                {
                    type(part).__name__
                    for delta in deltas_of(module, adapters)
                    for part in delta.parts()
                }
            )
        )
        raise NotMergeable(f"{kinds} has no form in weight space ({e})") from None
    after = _folded(module, adapters, *before)
    return [
        name
        for name, old, new in zip(("weight", "bias"), before, after, strict=True)
        if new is not old
    ]


def shapes(module: Adapted, adapters: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters once folded, as the module stores them."""
    w, b = (t if t is None else t.to("meta") for t in layer_of(module).dense())
    return {
        name: tuple(t.shape)
        for name, t in as_stored(module, *_folded(module, adapters, w, b)).items()
    }


# on the meta device
def _folded(
    module: Adapted, adapters: Sequence[str], w: Any, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    for delta in deltas_of(module, adapters):
        w, b = _on_meta(delta).fold(w, b)
    return w, b


def _on_meta(delta: Delta) -> Delta:
    """A copy of the delta without its values."""
    tensors = [*delta.parameters(), *delta.buffers()]
    return copy.deepcopy(
        delta, {id(t): nn.Parameter(t.to("meta"), requires_grad=False) for t in tensors}
    )


def _stays_tied(bones: Skeleton, path: str, name: str, adapters: Sequence[str]) -> bool:
    """Is this parameter shared, and changed alike in every module that has it?"""
    others = [
        bones.model.get_submodule(other.rpartition(".")[0])
        for other in bones.tied.get(f"{path}.{name}", ())
    ]
    own = list(deltas_of(bones.model.get_submodule(path), adapters))  # type: ignore[arg-type]

    def same(module: nn.Module) -> bool:
        theirs = list(deltas_of(module, adapters)) if isinstance(module, Adapted) else []
        return len(own) == len(theirs) and all(map(alike, own, theirs))

    return bool(others) and all(map(same, others))


def _place(bones: Skeleton, parameter: str) -> tuple[str, Entry]:
    """The name under which a parameter is written, and the entry that holds its values: its own, or
    that of one it is tied to.
    """
    names = (parameter, *bones.tied.get(parameter, ()))
    if any(n in bones.converted for n in names):
        raise NotMergeable(
            "the files hold this weight in a form that transformers converts on loading, so it"
            " can't be written back"
        )
    entry = next(bones.entries[n] for n in names if n in bones.entries)
    if entry.dtype not in FLOATS:
        raise NotMergeable(
            f"its weight is stored as {entry.dtype}, expected one of {', '.join(FLOATS)}"
        )
    return (entry.name if parameter in bones.entries else parameter), entry


def _untied(
    bones: Skeleton, changed: dict[str, tuple[str, str]], sources: dict[str, Entry]
) -> dict[str, Entry]:
    """The tensors to add, so that every module whose weight was shared with a changed one has its
    own.
    """
    added = {}
    for name, (path, parameter) in changed.items():
        for n in (f"{path}.{parameter}", *bones.tied.get(f"{path}.{parameter}", ())):
            if n not in bones.entries:
                added[n] = sources[name]
    return added


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
