"""Token rows: the embedding and head rows of a few tokens, trained together with any method.

    embedding   y[t] = rows[i] if id_t is the i-th of the ids, else the layer's output
                rows (k, d), ids (k,)
    head        z[t, id_i] = x[t] . rows[i], else the layer's output            z (T, V + m)
    fold        the matrix (V, d) with these rows at their ids; rows of ids from V on are appended:
                (V + m, d)

Token rows are for tokens added to a tokenizer, and for existing tokens whose meaning should change.
The base is never resized, because the m rows that it lacks belong to the delta. If head and
embedding are tied and have the same ids, the rows are parameters of the embedding's delta only,
which is the `twin` of the head's delta.

A new row starts as the mean of all rows, so that a new token's probability is at most the average
for any text (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). New
entries of a head's bias are the mean of the bias, and are not trained. Before use, rows are rounded
to the nearest value in the activations' dtype, as in a merged model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy, ends_in, tied_modules
from lorafold.core.attach import Adapted
from lorafold.core.delta import Delta
from lorafold.core.layer import Layer, WeightAndBias, add, bare
from lorafold.core.targets import no_match
from lorafold.errors import LorafoldError, join_problems
from lorafold.layers import is_linear, layer_class, layer_of


class TokenRows(Delta):
    """Abstract: the rows (k, d), fp32, for the ids (k,) in the given order. They are parameters of
    this delta or of its twin.
    """

    setting_names = ("ids",)
    order: Tensor  # (k,), the permutation that sorts the ids
    ascending: Tensor  # (k,), the sorted ids

    def __init__(self, ids: Sequence[int], rows: Tensor | TokenRows) -> None:
        super().__init__()
        self.ids = tuple(ids)
        # in a tuple, so that it does not become a submodule: only one delta may own the rows
        self._owner = (rows,) if isinstance(rows, TokenRows) else ()
        if isinstance(rows, Tensor):
            self.rows = nn.Parameter(rows.detach().to(torch.float32, copy=True))
        where = self.owner.rows.device
        order = torch.tensor(
            sorted(range(len(ids)), key=self.ids.__getitem__),
            device="cpu" if where.type == "meta" else where,
        )
        self.register_buffer("order", order, persistent=False)
        self.register_buffer(
            "ascending", torch.tensor(self.ids, device=order.device)[order], persistent=False
        )

    @property
    def owner(self) -> TokenRows:
        """The delta whose parameters include the rows."""
        return self._owner[0] if self._owner else self

    @property
    def twin(self) -> Delta | None:
        return self._owner[0] if self._owner else None

    def borrowed(self) -> Iterable[nn.Parameter]:
        return self._owner[0].parameters() if self._owner else ()

    def values_at(self) -> Sequence[int]:
        return self.ids

    def sorted_rows(self, device: torch.device) -> Tensor:  # (k, d)
        """The rows in ascending order of their ids."""
        return self.owner.rows.to(device)[self.order.to(device)]

    def num_new(self, size: int) -> int:
        """The number of ids beyond a vocabulary of `size` tokens."""
        missing = sum(i >= size for i in self.ids)
        if missing and (wrong := gap_message(self.ids, size)):
            raise LorafoldError(wrong)
        return missing

    def with_rows(self, w: Tensor) -> Tensor:  # (V, d) -> (V + m, d)
        """A matrix with the rows at their ids, in the wider of the two dtypes."""
        rows = self.sorted_rows(w.device)
        dtype, old = torch.promote_types(w.dtype, rows.dtype), len(rows) - self.num_new(len(w))
        w = torch.cat([w.to(dtype), rows[old:].to(dtype)])
        return w.index_copy(0, self.ascending[:old].to(w.device), rows[:old].to(dtype))

    @abstractmethod
    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias: ...


class EmbeddingRows(TokenRows):
    """Token rows of an embedding, whose W is (d, V)."""

    def forward(self, layer: Layer, ids: Tensor, onto: Tensor | None = None) -> Tensor:
        ascending = self.ascending.to(ids.dtype)
        at = torch.searchsorted(ascending, ids).clamp_max(len(self.ids) - 1)
        trained = ascending[at] == ids
        y = layer(torch.where(trained, 0, ids), onto=onto)
        rows = layer.op(at, self.sorted_rows(y.device).to(y.dtype).t())
        return torch.where(trained[..., None], add(rows, onto).to(y.dtype), y)

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        return self.with_rows(w.t()).t(), b


class HeadRows(TokenRows):
    """Token rows of an LM head, whose W is (V, d)."""

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        z = layer(x)
        old = len(self.ids) - self.num_new(z.shape[-1])
        logits = layer.op(x, self.sorted_rows(x.device))
        if layer.module._parameters.get("bias") is not None:
            b = layer.dense()[1]
            assert b is not None
            new = b.mean().expand(len(self.ids) - old)
            logits = logits + torch.cat([b[self.ascending[:old]], new])
        logits = logits.to(z.dtype)
        if old < len(self.ids):
            z = torch.cat([z, logits[..., old:]], -1)
        if old:
            z = z.index_copy(-1, self.ascending[:old], logits[..., :old])
        return add(z, onto).to(z.dtype)

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        missing = self.num_new(len(w))
        if b is not None and missing:
            b = torch.cat([b, b.mean().expand(missing)])
        return self.with_rows(w), b


@dataclass(frozen=True)
class TrainableTokens:
    """The tokens whose rows are trained: `ids` for the embedding and the head, or ids by module
    name.

    `fresh` ids start as the mean although the base has rows for them. Many embeddings have more
    rows than the vocabulary has tokens, and the additional rows are untrained.
    """

    ids: Sequence[int] | Mapping[str, Sequence[int]] = ()
    fresh: frozenset[int] = frozenset()

    @torch.no_grad()
    def deltas(self, model: nn.Module, active: Sequence[str]) -> dict[str, TokenRows]:
        """The deltas by module path, to be attached on top of the adapters in `active`."""
        by_path, problems = self._by_path(model)
        deltas: dict[str, TokenRows] = {}
        for path, ids in by_path.items():
            module = model.get_submodule(path)
            of_embedding = _is_embedding(module)
            if not (is_linear(module) or of_embedding):
                problems.append(
                    f"{path}: found {type(module).__name__}, which has no rows for tokens; expected"
                    " an embedding or the LM head"
                )
                continue
            layer = module.layer(*active) if isinstance(module, Adapted) else layer_of(module)
            w = layer.dense()[0].detach()
            w = w.t() if layer.takes_ids else w  # (V, d)
            if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
                problems.append(f"{path}: tokens: found {list(ids)}, expected distinct ids >= 0")
            elif wrong := gap_message(ids, len(w)):
                problems.append(f"{path}: {wrong}")
            else:
                shared = tied_modules(model, module)
                tied = (
                    d.owner
                    for p, d in deltas.items()
                    if p in shared and isinstance(d, EmbeddingRows) and by_path[p] == ids
                )
                rows = next(tied, None) or self._initial_rows(w, ids)
                deltas[path] = (EmbeddingRows if of_embedding else HeadRows)(ids, rows)
        if problems := problems or self._vocabulary_mismatch(model, deltas):
            raise LorafoldError(join_problems(problems))
        return deltas

    def _by_path(self, model: Any) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """The ids by module path, and error messages. Modules tied to an embedding come after it,
        and have its ids unless the user gave them others.
        """
        problems = []
        if isinstance(self.ids, Mapping):
            paths = [path for path, _ in Anatomy.of(model).modules]
            ids_by_path: dict[str, tuple[int, ...]] = {}
            for name, ids in self.ids.items():
                hits = [p for p in paths if ends_in(p, name)]
                problems += [] if hits else [no_match(name, model, is_linear)]
                ids_by_path |= dict.fromkeys(hits, tuple(ids))
        else:
            ids_by_path = dict.fromkeys(Anatomy.of(model).vocabulary_ends, tuple(self.ids))
            if not ids_by_path:
                problems.append(
                    f"{type(model).__name__} does not define its embedding module; pass the"
                    " ids as a dict by module name"
                )
        by_path: dict[str, tuple[int, ...]] = {}
        for path in sorted(ids_by_path, key=lambda p: not _is_embedding(model.get_submodule(p))):
            by_path.setdefault(path, ids_by_path[path])
            if _is_embedding(module := model.get_submodule(path)):
                for other in tied_modules(model, module):
                    by_path.setdefault(other, ids_by_path.get(other, ids_by_path[path]))
        return by_path, problems

    @staticmethod
    def _vocabulary_mismatch(model: nn.Module, new_deltas: Mapping[str, TokenRows]) -> list[str]:
        """A list with an error message if embedding and head would have different numbers of
        tokens, else an empty list.
        """
        ends = {path: bare(model.get_submodule(path)) for path in Anatomy.of(model).vocabulary_ends}
        rows = {path: len(end.weight) for path, end in ends.items()}  # type: ignore[arg-type]
        sizes = dict(rows)
        for path in rows:
            deltas = [*token_rows_on(model.get_submodule(path))]
            deltas += [new_deltas[path]] if path in new_deltas else []
            sizes[path] = max([rows[path], *(i + 1 for delta in deltas for i in delta.ids)])
        if sizes == rows or len(set(sizes.values())) == 1:
            return []
        have = ", ".join(f"{path} would have {n} tokens" for path, n in sizes.items())
        return [
            f"new tokens need rows in the embedding and in the head: {have}; give the ids for both,"
            " or resize the base first"
        ]

    def _initial_rows(self, w: Tensor, ids: Sequence[int]) -> Tensor:  # (V, d) -> (k, d)
        new = [i >= len(w) or i in self.fresh for i in ids]
        mean: Any = w.mean(0, dtype=torch.float32) if any(new) else None
        return torch.stack([mean if n else w[i].float() for n, i in zip(new, ids, strict=True)])


def gap_message(ids: Sequence[int], size: int) -> str | None:
    """An error message if new ids do not continue a vocabulary of `size` tokens without gaps."""
    num_new = sorted(i for i in ids if i >= size)
    if not num_new or num_new[-1] == size + len(num_new) - 1:
        return None
    return (
        f"tokens {num_new} leave a gap: the base's last token is {size - 1}; number new tokens from"
        f" {size} on without gaps"
    )


def token_rows_on(module: nn.Module) -> Iterator[TokenRows]:
    """The `TokenRows` among the deltas attached to a module."""
    deltas: Any = module.deltas.values() if isinstance(module, Adapted) else ()
    return (part for delta in deltas for part in delta.parts() if isinstance(part, TokenRows))


def _is_embedding(module: nn.Module) -> bool:
    return layer_class(module).takes_ids
