"""The tables of the page on the tokens and the vectors that directions read and write.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafold.inspecting.against import by_kind, kind_of

Figures = Mapping[str, Any]


def words(
    sites: Mapping[str, Figures], chance: Figures, left_out: str | None
) -> Iterator[str]:
    explained = (
        "The tokens nearest to each module's strongest directions, by cosine. What is read on the +"
        " side is written on the + side. A module whose inputs or outputs stay inside its block has"
        " no tokens for them. The token nearest to a random direction has a cosine of"
        f" {chance['reads']:.2f} for what is read, of {chance['writes']:.2f} for what is written:"
        " what lies no nearer says little."
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
            rows = "".join(
                row(kind_of(path)[1], i, sites[path], ends)
                for path in of_kind
                for i, ends in enumerate(sites[path][verb])
            )
            yield f"<details><summary>{html.escape(kind)} {verb.split('_')[0]}: {names}</summary>"
            yield f'<div class="wide"><table class="tokens">{head}{rows}</table></div></details>'


def row(layer: int | None, i: int, site: Figures, ends: Figures) -> str:
    def end(entries: Sequence[Figures]) -> str:
        return " ".join(
            f"<code>{html.escape(repr(e['name'])[1:-1])}</code> {e['cosine']:+.2f}" for e in entries
        )

    share = site["singular_values"][i] ** 2 / sum(s**2 for s in site["singular_values"])
    name = f"{i + 1}: {share:.0%} of the energy"
    cells = (
        "" if layer is None else str(layer),
        name,
        end(ends["positive"]),
        end(ends["negative"]),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def shares(sites: Mapping[str, Figures]) -> Iterator[str]:
    sides = [(path, verb) for path in sites for verb in ("reads", "writes")]
    found = {
        (path, verb): top for path, verb in sides if (top := sites[path].get(f"{verb}_shares"))
    }
    if not found:
        return
    yield (
        "<h2>Your vectors</h2><p>The share of each update's energy that lies on a vector, the"
        " largest first.</p><div class='wide'>"
    )
    yield "<table class='tokens'><tr><th>module</th><th></th><th>vectors</th></tr>"
    for (path, verb), vectors in found.items():
        text = ", ".join(f"{html.escape(name)} {share:.1%}" for name, share in vectors.items())
        yield f"<tr><td>{html.escape(path)}</td><td>{verb}</td><td>{text}</td></tr>"
    yield "</table></div>"
