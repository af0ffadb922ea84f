"""Reading of adapters into memory for the engine.

Each file is read once, and the same bytes are hashed and parsed, with all checks of `lf.load`.
Adapters are built for a shadow model, which has separate modules and shares the tensors, so that a
worker thread can read an adapter while the engine computes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafold.adapter.attaching import read_adapter
from lorafold.core.attach import Origin, adapted_modules, deltas_on, selection_of
from lorafold.core.combine import Stack
from lorafold.core.delta import Delta, Gained
from lorafold.core.expert_matrices import module_at
from lorafold.core.shared_tensors import twin
from lorafold.engine.model_structure import MatrixShapes, Structure
from lorafold.engine.plan import PackedAdapter, StepPlan
from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents
from lorafold.files.record import RECORD
from lorafold.files.safetensors_header import check_num_elements
from lorafold.identity import of_adapter
from lorafold.layers import layer_of
from lorafold.methods.common.biases_and_modules import vocabulary
from lorafold.methods.common.trainable_tokens import TokenRows
from lorafold.models.weights import InMemory
from lorafold.peft.adapter_directory import FILES
from lorafold.peft.config import CONFIG, WEIGHTS
from lorafold.peft.provenance import DIGEST_FILES, expected_path, missing_message, parse_over

MANIFEST_BYTES = 8 << 20  # allowed for the manifest, which `VerifiedAdapter.nbytes` excludes
# a larger rank would be slower than the base's matmul, and all adapters would be padded to it
MAX_STACKED_RANK = 64


class VerifiedAdapter(NamedTuple):
    identity: str
    nbytes: int


@dataclass(eq=False)
class KnownAdapter:
    """A registered adapter, its state and its users. Loading other files under the same name
    creates another entry.
    """

    name: str
    path: Path | None  # None if attached to the model
    stack: tuple[VerifiedAdapter, ...]  # of the base adapters, the lowest first, and this one
    generation: int  # unique per entry
    references: int = 0  # waiting or running requests
    leases: int = 0  # running requests
    pinned: bool = False
    reserved: bool = False  # loaded for a request that has not run yet
    loaded: LoadedAdapter | None = None
    future: Future[None] | None = None  # set while loading
    error: LorafoldError | None = None  # from the last load
    used: int = 0  # logical time of the last lease
    checked: int = 0  # logical time of the last checksum
    checksum: int = 0
    vocabulary: int = 0
    strikes: int = 0  # requests with NaN or infinite logits

    @property
    def key(self) -> str:
        return f"lorafold-{self.generation}"


@dataclass(frozen=True)
class Factors:
    """Low-rank updates of n matrices of one shape: down (n, in, r) and up (n, r, out). `at` (n,)
    contains the matrices' indices in `MatrixShapes.paths`. `up` includes all scales, and is zero
    beyond a matrix's rank.
    """

    at: Tensor
    down: Tensor
    up: Tensor
    index: Mapping[int, int]  # the inverse of `at`


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    key: str  # a unique name for its deltas
    factors: Mapping[int, Factors]  # by index in `Structure.shapes`
    low_rank: frozenset[str]  # paths with factors
    gains: Mapping[str, tuple[Tensor, Tensor | None]]  # (gain, offset), each (out,), by path
    deltas: Mapping[str, Delta]  # other deltas by path
    separate: bool  # needs forward passes without other adapters
    vocabulary: int | None  # size, if the adapter adds tokens
    nbytes: int
    packed: PackedAdapter | None = None  # for planned steps, in place of factors and gains
    seconds: float = 0.0  # duration of loading

    @property
    def paths(self) -> frozenset[str]:
        return self.low_rank.union(self.gains, self.deltas)

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors, which may be scalars, vectors or matrices."""
        for factors in self.factors.values():
            yield from (factors.down, factors.up)
        yield from (t for gain in self.gains.values() for t in gain if t is not None)
        yield from () if self.packed is None else self.packed.tensors
        for delta in self.deltas.values():
            yield from (*delta.parameters(), *delta.buffers())


