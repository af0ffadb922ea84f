"""The best adapter of a rank: of another adapter, or of the difference between two models.

    dW ~ B A,   B = U sqrt(S) (out, r), A = sqrt(S) V^T (r, in),   U S V^T the r largest singular
                                                                   parts of dW
    error       |dW - B A| / |dW|, the least that any B A has (Eckart and Young 1936); |.| the
                Frobenius norm

What comes out is plain LoRA whose scale is 1 (alpha = r at every site), whatever the method was.
Trained biases, modules to save and token rows are carried over as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.adapter import Adapter, attach, load
from lorafold.bases import is_linear, layer_of
from lorafold.core.combine import Stack
from lorafold.core.delta import put
from lorafold.core.targets import Matches, match
from lorafold.errors import LorafoldError
from lorafold.files.record import read_record
from lorafold.inspecting.spectra import effective_rank
from lorafold.inspecting.updates import sites
from lorafold.methods.lora import LoRA, of_ranks
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.sources import ModelSource
from lorafold.models.tokenizer import has_tokenizer, tokenizer_of
from lorafold.ops.svd import best_of_rank

Factors = tuple[Tensor, Tensor]  # B (out, r), A (r, in); r = 0 for an update of nothing
NAME = "resized"


@dataclass(frozen=True)
class Resized:
    """`sites`: rank and relative error by module path; `error` is that of all together; `left_out`:
    tensors that differ between two models and that an adapter of linears doesn't hold, with the
    relative size of the difference.
    """

    sites: dict[str, dict[str, float]]
    error: float
    out: str
    left_out: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "error": self.error,
            "sites": self.sites,
            "left_out": self.left_out,
            "out": self.out,
        }

    def __str__(self) -> str:
        ranks = [site["rank"] for site in self.sites.values()]
        worst = max(self.sites, key=lambda path: self.sites[path]["error"])
        lines = [
            f"{self.out}: {len(ranks)} sites of rank {min(ranks)} to {max(ranks)}; error"
            f" {self.error:.2%} of the update's norm, at most {self.sites[worst]['error']:.2%} at a"
            f" site ({worst})"
        ]
        if self.left_out:
            largest = sorted(self.left_out, key=lambda name: -self.left_out[name])[:3]
            shown = ", ".join(f"{name} by {self.left_out[name]:.2%}" for name in largest)
            lines.append(
                f"  {len(self.left_out)} other tensors differ too and are not in it, most of all"
                f" {shown}"
            )
        return "\n".join(lines)


class Errors:
    """What truncation loses, site by site."""

    def __init__(self) -> None:
        self.sites: dict[str, dict[str, float]] = {}
        self.lost, self.whole = 0.0, 0.0

    def add(self, path: str, rank: int, lost: float, whole: float) -> None:  # squared norms
        self.lost, self.whole = self.lost + lost, self.whole + whole
        self.sites[path] = {"rank": rank, "error": _root(lost, whole)}

    def result(self, out: str | Path, left_out: Mapping[str, float] | None = None) -> Resized:
        return Resized(self.sites, _root(self.lost, self.whole), str(out), dict(left_out or {}))


def resize(
    source: ModelSource,
    path: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
    allow_other_base: bool = False,
    trust_remote_code: bool = False,
) -> Resized:
    """Write the adapter at a rank, or at each site the least rank that holds a share of the energy.

    LorafoldError unless one is given.
    """
    if (rank is None) == (energy is None):
        raise LorafoldError("resize: expected either a rank or an energy")
    model = mapped_model_of(source, trust_remote_code).model
    adapter = load(model, path, NAME, allow_other_base=allow_other_base)
    factors, errors = dict[str, Factors](), Errors()
    for site in sites(adapter):
        if site.changes_bias:
            raise LorafoldError(
                f"{path}: {type(site.delta).__name__} changes the bias of {site.path} with its"
                " weight; LoRA can't"
            )
        svd = site.parts()
        s = svd.s
        asked = effective_rank(s, energy) if rank is None else rank  # type: ignore[arg-type]
        kept = svd.top(asked)
        root = kept.s.sqrt()
        factors[site.path] = kept.u * root, root[:, None] * kept.v.t()
        errors.add(site.path, len(kept.s), _squares(s[len(kept.s) :]), _squares(s))
    found = errors.result(out)
    history = {k: v for k, v in read_record(path).items() if k not in ("base", "lorafold")}
    record = {
        **history,
        "resized": {"from": str(path), "rank": rank, "energy": energy, "error": found.error},
    }
    tokenizer = tokenizer_of(source, [path], trust_remote_code) if has_tokenizer(path) else None
    as_lora(adapter, factors).save(out, overwrite=overwrite, record=record, tokenizer=tokenizer)
    return found


def extract(
    base: ModelSource,
    tuned: ModelSource,
    out: str | Path,
    *,
    rank: int,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Resized:
    """Write an adapter of a rank from a fine-tuned model and its base: every linear of the blocks,
    a tensor at a time.

    LorafoldError where the two differ in their modules, or not at all in those.
    """
    one, other = mapped_model_of(base, trust_remote_code), mapped_model_of(tuned, trust_remote_code)
    paths = match(one.model, LoRA.targets, is_linear).paths
    theirs = dict(other.model.named_parameters(remove_duplicate=False))
    own = dict(one.model.named_parameters(remove_duplicate=False))
    if problems := [
        f"{name}: shape {_shape(theirs.get(name))}, expected {list(p.shape)}"
        for name, p in own.items()
        if _shape(theirs.get(name)) != list(p.shape)
    ]:
        raise LorafoldError(f"{tuned.name} is no fine-tuned {base.name}: {'; '.join(problems)}")
    factors, errors = dict[str, Factors](), Errors()
    for path in paths:
        before, after = (
            layer_of(mapped.model.get_submodule(path)).dense()[0].float() for mapped in (one, other)
        )
        dw = after - before
        if whole := _squares(dw):
            b, a = best_of_rank(dw, min(rank, *dw.shape))
            factors[path] = b, a
            errors.add(path, len(a), _squares(dw.addmm_(b, a, alpha=-1)), whole)
    if not factors:
        raise LorafoldError(
            f"{tuned.name}: its linears are those of {base.name}, so there is nothing to extract"
        )
    held = {f"{path}.weight" for path in paths}
    left_out = {
        name: change
        for name, p in own.items()
        if name not in held and (change := _relative(theirs[name], p))
    }
    adapter = attach(one.model, LoRA(rank=1), Matches({path: (path,) for path in factors}), NAME)
    found = errors.result(out, left_out)
    record = {
        "extracted": {"from": tuned.name, "rank": rank, "error": found.error, "left_out": left_out}
    }
    as_lora(adapter, factors).save(out, overwrite=overwrite, record=record)
    return found


@torch.no_grad()
def as_lora(adapter: Adapter, factors: Mapping[str, Factors]) -> Adapter:
    """The adapter with LoRA in its method's place; all else that it laid stays."""
    spec = of_ranks({path: max(len(a), 1) for path, (_, a) in factors.items()})
    modules = adapter.sites
    for path, (b, a) in factors.items():
        module = modules[path]
        delta = spec.at(path).build(layer_of(module))
        if len(a):
            put(delta, "B", b)
            put(delta, "A", a)
        _, *others = module.deltas[adapter.name].parts()  # type: ignore[operator]
        module.deltas[adapter.name] = Stack([delta, *others]) if others else delta
    return Adapter(
        adapter.model, adapter.name, spec, adapter.matches, adapter.bias, adapter.modules_to_save
    )


def _shape(p: Tensor | None) -> list[int] | None:
    return None if p is None else list(p.shape)


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).square())


def _relative(tuned: Tensor, base: Tensor) -> float:
    return _root(_squares(tuned.float() - base.float()), _squares(base))


def _root(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else math.sqrt(part)
