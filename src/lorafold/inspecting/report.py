"""The report of `lorafold lab inspect`: a table for the terminal and an HTML page. The JSON has
all figures that they show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafold.core.anatomy import grouped
from lorafold.files.html_page import render_page, write_page
from lorafold.files.plots import mix_colours
from lorafold.files.terminal import MISSING, mean_of, mean_range, text_table, values_of
from lorafold.inspecting import page_plots as plots
from lorafold.inspecting.result import (
    ExpertOverlap,
    Grid,
    Inspection,
    KindOverlap,
    LossPaths,
    NearestNeighbours,
    Sites,
)
from lorafold.inspecting.subspaces import by_kind, kind_and_block
from lorafold.inspecting.updates import group_experts, largest_of, module_path

MIN_PHI_SCALE = 0.1  # the smallest maximum of a colour scale for phi
HEAT_MAPS = {  # heading: (field of MatrixFigures, format)
    "Effective rank: directions for 95% of the energy": ("effective_rank_95", ".0f"),
    "Size: |dW| over |W0|": ("base.relative_norm", ".1%"),
    "Amplification: |dW| over |Uᵀ W0 V|": ("base.amplification", ".2f"),
    "Intruder dimensions in the top 10": ("intruders", ".0f"),
}
RANGES = {  # heading: (field, format); for experts, the range is shown too
    "stable": ("stable_rank", ".2f"),
    "|dW|/|W0|": ("base.relative_norm", ".2%"),
    "amplified": ("base.amplification", ".2f"),
}


def table(inspection: Inspection) -> str:
    lines = []
    for kind, paths in by_kind(inspection.sites).items():
        sites = [inspection.sites[path] for path in paths]
        ranks = (fmean(values_of(sites, f"effective_rank_{share}")) for share in (90, 95, 99))
        ranged = module_path(paths[0]) != paths[0]
        means = (mean_range(values_of(sites, name), fmt, ranged) for name, fmt in RANGES.values())
        shares = ", ".join(f"{rank:.1f}" for rank in ranks)
        lines.append([kind, f"{fmean(m.rank for m in sites):.3g}", shares, *means])
    return text_table(("module", "rank", "for 90, 95, 99%", *RANGES), lines)


def page(inspection: Inspection, path: str | Path) -> None:
    write_page(f"Inside {Path(inspection.adapter).name}", sections(inspection), path)


def sections(inspection: Inspection) -> str:
    sites = inspection.sites
    return render_page(
        "inspecting/inspect.html",
        inspection=inspection,
        maps=[
            layer_map(sites, heading, name, form)
            for heading, (name, form) in HEAT_MAPS.items()
            if any(value is not None for value in values_of(sites.values(), name))
        ],
        spectra=spectra(sites),
        paths=() if inspection.paths is None else paths(inspection.paths),
        against=against,
        positions=[*positions(sites)],
        alike=[
            plots.heat_map(f"{kind}, {of.side}", overlap_caption(of.phi), *off_diagonal(of.phi))
            for kind, of in inspection.layers.items()
        ],
        heads=[*heads(sites)],
        experts=() if inspection.experts is None else experts(sites, inspection.experts),
        tokens=tokens(sites),
    )


def layer_map(sites: Sites, heading: str, name: str, fmt: str) -> dict[str, Any]:
    kinds = by_kind(sites)
    figures = zip(map(kind_and_block, sites), values_of(sites.values(), name), strict=True)
    values = {at: mean_of(of) for at, of in grouped(figures).items()}
    largest = max((value for value in values.values() if value is not None), default=0) or 1
    layers = sorted({layer for _, layer in values}, key=lambda layer: (layer is None, layer))

    def cell(value: float | None) -> tuple[str, str]:
        if value is None:
            return "", ""
        share = min(max(value / largest, 0.0), 1.0)
        return f"{value:{fmt}}", mix_colours("raised", "heat", 100 * share)

    lines = [(layer, [cell(values.get((kind, layer))) for kind in kinds]) for layer in layers]
    return {"heading": heading, "kinds": kinds, "lines": lines}


def spectra(sites: Sites) -> Iterator[str]:
    depth = max((kind_and_block(path)[1] or 0 for path in sites), default=0)
    for kind, paths in by_kind(largest_of(sites)).items():
        if lines := {path: s for path in paths if (s := sites[path].singular_values)}:
            yield plots.spectra(kind, lines, depth)


def paths(measured: LossPaths) -> Iterator[str]:
    losses = dict(measured.scaling)
    best = min(losses, key=lambda t: losses[t])
    caption = (
        f"{losses[0.0]:.4g} for the base, {losses[1.0]:.4g} for the adapter; lowest at t ="
        f" {best:g}, {losses[best]:.4g}."
    )
    yield plots.line("base + t dW", caption, measured.scaling, "t", {0.0: "base", 1.0: "adapter"})
    if measured.between is not None:
        caption = f"The barrier between the adapters is {measured.barrier:.4f} nats per token."
        ends = {0.0: "this adapter", 1.0: "the other"}
        yield plots.line("from this adapter to the other", caption, measured.between, "t", ends)


def against(kinds: Mapping[str, KindOverlap], name: str) -> Iterator[str]:
    for kind, grids in kinds.items():
        phi = getattr(grids, name)
        caption = f"{phi[0][0]:.2f} for both strongest directions, {phi[-1][-1]:.2f} for all."
        yield plots.heat_map(kind, caption, phi, "i, this adapter", "j, the other")


def positions(sites: Sites) -> Iterator[str]:
    known = {path: site.positions for path, site in sites.items() if site.positions}
    for kind, paths in by_kind(known).items():
        read, written = (
            [*map(fmean, zip(*(getattr(known[path], name) for path in paths), strict=True))]
            for name in ("position_read", "position_written")
        )
        yield plots.position(kind, read, written, sites[paths[0]].shape)


def off_diagonal(phi: Grid) -> tuple[Grid, str, str, int, float]:
    """Arguments of a heat map of overlaps between blocks, without the diagonal, where phi is 1."""
    grid = [[nan if i == j else phi[i][j] for j in range(len(phi))] for i in range(len(phi))]
    largest = max((x for line in grid for x in line if x == x), default=1.0)
    return grid, "block", "block", 0, max(MIN_PHI_SCALE, ceil(10 * largest) / 10)


def overlap_caption(phi: Grid) -> str:
    pairs = {(i, j): phi[i][j] for i in range(len(phi)) for j in range(i)}
    if not pairs:
        return "There is only one block."
    i, j = max(pairs, key=lambda pair: pairs[pair])
    mean = fmean(pairs.values())
    return f"Blocks {j} and {i} have the largest overlap, {phi[i][j]:.2f}; the mean is {mean:.2f}."


def heads(sites: Sites) -> Iterator[str]:
    known = {path: site.heads for path, site in sites.items() if site.heads is not None}
    for kind, paths in by_kind(known).items():
        largest = max(max(known[path]) for path in paths) or 1
        shares = [[share / largest for share in known[path]] for path in paths]
        block, head = max(
            ((p, h) for p in range(len(paths)) for h in range(len(shares[p]))),
            key=lambda at: shares[at[0]][at[1]],
        )
        even = 1 / len(known[paths[0]])
        caption = (
            f"Head {head} of block {kind_and_block(paths[block])[1] or 0} has the largest share,"
            f" {largest:.0%}; an even share would be {even:.0%}."
        )
        yield plots.heat_map(kind, caption, shares, "block", "head", 0)


def experts(sites: Sites, overlaps: Mapping[str, ExpertOverlap]) -> Iterator[tuple[str, ...]]:
    for path, of in group_experts(sites).items():
        phi = overlaps.get(path)
        yield (
            path,
            f"{sum(site.numerical_rank > 0 for site in of)} of {len(of)}",
            mean_range(values_of(of, "base.relative_norm"), ".2%", True),
            mean_range(values_of(of, "effective_rank_95"), ".1f", True),
            mean_range(values_of(of, "stable_rank"), ".2f", True),
            f"{phi.phi:.2f} ({phi.phi_lowest:.2f} to {phi.phi_highest:.2f})" if phi else MISSING,
        )


def tokens(sites: Sites) -> Iterator[tuple[str, str, str, list[Any]]]:
    """(kind of module, side, "tokens" or "your vectors", rows) of each table of neighbours."""
    for sign in ("reads", "writes"):
        for name, near in ((sign, "tokens"), (f"{sign}_vectors", "your vectors")):
            tables = {path: table for path, of in sites.items() if (table := getattr(of, name))}
            for kind, paths in by_kind(tables).items():
                lines = [
                    token_row(path, i, sites[path].singular_values, ends)
                    for path in paths
                    for i, ends in enumerate(tables[path])
                ]
                yield kind, sign, near, lines


def token_row(
    path: str, i: int, s: Sequence[float], ends: NearestNeighbours
) -> tuple[str, str, NearestNeighbours]:
    block, expert = kind_and_block(path)[1], path.removeprefix(module_path(path)).strip("[]")
    location = ("" if block is None else str(block)) + (f", expert {expert}" if expert else "")
    share = s[i] ** 2 / sum(value**2 for value in s)
    return location, f"{i + 1}: {share:.0%} of the energy", ends