def deltas_of(model: nn.Module, names: Sequence[str]) -> dict[str, Delta]:
    """Returns the combined delta of each adapted module by path. `names` are adapters, the lowest
    first.
    """
    deltas = {path: deltas_on(module, names) for path, module in adapted_modules(model)}
    return {path: d[0] if len(d) == 1 else Stack(d) for path, d in deltas.items() if d}


def delta_parts(deltas: Mapping[str, Delta]) -> Iterator[tuple[str, Delta]]:
    return ((path, part) for path, delta in deltas.items() for part in delta.parts())


def base_adapter_contents(origin: Origin, over: Path, most: int) -> Contents:
    contents = Contents(expected_path(origin, over), FILES, most)
    if CONFIG not in contents.files or contents.digest_of(DIGEST_FILES) != origin.sha256:
        raise LorafoldError(missing_message(origin, over))
    return contents


def _check_unchanged(read: Sequence[Contents], verified: Sequence[VerifiedAdapter]) -> None:
    actual, expected = [contents.named for contents in read], [v.identity for v in verified]
    if actual != expected:
        paths = ", ".join(str(contents.path) for contents in read)
        digests = [", ".join(identity[:12] for identity in each) for each in (actual, expected)]
        raise LorafoldError(
            f"{paths} changed since it was loaded: found digest {digests[0]}, expected"
            f" {digests[1] or 'none'}; load the adapter again"
        )


