"""The best LoRA of a given rank for an adapter's update, or for the difference of two models.

    dW ~ B A,   B = U sqrt(S) (out, r), A = sqrt(S) V^T (r, in), where U S V^T are the r largest
                singular values of dW with their vectors
    error       |dW - B A| / |dW|, the smallest for any B A of rank r (Eckart and Young 1936); |.|
                is the Frobenius norm

The result is plain LoRA with scale 1 (alpha = r for every module). Biases, saved modules and token
embeddings are copied unchanged. Each expert's matrix is factorized separately.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.adapter import Adapter, load
from lorafold.core.combine import Stack
from lorafold.core.delta import Additive
from lorafold.core.expert_matrices import module_at, parameter_path
from lorafold.core.targets import match
from lorafold.errors import LorafoldError, join_problems
from lorafold.files.atomic import check_out
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.paths import check_not_replaced
from lorafold.files.record import BASE, OTHER_BASE, TRAINED_ON
from lorafold.files.templates import render_text
from lorafold.inspecting.spectra import effective_rank
from lorafold.inspecting.updates import (
    Factors,
    SiteFactors,
    add_lora,
    load_below,
    matrix_names,
    modules_of,
    put_factors,
    stacked,
    unstacked,
)
from lorafold.layers import is_linear, layer_of
from lorafold.methods.lora import LoRA, lora_with_ranks
from lorafold.ops.svd import best_of_rank
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.peft.provenance import BASE_IDENTITY
from lorafold.resolve import Base
from lorafold.resolve.base import check_language_model

NAME = "resized"
RankErrors = dict[str, tuple[int, float, float]]  # rank, squared norms of error and update


@dataclass(frozen=True)
class Resized(ShownInNotebooks):
    """The written adapter: `sites` has the rank and relative error of each matrix, `left_out` the
    relative change of each tensor that the adapter does not contain, `losses` the loss before and
    after.
    """

    sites: dict[str, dict[str, float]]
    error: float
    out: str
    left_out: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        content = super().as_json()
        return content | content.pop("losses")

    def __str__(self) -> str:
        worst = max(self.sites, key=lambda path: self.sites[path]["error"])
        return render_text("inspecting/resized.jinja", resized=self, worst=worst)


def build_result(cuts: RankErrors, out: str | Path, left_out: Mapping[str, float]) -> Resized:
    sites = {
        path: {"rank": rank, "error": _root(lost, total)}
        for path, (rank, lost, total) in cuts.items()
    }
    _, lost, total = map(sum, zip(*cuts.values(), strict=True))
    return Resized(sites, _root(lost, total), str(out), dict(left_out))


def check_rank_or_energy(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        problem = "neither" if rank is None else "both"
        raise LorafoldError(f"--rank, --energy: found {problem}, expected exactly one of them")
    if energy is not None and not 0 < energy <= 1:
        raise LorafoldError(f"--energy: found {energy:g}, expected a share above 0 and at most 1")


def resize(
    base: Base,
    stack: Sequence[SavedAdapter],
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
) -> Resized:
    check_rank_or_energy(rank, energy)
    check_out(out, overwrite)
    check_not_replaced(out, [one.path for one in stack])
    check_language_model(base, stack)
    saved = stack[-1]
    model, allow_other_base = base.mapped().model, base.allow_other_base
    base_adapters = load_below(model, base, stack)
    adapter = load(model, saved, NAME, allow_other_base=allow_other_base)
    factors, cuts = {}, RankErrors()
    for site in modules_of(adapter, base_adapters):
        if site.changes_bias:
            raise LorafoldError(
                f"{saved}: the adapter changes the bias of {site.path} together with its weight, so"
                " it can't be converted to LoRA"
            )
        parts = []
        for name, svd in site.parts():
            s = svd.s
            r = effective_rank(s, energy) if rank is None else rank  # type: ignore[arg-type]
            parts.append(svd.factors(r))
            cuts[name] = len(s[:r]), _squares(s[r:]), _squares(s)
        factors[site.path] = stacked(parts, site.layer.matrices)
    result = build_result(cuts, out, {})
    record = {TRAINED_ON: None, **saved.record}
    record = {key: value for key, value in record.items() if key not in (BASE, "lorafold")}
    if adapter.other_base:
        # an additive update does not depend on the base
        is_additive = all(isinstance(delta, Additive) for delta in adapter.own_deltas.values())
        other_base = {OTHER_BASE: adapter.other_base, BASE_IDENTITY: ""}
        record |= {BASE: saved.own_base.fingerprint} if is_additive else other_base
    record["resized"] = {"from": str(saved), "rank": rank, "energy": energy, "error": result.error}
    tokenizer = base.tokenizer([saved]) if saved.own_tokenizer else None
    as_lora(adapter, factors).save(out, overwrite=overwrite, record=record, tokenizer=tokenizer)
    return result


def extract(
    base: Base, tuned: Base, out: str | Path, *, rank: int, overwrite: bool = False
) -> Resized:
    check_out(out, overwrite)
    check_not_replaced(out, [base.source.path, tuned.source.path])
    models = base.mapped().model, tuned.mapped().model
    paths = match(models[0], LoRA.targets, is_linear).paths
    before, after = (dict(model.named_parameters(remove_duplicate=False)) for model in models)
    shapes = {name: list(p.shape) for name, p in after.items()}
    if problems := [
        f"{name}: found {shapes.get(name) or 'none'}, expected {list(p.shape)}"
        for name, p in before.items()
        if shapes.get(name) != list(p.shape)
    ]:
        raise LorafoldError(
            f"{tuned.name}: not a fine-tuned version of {base.name}, because the modules differ:"
            f" {join_problems(problems)}"
        )
    factors, cuts = {}, RankErrors()
    for path in paths:
        layers = [layer_of(module_at(model, path)) for model in models]
        names = matrix_names(path, layers[0].matrices)
        weights = zip(names, *(unstacked(layer.dense()[0]) for layer in layers), strict=True)
        parts = [_difference(cuts, name, w, tuned, rank) for name, w, tuned in weights]
        if any(len(a) for _, a in parts):
            factors[path] = stacked(parts, layers[0].matrices)
    if not factors:
        raise LorafoldError(
            f"{tuned.name}: all linear layers of the blocks are the same as in {base.name}:"
            " nothing to extract"
        )
    extracted = {parameter_path(module_at(models[0], p), p, "weight") for p in paths}
    left_out = {
        name: change
        for name, p in before.items()
        if name not in extracted
        and (change := _root(_squares(after[name].float() - p.float()), _squares(p)))
    }
    result = build_result(cuts, out, left_out)
    about = {"from": tuned.name, "rank": rank, "error": result.error, "left_out": left_out}
    add_lora(models[0], factors, NAME).save(out, overwrite=overwrite, record={"extracted": about})
    return result


def _difference(cuts: RankErrors, name: str, w: Tensor, tuned: Tensor, rank: int) -> Factors:
    """The best factors of tuned - w, (out, r) and (r, in), whose errors are added to `cuts`."""
    dw = tuned.float() - w.float()
    if not (total := _squares(dw)):
        return dw.new_zeros(len(dw), 0), dw.new_zeros(0, dw.shape[1])
    b, a = best_of_rank(dw, min(rank, *dw.shape))
    cuts[name] = len(a), _squares(dw.addmm_(b, a, alpha=-1)), total
    return b, a


@torch.no_grad()
def as_lora(adapter: Adapter, factors: SiteFactors) -> Adapter:
    """Replaces the adapter's method by LoRA with these factors; biases, saved modules and token
    embeddings are kept.
    """
    spec = lora_with_ranks({path: max(a.shape[-2], 1) for path, (_, a) in factors.items()})
    modules = adapter.sites
    for path, (b, a) in factors.items():
        module = modules[path]
        delta = spec.at(path).build(layer_of(module))
        put_factors(delta, (b, a))
        _, *others = module.deltas[adapter.name].parts()  # type: ignore[operator]
        module.deltas[adapter.name] = Stack([delta, *others]) if others else delta
    return Adapter(adapter.model, adapter.name, replace(adapter.chosen, spec=spec), adapter.over)


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).square())


def _root(part: float, total: float) -> float:
    return math.sqrt(part / (total or 1))
