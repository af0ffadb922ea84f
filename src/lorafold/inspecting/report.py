"""The report of `lorafold inspect`: a table for the terminal, and an HTML page with the advice and
the figures behind it. Both show only figures that the JSON has too.

The tables of the page: what experts and heads changed, and the tokens and the user's vectors
that directions read and write.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafold.files.html_page import rendered, write_page
from lorafold.files.terminal import NOTHING, mean_of, shown, spread, text_table
from lorafold.inspecting import plots
from lorafold.inspecting.subspaces import by_kind, kind_of
from lorafold.inspecting.updates import largest, of_experts, site_of

Figures = Mapping[str, Any]
MAPS = {  # figure: heading, format
    "effective_rank_95": ("Effective rank: directions for 95%", ".0f"),
    "relative_norm": ("Size: |dW| over |W0|", ".1%"),
    "amplification": ("Amplification: |dW| over |Uᵀ W0 V|", ".2f"),
    "intruders": ("Intruder dimensions in the top 10", ".0f"),
}


def table(found: Figures) -> str:
    """The means of each kind of module, for the terminal; those of experts with the lowest and the
    highest value.
    """
    lines = list[list[str]]()
    for kind, paths in by_kind(list(found["sites"])).items():
        sites = [found["sites"][path] for path in paths]
        ranged = site_of(paths[0]) != paths[0]

        def mean(
            name: str, form: str, sites: Sequence[Figures] = sites, ranged: bool = ranged
        ) -> str:
            return spread([site[name] for site in sites], form, ranged)

        ranks = ", ".join(
            mean(f"effective_rank_{share}", ".1f", ranged=False) for share in (90, 95, 99)
        )
        lines.append(
            [
                kind,
                mean("rank", ".3g", ranged=False),
                ranks,
                mean("stable_rank", ".2f"),
                mean("relative_norm", ".2%"),
                mean("amplification", ".2f"),
            ]
        )
    head = ("module", "rank", "for 90, 95, 99%", "stable", "|dW|/|W0|", "amplified")
    return text_table(head, lines)


def page(found: Figures, path: str | Path) -> None:
    """Write all figures as one HTML file that needs no other."""
    write_page(f"Inside {Path(found['adapter']).name}", sections(found), path)


def sections(found: Figures) -> str:
    """The content of the page, as HTML: plots, and what its template shows of the figures."""
    whole, sites = found["whole"], found["sites"]
    optional = ("paths", "against", "experts", "heads_left_out", "experts_left_out")
    return rendered(
        "inspecting/inspect.html",
        found={**dict.fromkeys(optional, ""), **found},
        figures={
            "sites": f"{whole['sites']}",
            "nominal rank": shown(whole["rank"], ""),
            "mean rank for 90%": f"{whole['effective_rank_90']:.1f}",
            "for 95%": f"{whole['effective_rank_95']:.1f}",
            "for 99%": f"{whole['effective_rank_99']:.1f}",
            "mean stable rank": f"{whole['stable_rank']:.2f}",
            "mean entropy rank": f"{whole['entropy_rank']:.1f}",
            "|dW| over |W0|": shown(whole["relative_norm"], ".2%"),
            "median amplification": shown(whole["amplification"], ".2f"),
        },
        maps=[
            layer_map(sites, name, heading, form)
            for name, (heading, form) in MAPS.items()
            if any(name in site for site in sites.values())
        ],
        spectra=spectra(sites),
        paths=paths(found["paths"]) if "paths" in found else (),
        against=against,
        positions=positions(sites),
        alike=[
            plots.heat(f"{kind}, {of['side']}", alike(of["phi"]), of["phi"], "block", "block", 0)
            for kind, of in found["layers"].items()
        ],
        heads=heads(sites),
        experts=experts(sites, found["experts"]) if "experts" in found else (),
        tokens=tokens(sites),
        shares=[
            (path, verb, ", ".join(f"{name} {share:.1%}" for name, share in top.items()))
            for path, site in sites.items()
            for verb in ("reads", "writes")
            if (top := site.get(f"{verb}_shares"))
        ],
    )


def layer_map(sites: Mapping[str, Figures], name: str, heading: str, form: str) -> dict[str, Any]:
    """One figure as a heat map, with blocks down and kinds of module across. Of experts it shows
    the mean.

    Args:
        name: The name of the figure.
        heading: That of the map.
        form: The figure's format.
    """
    kinds = by_kind(list(sites))
    every = defaultdict[tuple[str, int | None], list[float | None]](list)
    for path, site in sites.items():
        every[kind_of(path)].append(site.get(name))
    values = {at: mean_of(found) for at, found in every.items()}
    most = max((value for value in values.values() if value is not None), default=0) or 1
    layers = sorted({layer for _, layer in values}, key=lambda layer: (layer is None, layer))

    def cell(value: float | None) -> tuple[str, str]:
        return ("", "") if value is None else (f"{value:{form}}", plots.shade(value / most))

    lines = [(layer, [cell(values.get((kind, layer))) for kind in kinds]) for layer in layers]
    return {"heading": heading, "kinds": kinds, "lines": lines}


def spectra(sites: Mapping[str, Figures]) -> list[str]:
    """A plot of singular values for each kind of module; of experts those of the largest update."""
    depth = max((kind_of(path)[1] or 0 for path in sites), default=0)
    kinds = {
        kind: {p: s for p in paths if (s := sites[p]["singular_values"])}
        for kind, paths in by_kind(largest(sites)).items()
    }
    return [plots.spectra(kind, lines, depth) for kind, lines in kinds.items() if lines]


def paths(found: Figures) -> Iterator[str]:
    """The plots of the loss along lines in weight space."""
    losses = dict(found["scaling"])
    best = min(losses, key=lambda t: losses[t])
    said = (
        f"{losses[0.0]:.4g} for the base, {losses[1.0]:.4g} for the adapter; lowest at t ="
        f" {best:g}, {losses[best]:.4g}."
    )
    ends = {0.0: "base", 1.0: "adapter"}
    yield plots.line("base + t dW", said, found["scaling"], "t", ends)
    if "between" in found:
        said = f"The barrier between them is {found['barrier']:.4f} nats a token."
        ends = {0.0: "this", 1.0: "the other"}
        yield plots.line("from this adapter to the other", said, found["between"], "t", ends)


def against(found: Figures, name: str) -> Iterator[str]:
    """The plots of one side's phi beside a second adapter, by its name in the figures."""
    for kind, grids in found["kinds"].items():
        phi = grids[name]
        said = f"{phi[0][0]:.2f} for the strongest of both, {phi[-1][-1]:.2f} for all."
        yield plots.heat(kind, said, phi, "i, this adapter", "j, the other")