class Reader:
    """Reads adapters for one model and converts their factors to `dtype`. Rejects adapters that
    would exceed `room` bytes.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, dtype: torch.dtype,
        allow_other_base: bool = False, room: int | None = None, plan: StepPlan | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.structure, self.dtype, self.allow_other_base = structure, dtype, allow_other_base
        self.max_parameters = None if room is None else room // dtype.itemsize  # per adapter
        self.shadow = twin(model)
        self.base = InMemory.of_model(self.shadow)
        self._lock = threading.Lock()  # guards torch's global random state

    def read(self, entry: KnownAdapter) -> LoadedAdapter:
        assert entry.path is not None
        start_time = time.perf_counter()
        most = sum(verified.nbytes for verified in entry.stack) + MANIFEST_BYTES
        try:
            contents = Contents(entry.path, FILES, most)
            _check_unchanged([contents], entry.stack[-1:])  # before parsing
            base_adapters = self._base_adapters(contents.record)
            below = [base_adapter_contents(origin, entry.path, most) for origin in base_adapters]
            _check_unchanged(below, entry.stack[:-1])
            with self._lock:
                deltas = self._deltas(base_adapters, [*below, contents])
        except LorafoldError as error:
            raise LorafoldError(f"adapter {entry.name!r}: {error}") from None
        loaded = self.loaded(entry.key, deltas, vocabulary(self.shadow, delta_parts(deltas)))
        return replace(loaded, seconds=time.perf_counter() - start_time)

    def verified(self, path: str | Path) -> tuple[VerifiedAdapter, ...]:
        """Returns the adapter in a directory and the base adapters below it, lowest first, with
        their current digests. Omits missing base adapters, because `read` reports them.
        """
        origins = self._base_adapters(Contents(path, (RECORD,)).record)
        below = [at for o in origins if ((at := expected_path(o, Path(path))) / CONFIG).is_file()]
        verified = []
        for at in (*below, Path(path)):
            files = [file for name in FILES if (file := at / name).is_file()]
            if self.max_parameters is not None and at / WEIGHTS in files:
                check_num_elements(at / WEIGHTS, self.max_parameters)
            nbytes = sum(file.stat().st_size for file in files)
            verified.append(VerifiedAdapter(of_adapter(at, words=False), nbytes))
        return tuple(verified)

    def _base_adapters(self, record: Mapping[str, Any]) -> tuple[Origin, ...]:
        """Returns the adapter's base adapters, or none if adapters are active on the model, because
        the engine's base may then include them.
        """
        return () if selection_of(self.shadow).active else parse_over(record)

    def _deltas(self, origins: Sequence[Origin], stack: Sequence[Contents]) -> dict[str, Delta]:
        active = selection_of(self.shadow).active
        parts: dict[str, list[Delta]] = {}
        with torch.random.fork_rng(devices=[]):
            for n, each in enumerate(stack):
                under, allowed = (*active, *origins[:n]), self.allow_other_base
                built = read_adapter(
                    self.shadow, each, allow_other_base=allowed, base=self.base, below=under
                )
                for path, deltas in built.parts.items():
                    parts.setdefault(path, []).extend(deltas)
        if origins and any(isinstance(d, TokenRows) for deltas in parts.values() for d in deltas):
            raise LorafoldError(
                f"{stack[-1].path}: stacked adapters can't be served if one of them has trainable"
                " tokens; merge the adapters"
            )
        return {path: d[0] if len(d) == 1 else Stack(d) for path, d in parts.items()}

    @torch.no_grad()
    def loaded(
        self,
        key: str,
        deltas: Mapping[str, Delta],
        vocabulary: int | None,
        separate: bool = False,
    ) -> LoadedAdapter:
        """Groups deltas by how the engine computes them: as stacked factors, as gains (scales of
        outputs) or with the delta's own code; with `separate`, all with their own code.
        `vocabulary` is the vocabulary's size if the adapter adds tokens.
        """
        separate = separate or vocabulary is not None or not deltas.keys() <= self.structure.rowwise
        active, gained = selection_of(self.shadow).active, dict[str, Gained]()
        pairs = dict[str, tuple[Tensor, Tensor]]()
        for path in () if separate else self.structure.index_of:
            delta = deltas.get(path)
            # the gain is for the base's weight without active adapters
            if delta is not None and not active:
                gain = delta.eval().gained(layer_of(module_at(self.shadow, path)))
                if gain is not None:
                    gained[path], delta = gain, gain.under
            pair = None if delta is None else delta.factors()
            if pair is not None and len(pair[1]) <= MAX_STACKED_RANK:
                pairs[path] = pair
        gains = {p: g[1:] for p, g in gained.items() if p in pairs or g.under is None}
        others = {
            path: delta.eval().requires_grad_(False)
            for path, delta in deltas.items()
            if path not in pairs and path not in gains
        }
        packed, factors = None, dict[int, Factors]()
        if self.plan is not None and not separate and not others:
            packed = self.plan.pack(pairs, gains)
        for i, shape in enumerate(self.structure.shapes if packed is None else ()):
            of_shape = {at: pairs[path] for at, path in enumerate(shape.paths) if path in pairs}
            if of_shape:
                factors[i] = factors_of(shape, of_shape, self.dtype)
        loaded = LoadedAdapter(
            key, factors, frozenset(pairs), {} if packed else gains, others, separate, vocabulary,
            0, packed=packed,
        )  # fmt: skip
        return replace(loaded, nbytes=sum({id(t): t.nbytes for t in loaded.tensors}.values()))


def factors_of(
    shape: MatrixShapes, pairs: Mapping[int, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Factors:
    """Pads factors up (out, r) and down (r, in) to one rank and stacks them. The keys of `pairs`
    are indices in `MatrixShapes.paths`.
    """
    rank = max(len(down) for _, down in pairs.values())
    like = next(iter(pairs.values()))[0]
    # in the files' layout, because a transposing copy takes six times as long
    down = like.new_zeros(len(pairs), rank, shape.in_features, dtype=dtype)
    up = like.new_zeros(len(pairs), shape.out, rank, dtype=dtype)
    for k, (u, d) in enumerate(pairs.values()):
        down[k, : len(d)] = d
        up[k, :, : len(d)] = u
    index = {at: k for k, at in enumerate(pairs)}
    return Factors(torch.tensor([*pairs], device=like.device), down.mT, up.mT, index)
