"""The report of `lorafold inspect`: a table for the terminal, and an HTML page with the advice and
the figures behind it. Both show only figures that the JSON has too.

The tables of the page: what experts and heads changed, and the tokens and the user's vectors
that directions read and write.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafold.files.page import cards, document, grid, html_table, notes, section
from lorafold.files.page import table as marked_up
from lorafold.files.terminal import NOTHING, mean_of, shown, spread, text_table
from lorafold.inspecting import plots
from lorafold.inspecting.against import by_kind, kind_of
from lorafold.inspecting.updates import largest, of_experts, site_of

Figures = Mapping[str, Any]


def experts(sites: Mapping[str, Figures], overlaps: Figures) -> Iterator[str]:
    """The section on experts: a line for each site.

    Args:
        sites: The figures of each matrix.
        overlaps: phi of their top directions by site, where one side is in the residual stream.
    """
    yield section(
        "Experts",
        "Means over the experts of a module, with the lowest and the highest value. An expert is"
        " changed if a token of the data came to it. phi compares the four strongest directions of"
        " every two experts, on the side in the residual stream.",
    )
    lines = []
    for path, of in of_experts(sites).items():
        phi = overlaps.get(path)
        lines.append(
            [
                path,
                f"{sum(site['numerical_rank'] > 0 for site in of)} of {len(of)}",
                spread((site["relative_norm"] for site in of), ".2%", True),
                spread((site["effective_rank_95"] for site in of), ".1f", True),
                spread((site["stable_rank"] for site in of), ".2f", True),
                NOTHING
                if phi is None
                else f"{phi['phi']:.2f} ({phi['phi_lowest']:.2f} to {phi['phi_highest']:.2f})",
            ]
        )
    heads = ("site", "changed", "|dW|/|W0|", "directions for 95%", "stable rank", "phi")
    yield html_table(heads, lines)


def heads(sites: Mapping[str, Figures], left_out: str | None) -> Iterator[str]:
    """The section on attention heads.

    Args:
        sites: The figures of each matrix.
        left_out: Which projections have none, or None.
    """
    known = {path: site["heads"] for path, site in sites.items() if "heads" in site}
    yield section(
        "Attention heads",
        "Each line is a block, each column a head: how much of a module's update is at the rows"
        " that make the head, or, for the output projection, at the columns that read it, as a part"
        f" of the largest share. {left_out or ''}",
    )
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
    yield grid(drawn, "grid small")


def tokens(
    sites: Mapping[str, Figures], chance: Figures, left_out: str | None, experts: str | None = None
) -> Iterator[str]:
    """The section on the tokens and vectors nearest to the strongest directions.

    Args:
        chance: The cosine of a random direction, for reading and for writing.
        left_out: Why there are no tokens, or None.
        experts: Which experts have tokens, or None.
    """
    explained = (
        "The tokens with the largest cosine to each module's strongest directions. A direction"
        " that reads a token on the + side writes the tokens on its + side. A module whose inputs"
        " or outputs stay inside its block has no tokens for them. The token nearest to a random"
        f" direction has a cosine of {chance['reads']:.2f} when reading and"
        f" {chance['writes']:.2f} when writing; a cosine that is not larger means little."
        + (f" {experts}" if experts else "")
    )
    yield section("What it reads and writes", left_out or explained)
    for verb, names in (
        ("reads", "tokens"),
        ("reads_vectors", "your vectors"),
        ("writes", "tokens"),
        ("writes_vectors", "your vectors"),
    ):
        kinds = by_kind([path for path, site in sites.items() if site.get(verb)])
        for kind, of_kind in kinds.items():
            sign = verb.split("_")[0]
            head = ("block", "direction", f"{sign} +", f"{sign} −")
            lines = (
                line(place(path), i, sites[path], ends)
                for path in of_kind
                for i, ends in enumerate(sites[path][verb])
            )
            yield f"<details><summary>{html.escape(kind)} {sign}: {names}</summary>"
            yield f"{marked_up(head, lines, 'texts')}</details>"


def place(name: str) -> str:
    """The number of a matrix's block, and that of its expert; empty outside of blocks."""
    block, expert = kind_of(name)[1], name.removeprefix(site_of(name)).strip("[]")
    return ("" if block is None else str(block)) + (f", expert {expert}" if expert else "")


