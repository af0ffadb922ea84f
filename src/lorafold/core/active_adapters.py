"""The active adapters of a model, and the random numbers of its dropout.

Gradient checkpointing recomputes a block in the backward pass, when other adapters may be active.
Each module call therefore records the active adapters in the frame of `torch.utils.checkpoint`, and
the recomputation uses them. Reentrant and nested checkpoints have no such frame; their
recomputation is refused if modules ran with other adapters since the last backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from lorafold.core.contexts import in_backward
from lorafold.errors import LorafoldError

Names = tuple[str, ...]
# the `only` blocks that this thread or task has entered
_open_blocks: ContextVar[frozenset[OnlyBlock]] = ContextVar("inside", default=frozenset())


@dataclass(eq=False)
class Origin:
    """The directory that an adapter was last loaded from or saved to, and the SHA-256 digest of its
    files. The digest is empty for an adapter that has no files or was merged.
    """

    name: str = ""
    path: str = ""
    sha256: str = ""


@dataclass(frozen=True, eq=False)
class RandomSource:
    """The seed of dropout: a 63-bit key, and an int64 name (B, T) for each token. The name consists
    of the token's row and position, so that packed, padded and single rows drop the same elements.
    """

    key: int
    names: Tensor


@dataclass(eq=False)
class OnlyBlock:
    """An open `with only(...)` block; `before` holds the adapters that were active outside it."""

    names: Names
    before: Names


@dataclass(eq=False)
class CheckpointRecord:
    """The active adapters at each module call of a checkpointed segment."""

    names: list[Names] = field(default_factory=list)
    hook: Any = None
    at: int = 0

    def next_replayed(self, hook: Any) -> Names | None:
        """Returns the adapters of the next module call when `hook` recomputes the segment; None at
        the end.
        """
        if hook is not self.hook:
            self.hook, self.at = hook, 0
        self.at += 1
        return self.names[self.at - 1] if self.at <= len(self.names) else None


@dataclass(eq=False)
class StateDictLoading:
    """One `load_state_dict` call: the adapters in the state dict, and the missing keys of other
    adapters, which are not reported.
    """

    missing: list[str]
    given: set[str] = field(default_factory=set)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def add_module(self, prefix: str, given: set[str]) -> None:
        self.given |= given
        for name in self.given & self.dropped.keys():
            self.missing += self.dropped.pop(name)
        for key in [key for key in self.missing if key.startswith(prefix)]:
            name = key.removeprefix(prefix).partition(".")[0]
            if name not in self.given:
                self.missing.remove(key)
                self.dropped.setdefault(name, []).append(key)


@dataclass(eq=False)
class Selection:
    """The active adapters of a model, lowest first, and the state that its adapted modules share.
    """

    names: Names = ()
    origins: dict[str, Origin] = field(default_factory=dict)
    frozen: list[nn.Parameter] = field(default_factory=list)
    random_source: RandomSource | None = None
    loading: StateDictLoading | None = None
    reference_names: Names | None = None  # the adapters of the model's last reference
    _lock: Lock = field(default_factory=Lock)
    _entries: list[OnlyBlock] = field(default_factory=list)
    # the adapters of module calls that may be recomputed without a record, since the last such
    # recomputation, and whether one has happened since
    _ran_names: set[Names] = field(default_factory=set)
    _replayed: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "origins": self.origins, "frozen": self.frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    @property
    def active(self) -> tuple[Origin, ...]:
        return tuple(self.origins.setdefault(name, Origin(name)) for name in self.names)

    def enter(self, names: Names) -> OnlyBlock:
        """Activates these adapters until `leave` is called with the returned block."""
        with self._lock:
            if self._entries and self._entries[-1] not in _open_blocks.get():
                other = ", ".join(map(repr, self._entries[-1].names)) or "no adapter"
                raise LorafoldError(
                    "lf.only: another thread or task is inside lf.only on this model, with"
                    f" {other} active; active adapters belong to the model, so use a lock, or use"
                    " lorafold.engine to run requests with many adapters at once"
                )
            entry = OnlyBlock(names, self.names)
            self._entries.append(entry)
            self.names = names
        _open_blocks.set(_open_blocks.get() | {entry})
        return entry

    def leave(self, entry: OnlyBlock) -> None:
        """Restores the adapters that were active before the block. Blocks may be left in any order
        and from any thread.
        """
        with self._lock:
            at = self._entries.index(entry)
            if entry is self._entries[-1]:
                self.names = entry.before
            else:
                self._entries[at + 1].before = entry.before
            del self._entries[at]
        _open_blocks.set(_open_blocks.get() - {entry})

    def add(self, name: str) -> None:
        """Activates an adapter on top of the active ones. It stays active when the open `only`
        blocks end.
        """
        with self._lock:
            self.names += (name,)
            for entry in self._entries:
                entry.before += (name,)

    def remove(self, name: str) -> None:
        with self._lock:
            self.names = tuple(n for n in self.names if n != name)
            for entry in self._entries:
                entry.before = tuple(n for n in entry.before if n != name)
            self.origins.pop(name, None)

    def names_for_call(self, training: bool) -> Names:
        """Returns the adapters of a module call: the active ones, or, if a checkpoint is
        recomputed, those of its forward pass.
        """
        if torch.compiler.is_compiling():
            return self.names
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is None:
            if torch.is_grad_enabled():
                if in_backward():
                    self._check_replay()
            elif training:  # this may be the forward pass of a reentrant checkpoint
                self._note()
            return self.names
        recorded, replaying = _record_of(self, hooks[0])
        if replaying and recorded is not None:
            replayed = recorded.next_replayed(hooks[0])
            if replayed is not None:
                return replayed
        if in_backward():
            self._check_replay()
        else:  # also with a record: a nested segment gets a new frame when it is recomputed
            self._note()
        if recorded is not None and not replaying:
            recorded.names.append(self.names)
        return self.names

    def _note(self) -> None:
        if self._replayed:
            self._ran_names, self._replayed = set(), False
        self._ran_names.add(self.names)

    def _check_replay(self) -> None:
        self._replayed = True
        if others := self._ran_names - {self.names}:
            other = " and with ".join(str(list(names)) for names in sorted(others))
            raise LorafoldError(
                f"backward recomputes checkpointed blocks with the adapters {list(self.names)}, but"
                f" modules also ran with {other}: call backward inside the same lf.only, or set"
                " use_reentrant=False (gradient_checkpointing_kwargs), which records the adapters"
            )


def _record_of(selection: Selection, hook: Any) -> tuple[CheckpointRecord | None, bool]:
    """Returns the record of the checkpointed segment that a saved-tensors hook belongs to, and
    whether the segment is being recomputed.
    """
    own = getattr(hook, "_torchdynamo_orig_callable", hook)
    code = getattr(own, "__code__", None)
    for name, replaying in (("frame", False), ("target_frame_ref", True)):
        if code is not None and name in code.co_freevars:
            held = own.__closure__[code.co_freevars.index(name)].cell_contents
            frame = held() if replaying else held
            if not hasattr(frame, "recompute_fn"):
                break
            known = vars(frame).setdefault("lorafold_names", {})
            return known.setdefault(selection, CheckpointRecord()), replaying
    return None, False


BRANCH_BIT, SLOT_BIT = 32, 24  # the bits of a name: 23 row, 8 branch, 8 slot, 24 position


class DropoutSite(NamedTuple):
    """The inputs of one dropout's random numbers: the step's key, the token names (T,) and the
    module's number.
    """

    key: int
    names: Tensor
    number: int


@contextmanager
def seeded_dropout(selection: Selection, random_source: RandomSource) -> Iterator[None]:
    """Context manager: dropout in the selection's model takes its random numbers from this source.
    """
    previous, selection.random_source = selection.random_source, random_source
    try:
        yield
    finally:
        selection.random_source = previous


def token_names(rows: Tensor, positions: Tensor, branches: Tensor | int = 0) -> Tensor:
    """Returns the int64 names (B, T) of tokens; the arguments broadcast to that shape."""
    return (rows.long() << (BRANCH_BIT + 8)) + (torch.as_tensor(branches) << BRANCH_BIT) + positions


def expert_token_names(names: Tensor, at: Tensor, k: int) -> Tensor:
    """Returns the names (S,) of the rows that experts compute. `at` (S,) holds token * k + i for a
    row of the i-th of a token's k experts.
    """
    return names[at // k] + (at % k << SLOT_BIT)


def dropout_site(
    module: nn.Module, tokens: int, of: Callable[[Tensor], Tensor] | None = None
) -> DropoutSite | None:
    """Returns the inputs of dropout's random numbers in a module; `of` maps the names (T,) of the
    tokens to those of the module's rows (S,). Returns None outside `seeded_dropout`, and if the
    module's inputs are not the batch's tokens.
    """
    selection = vars(module).get("selection")
    if not isinstance(selection, Selection) or (random_source := selection.random_source) is None:
        return None
    names = random_source.names.flatten()
    if len(names) != tokens:
        return None
    names = names if of is None else of(names)
    return DropoutSite(random_source.key, names, crc32(vars(module)["site"].encode()))