def positions(sites: Mapping[str, Figures]) -> list[str]:
    """The plots of the update in the spectrum of the base."""
    measured = {path: site for path, site in sites.items() if "position_read" in site}
    drawn = []
    for kind, of_kind in by_kind(list(measured)).items():
        read, written = (
            [*map(fmean, zip(*(sites[p][f"position_{side}"] for p in of_kind), strict=True))]
            for side in ("read", "written")
        )
        drawn.append(plots.position(kind, read, written, sites[of_kind[0]]["shape"]))
    return drawn


def alike(phi: Sequence[Sequence[float]]) -> str:
    """Which two blocks have the most in common, in a sentence."""
    pairs = {(i, j): phi[i][j] for i in range(len(phi)) for j in range(i)}
    if not pairs:
        return "There is one block."
    i, j = max(pairs, key=lambda pair: pairs[pair])
    mean = fmean(pairs.values())
    return f"Blocks {j} and {i} have the most in common, {phi[i][j]:.2f}; the mean is {mean:.2f}."


def heads(sites: Mapping[str, Figures]) -> list[str]:
    """The plots of attention heads."""
    known = {path: site["heads"] for path, site in sites.items() if "heads" in site}
    drawn = []
    for kind, paths in by_kind(list(known)).items():
        most = max(max(known[path]) for path in paths) or 1
        shares = [[share / most for share in known[path]] for path in paths]
        block, head = max(
            ((p, h) for p in range(len(paths)) for h in range(len(shares[p]))),
            key=lambda at: shares[at[0]][at[1]],
        )
        even = 1 / len(known[paths[0]])
        said = (
            f"Head {head} of block {kind_of(paths[block])[1] or 0} has the largest share,"
            f" {most:.0%}; evenly it would be {even:.0%}."
        )
        drawn.append(plots.heat(kind, said, shares, "block", "head", 0))
    return drawn


def experts(sites: Mapping[str, Figures], overlaps: Figures) -> Iterator[tuple[str, ...]]:
    """A line for each site of experts.

    Args:
        sites: The figures of each matrix.
        overlaps: phi of their top directions by site, where one side is in the residual stream.
    """
    for path, of in of_experts(sites).items():
        phi = overlaps.get(path)
        yield (
            path,
            f"{sum(site['numerical_rank'] > 0 for site in of)} of {len(of)}",
            spread((site["relative_norm"] for site in of), ".2%", True),
            spread((site["effective_rank_95"] for site in of), ".1f", True),
            spread((site["stable_rank"] for site in of), ".2f", True),
            f"{phi['phi']:.2f} ({phi['phi_lowest']:.2f} to {phi['phi_highest']:.2f})"
            if phi
            else NOTHING,
        )


def tokens(sites: Mapping[str, Figures]) -> Iterator[tuple[str, str, str, list[Any]]]:
    """The tables of the tokens and vectors nearest to the strongest directions: the kind of module,
    the side, what is near, and the lines.
    """
    for sign in ("reads", "writes"):
        for verb, names in ((sign, "tokens"), (f"{sign}_vectors", "your vectors")):
            kinds = by_kind([path for path, site in sites.items() if site.get(verb)])
            for kind, of_kind in kinds.items():
                lines = [
                    line(path, i, sites[path], ends)
                    for path in of_kind
                    for i, ends in enumerate(sites[path][verb])
                ]
                yield kind, sign, names, lines


def line(path: str, i: int, site: Figures, ends: Figures) -> tuple[str, str, list[Any]]:
    """One direction as a line of the table: the number of the matrix's block, and that of its
    expert; which direction it is; the names and cosines at both ends.

    Args:
        i: The index of the direction.
        ends: The names and cosines at both ends of the direction.
    """
    block, expert = kind_of(path)[1], path.removeprefix(site_of(path)).strip("[]")
    place = ("" if block is None else str(block)) + (f", expert {expert}" if expert else "")
    share = site["singular_values"][i] ** 2 / sum(s**2 for s in site["singular_values"])
    both = [
        [(repr(e["name"])[1:-1], f"{e['cosine']:+.2f}") for e in ends[side]]
        for side in ("positive", "negative")
    ]
    return place, f"{i + 1}: {share:.0%} of the energy", both
