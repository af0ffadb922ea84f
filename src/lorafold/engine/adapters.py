"""An adapter's files, verified, and the adapter as the engine holds it.

    entry = Entry("sft", path, digest(path), generation)
    held = Reader(model).read(entry)        # Held: factors of products, and deltas of other kinds

What is read is what was verified: the files are copied to a private directory while their digest is
taken, and `lorafold.adapter.load` reads the copy, with all its checks. It loads onto a shadow of
the model, which has modules of its own and the model's tensors, so that a worker can load while the
engine computes with the model itself.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafold.adapter import load
from lorafold.core.attach import adapted_modules, deltas_on
from lorafold.core.combine import Stack
from lorafold.core.delta import Delta
from lorafold.engine.structure import Shape, Structure
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.record import RECORD
from lorafold.peft.config import CONFIG
from lorafold.peft.directory import WEIGHTS

FILES = (CONFIG, WEIGHTS, RECORD, MANIFEST)
# Products of a larger rank take longer than the base's own, whose rows they would all have to pad
RANK = 64


@dataclass(frozen=True)
class Entry:
    """An adapter that the engine knows: its name, its directory, the digest of its files, and the
    number of the call that made it known. Another digest under the same name is another entry. One
    that is attached on the model has no files.
    """

    name: str
    path: Path | None
    digest: str
    generation: int

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
class Held:
    """An adapter in memory.

    `factors` are by the index of the shape, and `products` are the paths that they change. `deltas`
    are all others, by path. If `apart` is set, rows of this adapter can't share a pass with others.
    """

    entry: Entry
    factors: Mapping[int, Factors]
    products: frozenset[str]
    deltas: Mapping[str, Delta]
    apart: bool
    vocabulary: int | None
    nbytes: int

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all modules that the adapter changes."""
        return self.products | frozenset(self.deltas)


def digest(path: str | Path, copy_to: Path | None = None) -> str:
    """The SHA-256 over the names and contents of an adapter's files, in hexadecimal.

    Each file is read once. Raises LorafoldError if there is none.

    Args:
        path: the adapter's directory.
        copy_to: a directory that gets the bytes that were digested, or None.
    """
    found, whole = 0, hashlib.sha256()
    for name in FILES:
        try:
            content = (Path(path) / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LorafoldError(f"{path}: {name} can't be read ({error.strerror})") from None
        found += 1
        whole.update(f"{name} {len(content)} ".encode())
        whole.update(hashlib.sha256(content).digest())
        if copy_to is not None:
            (copy_to / name).write_bytes(content)
    if not found:
        raise LorafoldError(f"{path}: found no {CONFIG}, expected the directory of an adapter")
    return whole.hexdigest()


def attached(model: nn.Module, names: Sequence[str]) -> dict[str, Delta]:
    """What adapters on the model are together, the first one lowest: deltas by module path."""
    found = {path: deltas_on(module, names) for path, module in adapted_modules(model)}
    return {path: d[0] if len(d) == 1 else Stack(d) for path, d in found.items() if d}


class Reader:
    """Reads adapters for one model.

    Args:
        model: the model, whose tensors the shadow shares.
        structure: what is known of the model.
        dtype: the dtype of the factors.
    """

    def __init__(self, model: nn.Module, structure: Structure, dtype: torch.dtype) -> None:
        self.structure, self.dtype = structure, dtype
        tensors = [*model.parameters(), *model.buffers()]
        self.shadow = copy.deepcopy(model, {id(t): t for t in tensors})

    def read(self, entry: Entry) -> Held:
        """Read and check an adapter. Raises LorafoldError if its files are not what the entry says,
        or do not fit the model.
        """
        assert entry.path is not None
        with tempfile.TemporaryDirectory(prefix="lorafold-") as private:
            found = digest(entry.path, Path(private))
            if found != entry.digest:
                raise LorafoldError(
                    f"adapter {entry.name!r}: {entry.path} changed since it was loaded: found"
                    f" digest {found[:12]}, expected {entry.digest[:12]}; load it again"
                )
            with torch.random.fork_rng(devices=[]):
                try:
                    adapter = load(self.shadow, private, entry.key)
                except LorafoldError as error:
                    text = str(error).replace(private, str(entry.path))
                    raise LorafoldError(f"adapter {entry.name!r}: {text}") from None
        try:
            return self.held(entry, dict(adapter.deltas), adapter.vocabulary)
        finally:
            adapter.detach()

    @torch.no_grad()
    def held(self, entry: Entry, deltas: Mapping[str, Delta], vocabulary: int | None) -> Held:
        """An adapter as the engine holds it.

        Args:
            entry: what it is known as.
            deltas: its deltas by module path.
            vocabulary: the size of the vocabulary with its new tokens, or None.
        """
        apart = vocabulary is not None or not deltas.keys() <= self.structure.rowwise
        pairs = {} if apart else {p: f for p, d in deltas.items() if (f := self._low_rank(p, d))}
        factors = {}
        for i, shape in enumerate(self.structure.shapes):
            ours = [path for path in shape.paths if path in pairs]
            if ours:
                factors[i] = self._stacked(shape, [(shape.paths.index(p), *pairs[p]) for p in ours])
        others = {path: delta for path, delta in deltas.items() if path not in pairs}
        kept = {id(t): t.nbytes for d in others.values() for t in (*d.parameters(), *d.buffers())}
        nbytes = sum(f.down.nbytes + f.up.nbytes for f in factors.values()) + sum(kept.values())
        return Held(entry, factors, frozenset(pairs), others, apart, vocabulary, nbytes)

    def _low_rank(self, path: str, delta: Delta) -> tuple[Tensor, Tensor] | None:
        found = delta.factors() if path in self.structure.where else None
        return None if found is None or len(found[1]) > RANK else found

    def _stacked(self, shape: Shape, found: list[tuple[int, Tensor, Tensor]]) -> Factors:
        rank = max(len(down) for _, _, down in found)
        like = found[0][1]
        down = like.new_zeros(len(found), shape.inn, rank, dtype=self.dtype)
        up = like.new_zeros(len(found), rank, shape.out, dtype=self.dtype)
        for k, (_, u, d) in enumerate(found):
            down[k, :, : len(d)] = d.t()
            up[k, : len(d)] = u.t()
        at = [at for at, _, _ in found]
        index = {at: k for k, at in enumerate(at)}
        return Factors(torch.tensor(at, device=like.device), down, up, index)