def line(block: str, i: int, site: Figures, ends: Figures) -> tuple[str, ...]:
    """One direction as the cells of a line of the table.

    Args:
        block: The block, as `place` names it.
        i: The index of the direction.
        ends: The names and cosines at both ends of the direction.
    """

    def end(entries: Sequence[Figures]) -> str:
        return " ".join(
            f"<code>{html.escape(repr(e['name'])[1:-1])}</code> {e['cosine']:+.2f}" for e in entries
        )

    share = site["singular_values"][i] ** 2 / sum(s**2 for s in site["singular_values"])
    name = f"{i + 1}: {share:.0%} of the energy"
    return block, name, end(ends["positive"]), end(ends["negative"])


def shares(sites: Mapping[str, Figures]) -> Iterator[str]:
    """The section on the share of each update on the user's vectors; nothing without vectors."""
    sides = [(path, verb) for path in sites for verb in ("reads", "writes")]
    found = {
        (path, verb): top for path, verb in sides if (top := sites[path].get(f"{verb}_shares"))
    }
    if not found:
        return
    yield section(
        "Your vectors", "The share of each update's energy on a vector, in descending order."
    )
    lines = [
        [path, verb, ", ".join(f"{name} {share:.1%}" for name, share in vectors.items())]
        for (path, verb), vectors in found.items()
    ]
    escaped = ([html.escape(cell) for cell in one] for one in lines)
    yield marked_up(("module", "side", "vectors"), escaped, "texts")


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
    document(f"Inside {Path(found['adapter']).name}", "".join(sections(found)), path)


def sections(found: Figures) -> Iterator[str]:
    """The HTML of the page, in parts."""
    whole, sites = found["whole"], found["sites"]
    beside = "".join(
        f"; it also has {count} × {kind}, not measured" for kind, count in found["beside"].items()
    )
    yield f"<p>{html.escape(found['method'])} on {html.escape(found['model'])}{beside}.</p>"
    yield notes(found["advice"])
    yield cards(
        {
            "sites": f"{whole['sites']}",
            "nominal rank": shown(whole["rank"], ""),
            "mean rank for 90%": f"{whole['effective_rank_90']:.1f}",
            "for 95%": f"{whole['effective_rank_95']:.1f}",
            "for 99%": f"{whole['effective_rank_99']:.1f}",
            "mean stable rank": f"{whole['stable_rank']:.2f}",
            "mean entropy rank": f"{whole['entropy_rank']:.1f}",
            "|dW| over |W0|": shown(whole["relative_norm"], ".2%"),
            "median amplification": shown(whole["amplification"], ".2f"),
        }
    )
    yield section(
        "Where it changed the model",
        "Each line is a block, each column a kind of module. The darker a box in light, or the"
        " brighter in dark, the larger is its figure.",
    )
    measured = {
        name: how for name, how in MAPS.items() if any(name in site for site in sites.values())
    }
    yield grid(
        [
            f"<details open><summary>{heading}</summary>{layer_map(sites, name, form)}</details>"
            for name, (heading, form) in measured.items()
        ],
        "maps",
    )
    yield section(
        "Spectra",
        "Singular values divided by the largest, a line for each block. Where a line falls"
        " steeply, few directions carry the update.",
    )
    yield grid(spectra(sites), "grid small")
    if "paths" in found:
        yield from paths(found["paths"])
    if "against" in found:
        yield from against(found["against"])
    if any("position_read" in site for site in sites.values()):
        yield from positions(sites)
    if found["layers"]:
        yield section(
            "Blocks compared",
            "phi of the four strongest directions that every two blocks read from the residual"
            " stream, or write to it: 1 for the same subspace, 0 for orthogonal ones. Experts are"
            " left out, since those of one number in two blocks have nothing in common.",
        )
        yield grid(
            [
                plots.heat(
                    f"{kind}, {of['side']}", alike(of["phi"]), of["phi"], "block", "block", 0
                )
                for kind, of in found["layers"].items()
            ],
            "grid small",
        )
    if any("heads" in site for site in sites.values()):
        yield from heads(sites, found.get("heads_left_out"))
    if "experts" in found:
        yield from experts(sites, found["experts"])
    left_out = found.get("experts_left_out")
    yield from tokens(sites, found["chance_cosine"], found["tokens_left_out"], left_out)
    yield from shares(sites)


def alike(phi: Sequence[Sequence[float]]) -> str:
    """Which two blocks have the most in common, in a sentence."""
    pairs = {(i, j): phi[i][j] for i in range(len(phi)) for j in range(i)}
    if not pairs:
        return "There is one block."
    i, j = max(pairs, key=lambda pair: pairs[pair])
    mean = fmean(pairs.values())
    return f"Blocks {j} and {i} have the most in common, {phi[i][j]:.2f}; the mean is {mean:.2f}."


