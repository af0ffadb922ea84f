"""An adapter's files, verified, and the adapter as the engine holds it.

    entry = KnownAdapter("sft", path, Reader(model).verified(path), generation)
    held = Reader(model).read(entry)        # factors of products, and deltas of other kinds

What is read is what was verified: each file is read once, into memory, and its bytes are digested
and interpreted, with all the checks of `lorafold.adapter.load`. That happens for a shadow of the
model, which has modules of its own and the model's tensors, so that a worker can read while the
engine computes with the model itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafold.adapter.building import read
from lorafold.core.attach import Origin, adapted_modules, deltas_on, selection_of
from lorafold.core.combine import Stack
from lorafold.core.delta import Delta, Gained
from lorafold.core.matrices import module_at
from lorafold.core.shared_tensors import twin
from lorafold.engine.model_structure import MatrixShapes, Structure
from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents
from lorafold.files.record import RECORD
from lorafold.files.safetensors_header import check_numbers
from lorafold.identity import joined, of_adapter
from lorafold.layers import layer_of
from lorafold.methods.parts.extras import vocabulary
from lorafold.methods.parts.trainable_tokens import TokenRows
from lorafold.models.weights import InMemory
from lorafold.peft.config import CONFIG, WEIGHTS
from lorafold.peft.provenance import COMPUTED, beside, not_found, parse
from lorafold.peft.saved import FILES

BESIDE = 8 << 20  # bytes of a manifest, which an identity leaves out
# Products of a larger rank take longer than the base's own, whose rows they would all have to pad
RANK = 64


class VerifiedAdapter(NamedTuple):
    """The identity of an adapter's files that were verified, and their bytes."""

    identity: str
    nbytes: int


@dataclass(frozen=True)
class KnownAdapter:
    """An adapter that the engine knows: its name, its directory, what was verified of what is read
    for it, which are the adapters below, the lowest first, and itself, and the number of the call
    that made it known. Others under the same name are another entry. One that is attached on the
    model has no files.
    """

    name: str
    path: Path | None
    stack: tuple[VerifiedAdapter, ...]
    generation: int

    @property
    def digest(self) -> str:
        """What is read for it, as one identity; "" without files."""
        return joined([one.identity for one in self.stack]) if self.stack else ""

    @property
    def key(self) -> str:
        """What sets this entry apart from every other, as a name of deltas."""
        return f"{self.generation}-{self.digest[:12]}"


