"""The tables of the page: the tokens and the user's vectors that directions read and write."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafold.inspecting.against import by_kind, kind_of

Figures = Mapping[str, Any]


def tokens(
    sites: Mapping[str, Figures], chance: Figures, left_out: str | None
) -> Iterator[str]:
    """The section on the tokens and vectors nearest to the strongest directions.

    Args:
        sites: The figures of each site.
        chance: The cosine of a random direction, for reading and for writing.
        left_out: Why there are no tokens, or None.
    """
    explained = (
        "The tokens with the largest cosine to each module's strongest directions. A direction"
        " that reads a token on the + side writes the tokens on its + side. A module whose inputs"
        " or outputs stay inside its block has no tokens for them. The token nearest to a random"
        f" direction has a cosine of {chance['reads']:.2f} when reading and"
        f" {chance['writes']:.2f} when writing; a cosine that is not larger means little."
    )
    yield f"<h2>What it reads and writes</h2><p>{html.escape(left_out or explained, False)}</p>"
    for verb, names in (
        ("reads", "tokens"),
        ("reads_vectors", "your vectors"),
        ("writes", "tokens"),
        ("writes_vectors", "your vectors"),
    ):
        kinds = by_kind([path for path, site in sites.items() if site.get(verb)])
        for kind, of_kind in kinds.items():
            head = (
                f"<tr><th>block</th><th>direction</th><th>{verb.split('_')[0]}"
                f" +</th><th>{verb.split('_')[0]} −</th></tr>"
            )
            lines = "".join(
                line(kind_of(path)[1], i, sites[path], ends)
                for path in of_kind
                for i, ends in enumerate(sites[path][verb])
            )
            yield f"<details><summary>{html.escape(kind)} {verb.split('_')[0]}: {names}</summary>"
            yield f'<div class="wide"><table class="tokens">{head}{lines}</table></div></details>'


def line(block: int | None, i: int, site: Figures, ends: Figures) -> str:
    """One direction as a line of the table.

    Args:
        block: The number of the block, or None outside of blocks.
        i: The index of the direction.
        site: The figures of the site.
        ends: The names and cosines at both ends of the direction.
    """

    def end(entries: Sequence[Figures]) -> str:
        return " ".join(
            f"<code>{html.escape(repr(e['name'])[1:-1])}</code> {e['cosine']:+.2f}" for e in entries
        )

    share = site["singular_values"][i] ** 2 / sum(s**2 for s in site["singular_values"])
    name = f"{i + 1}: {share:.0%} of the energy"
    cells = (
        "" if block is None else str(block),
        name,
        end(ends["positive"]),
        end(ends["negative"]),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def shares(sites: Mapping[str, Figures]) -> Iterator[str]:
    """The section on the share of each update on the user's vectors; nothing without vectors."""
    sides = [(path, verb) for path in sites for verb in ("reads", "writes")]
    found = {
        (path, verb): top for path, verb in sides if (top := sites[path].get(f"{verb}_shares"))
    }
    if not found:
        return
    yield (
        "<h2>Your vectors</h2><p>The share of each update's energy on a vector, in descending"
        " order.</p><div class='wide'>"
    )
    yield "<table class='tokens'><tr><th>module</th><th></th><th>vectors</th></tr>"
    for (path, verb), vectors in found.items():
        text = ", ".join(f"{html.escape(name)} {share:.1%}" for name, share in vectors.items())
        yield f"<tr><td>{html.escape(path)}</td><td>{verb}</td><td>{text}</td></tr>"
    yield "</table></div>"