def layer_map(sites: Mapping[str, Figures], name: str, form: str) -> str:
    """A table of one figure, with blocks down and kinds of module across, as a heat map. Of experts
    it shows the mean.

    Args:
        name: The name of the figure.
        form: Its format.
    """
    kinds = by_kind(list(sites))
    every = defaultdict[tuple[str, int | None], list[float | None]](list)
    for path, site in sites.items():
        every[kind_of(path)].append(site.get(name))
    values = {at: mean_of(found) for at, found in every.items()}
    most = max((value for value in values.values() if value is not None), default=0) or 1
    layers = sorted({layer for _, layer in values}, key=lambda layer: (layer is None, layer))

    def cell(value: float | None) -> str:
        if value is None:
            return "<td></td>"
        return f'<td style="background:{plots.shade(value / most)}">{value:{form}}</td>'

    head = "".join(f"<th>{html.escape(kind)}</th>" for kind in kinds)
    rows = "".join(
        f"<tr><td>{'' if layer is None else layer}</td>"
        f"{''.join(cell(values.get((kind, layer))) for kind in kinds)}</tr>"
        for layer in layers
    )
    return f'<div class="wide"><table class="map"><tr><th></th>{head}</tr>{rows}</table></div>'


def spectra(sites: Mapping[str, Figures]) -> list[str]:
    """A plot of singular values for each kind of module; of experts those of the largest update."""
    depth = max((kind_of(path)[1] or 0 for path in sites), default=0)
    kinds = {
        kind: {p: s for p in paths if (s := sites[p]["singular_values"])}
        for kind, paths in by_kind(largest(sites)).items()
    }
    return [plots.spectra(kind, lines, depth) for kind, lines in kinds.items() if lines]


def paths(found: Figures) -> Iterator[str]:
    """The section on the loss along lines in weight space."""
    yield section(
        "The loss along lines in weight space",
        f"On {found['rows']} rows. t scales the whole update: 0 is the base, 1 the adapter.",
    )
    losses = dict(found["scaling"])
    best = min(losses, key=lambda t: losses[t])
    said = (
        f"{losses[0.0]:.4g} for the base, {losses[1.0]:.4g} for the adapter; lowest at t ="
        f" {best:g}, {losses[best]:.4g}."
    )
    ends = {0.0: "base", 1.0: "adapter"}
    drawn = [plots.line("base + t dW", said, found["scaling"], "t", ends)]
    if "between" in found:
        said = f"The barrier between them is {found['barrier']:.4f} nats a token."
        ends = {0.0: "this", 1.0: "the other"}
        drawn.append(
            plots.line("from this adapter to the other", said, found["between"], "t", ends)
        )
    yield grid(drawn)


def against(found: Figures) -> Iterator[str]:
    """The section on a second adapter."""
    yield section(
        f"Compared with {found['adapter']}",
        "phi(i, j) compares this adapter's top i directions with the other's top j: it is the share"
        " of the smaller subspace that lies in the larger one, as a mean over blocks.",
    )
    for side, name in (("read", "phi_read"), ("written", "phi_written")):
        yield f"<h3>Directions {side}</h3>"
        yield grid(
            [
                plots.heat(
                    kind,
                    f"{grids[name][0][0]:.2f} for the strongest of both, {grids[name][-1][-1]:.2f}"
                    " for all.",
                    grids[name],
                    "i, this adapter",
                    "j, the other",
                )
                for kind, grids in found["kinds"].items()
            ],
            "grid small",
        )


def positions(sites: Mapping[str, Figures]) -> Iterator[str]:
    """The section on the update in the spectrum of the base."""
    yield section(
        "The update in the base's spectrum",
        "The share of the update's energy on each tenth of the base's singular directions; thin"
        " lines show an even distribution.",
    )
    drawn = []
    for kind, of_kind in by_kind(
        [path for path, site in sites.items() if "position_read" in site]
    ).items():
        read, written = (
            [
                fmean(tenth)
                for tenth in zip(*(sites[p][f"position_{side}"] for p in of_kind), strict=True)
            ]
            for side in ("read", "written")
        )
        drawn.append(plots.position(kind, read, written, sites[of_kind[0]]["shape"]))
    yield grid(drawn)