@dataclass(frozen=True)
class Factors:
    """Low-rank updates of n matrices of one shape: their indices among the shape's paths (n,), down
    (n, in, r) and up (n, r, out), which has every scale in it, zero beyond a matrix's own rank.
    """

    at: Tensor
    down: Tensor
    up: Tensor
    index: Mapping[int, int]  # from an index among the shape's paths to that among the n


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory.

    `factors` are by the index of the shape, and `products` are the paths that they change. `gains`
    are what outputs are multiplied with, and what is added then or None, by path (out,). `deltas`
    are all others, by path. If `apart` is set, rows of this adapter can't share a pass with others.
    """

    entry: KnownAdapter
    factors: Mapping[int, Factors]
    products: frozenset[str]
    gains: Mapping[str, tuple[Tensor, Tensor | None]]
    deltas: Mapping[str, Delta]
    apart: bool
    vocabulary: int | None
    nbytes: int
    seconds: float = 0.0  # that reading and checking it took

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all modules that the adapter changes."""
        return self.products.union(self.gains, self.deltas)

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All its tensors, of any shapes."""
        for factors in self.factors.values():
            yield from (factors.down, factors.up)
        yield from (t for gain in self.gains.values() for t in gain if t is not None)
        for delta in self.deltas.values():
            yield from (*delta.parameters(), *delta.buffers())


def attached(model: nn.Module, names: Sequence[str]) -> dict[str, Delta]:
    """What adapters on the model are together, the first one lowest: deltas by module path."""
    found = {path: deltas_on(module, names) for path, module in adapted_modules(model)}
    return {path: d[0] if len(d) == 1 else Stack(d) for path, d in found.items() if d}


def parts_of(deltas: Mapping[str, Delta]) -> Iterator[tuple[str, Delta]]:
    """Every part of every delta with its module path."""
    return ((path, part) for path, delta in deltas.items() for part in delta.parts())


def found_below(origin: Origin, over: Path, most: int) -> Contents:
    """The files of an adapter that another one was trained over, which lies `beside`."""
    contents = Contents(beside(origin, over), FILES, most)
    if CONFIG not in contents.files or contents.digest_of(COMPUTED) != origin.sha256:
        raise LorafoldError(not_found(origin, over))
    return contents


def _check(found: Sequence[Contents], verified: Sequence[VerifiedAdapter]) -> None:
    """Raise LorafoldError unless what was read, the lowest first, is what was verified."""
    stack = [one.identity for one in verified]
    named = [contents.named for contents in found]
    if named != stack:
        paths = ", ".join(str(contents.path) for contents in found)
        ours, theirs = (", ".join(one[:12] for one in each) for each in (named, stack))
        raise LorafoldError(
            f"{paths} changed since it was loaded: found digest {ours}, expected"
            f" {theirs or 'none'}; load it again"
        )


class Reader:
    """Reads adapters for one model."""

    def __init__(
        self, model: nn.Module, structure: Structure, dtype: torch.dtype, allowed: bool = False,
        room: int | None = None,
    ) -> None:  # fmt: skip
        self.structure, self.dtype, self.allowed = structure, dtype, allowed
        self.numbers = None if room is None else room // dtype.itemsize
        self.shadow = twin(model)
        self.base = InMemory.of_model(self.shadow)
        self._one = threading.Lock()  # random numbers are the process's

    def read(self, entry: KnownAdapter) -> LoadedAdapter:
        """Read and check an adapter."""
        assert entry.path is not None
        began = time.perf_counter()
        most = sum(one.nbytes for one in entry.stack) + BESIDE
        try:
            contents = Contents(entry.path, FILES, most)
            _check([contents], entry.stack[-1:])  # nothing else of them is looked at
            needed = self._needed(contents.record)
            below = [found_below(origin, entry.path, most) for origin in needed]
            _check(below, entry.stack[:-1])
            with self._one:
                deltas = self._stacked(below, contents)
        except LorafoldError as error:
            raise LorafoldError(f"adapter {entry.name!r}: {error}") from None
        held = self.held(entry, deltas, vocabulary(self.shadow, parts_of(deltas)))
        return replace(held, seconds=time.perf_counter() - began)

    def verified(self, path: str | Path) -> tuple[VerifiedAdapter, ...]:
        """What an entry's `stack` is now for the adapter in a directory. One that has to be below
        and is not there is left out: `read` says so.
        """
        origins = self._needed(Contents(path, (RECORD,)).record)
        below = [at for o in origins if ((at := beside(o, Path(path))) / CONFIG).is_file()]
        return tuple(self._verified(at) for at in (*below, Path(path)))

    def _verified(self, path: Path) -> VerifiedAdapter:
        files = [file for name in FILES if (file := path / name).is_file()]
        if self.numbers is not None and path / WEIGHTS in files:
            check_numbers(path / WEIGHTS, self.numbers)
        nbytes = sum(file.stat().st_size for file in files)
        return VerifiedAdapter(of_adapter(path, words=False), nbytes)

    def _needed(self, record: Mapping[str, Any]) -> tuple[Origin, ...]:
        """The adapters below one that are read with it. Those that are active on the model belong
        to the base, over which it may have been trained.
        """
        return () if selection_of(self.shadow).active else parse(record)

    def _stacked(self, below: Sequence[Contents], contents: Contents) -> dict[str, Delta]:
        """The deltas of an adapter by module path, each over those of the adapters below, which are
        the ones that its record names.
        """
        active, needed = selection_of(self.shadow).active, self._needed(contents.record)
        parts: dict[str, list[Delta]] = {}
        with torch.random.fork_rng(devices=[]):
            for n, each in enumerate([*below, contents]):
                under = (*active, *needed[:n])
                built = read(
                    self.shadow, each, allow_other_base=self.allowed, base=self.base, below=under
                )
                for path, own in built.parts.items():
                    parts.setdefault(path, []).extend(own)
        if needed and any(isinstance(part, TokenRows) for own in parts.values() for part in own):
            raise LorafoldError(
                f"{contents.path}: it lies over another adapter, and one of them has rows of"
                " tokens, which are served alone only; merge them"
            )
        return {path: own[0] if len(own) == 1 else Stack(own) for path, own in parts.items()}

    @torch.no_grad()
    def held(
        self,
        entry: KnownAdapter,
        deltas: Mapping[str, Delta],
        vocabulary: int | None,
        apart: bool = False,
    ) -> LoadedAdapter:
        """An adapter as the engine holds it."""
        apart = apart or vocabulary is not None or not deltas.keys() <= self.structure.rowwise
        gained = {} if apart else self._gained(deltas)
        products = {p: gained[p].under if p in gained else d for p, d in deltas.items()}
        matrices = {} if apart else {p: products[p] for p in self.structure.where if p in products}
        pairs = {
            p: f
            for p, d in matrices.items()
            if d is not None and (f := d.factors()) is not None and len(f[1]) <= RANK
        }
        gains = {p: one[1:] for p, one in gained.items() if p in pairs or one.under is None}
        factors = {}
        for i, shape in enumerate(self.structure.shapes):
            ours = [path for path in shape.paths if path in pairs]
            if ours:
                found = [(shape.paths.index(p), *pairs[p]) for p in ours]
                factors[i] = factors_of(shape, found, self.dtype)
        others = {
            path: delta.eval().requires_grad_(False)
            for path, delta in deltas.items()
            if path not in pairs and path not in gains
        }
        held = LoadedAdapter(
            entry, factors, frozenset(pairs), gains, others, apart, vocabulary, nbytes=0
        )
        return replace(held, nbytes=sum({id(t): t.nbytes for t in held.tensors}.values()))

    def _gained(self, deltas: Mapping[str, Delta]) -> dict[str, Gained]:
        """Those deltas that are gains over a matrix, by path. Over what is active on the model a
        gain is another one, so there are none.
        """
        if selection_of(self.shadow).active:
            return {}
        found = {
            path: delta.eval().gained(layer_of(module_at(self.shadow, path)))
            for path, delta in deltas.items()
            if path in self.structure.where
        }
        return {path: one for path, one in found.items() if one is not None}


def factors_of(
    shape: MatrixShapes, found: Sequence[tuple[int, Tensor, Tensor]], dtype: torch.dtype
) -> Factors:
    """Factors in a dtype from the index, the up factor (out, r) and the down factor (r, in) of each
    of some matrices of a shape.
    """
    rank = max(len(down) for _, _, down in found)
    like = found[0][1]
    # as files have them, since transposing takes six times as long as this copy
    down = like.new_zeros(len(found), rank, shape.inn, dtype=dtype)
    up = like.new_zeros(len(found), shape.out, rank, dtype=dtype)
    for k, (_, u, d) in enumerate(found):
        down[k, : len(d)] = d
        up[k, :, : len(d)] = u
    at = [at for at, _, _ in found]
    index = {at: k for k, at in enumerate(at)}
    return Factors(torch.tensor(at, device=like.device), down.mT, up.mT, index)
