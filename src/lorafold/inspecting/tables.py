"""The tables of the page: what experts and heads changed, and the tokens and the user's vectors
that directions read and write.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from lorafold.files.page import grid, html_table, section
from lorafold.files.page import table as marked_up
from lorafold.inspecting import plots
from lorafold.inspecting.against import by_kind, kind_of
from lorafold.inspecting.updates import site_of

Figures = Mapping[str, Any]


def average(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known, or None."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def spread(values: Sequence[float | None], form: str, ranged: bool = True) -> str:
    """The mean of figures as text, a dash for none.

    Args:
        values: The figures.
        form: Their format.
        ranged: Whether the lowest and the highest follow.
    """
    if (mean := average(values)) is None:
        return "–"
    known = [value for value in values if value is not None]
    ends = f" ({min(known):{form}} to {max(known):{form}})" if ranged else ""
    return f"{mean:{form}}{ends}"


def experts(sites: Mapping[str, Figures], overlaps: Figures) -> Iterator[str]:
    """The section on experts: a line for each site.

    Args:
        sites: The figures of each matrix.
        overlaps: phi of their top directions by site, where one side is in the residual stream.
    """
    own = defaultdict[str, list[Figures]](list)
    for name, site in sites.items():
        if site_of(name) != name:
            own[site_of(name)].append(site)
    yield section(
        "Experts",
        "Means over the experts of a module, with the lowest and the highest value. An expert is"
        " changed if a token of the data came to it. phi compares the four strongest directions of"
        " every two experts, on the side in the residual stream.",
    )
    lines = []
    for path, of in own.items():
        phi = overlaps.get(path)
        lines.append(
            [
                path,
                f"{sum(site['numerical_rank'] > 0 for site in of)} of {len(of)}",
                spread([site["relative_norm"] for site in of], ".2%"),
                spread([site["effective_rank_95"] for site in of], ".1f"),
                spread([site["stable_rank"] for site in of], ".2f"),
                "–"
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
