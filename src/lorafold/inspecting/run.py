"""The figures of `lorafold inspect`, except the loss, for one adapter and its base.

    sites             by module path: the spectrum, the size relative to the base, the tokens; each
                      matrix of experts on its own, as `...gate_up_proj[3]`
    whole             the same over all sites
    layers            phi of the top directions of every two blocks
    experts           phi of the top directions of every two experts of a block
    experts_left_out  which experts have tokens, where there are experts
    heads_left_out    which projections have no heads, where some have none
    against           the comparison with a second adapter
    tokens_left_out   why no site has tokens, where the model has no tokenizer
    advice            conclusions, in sentences

The weights of one matrix of the base at a time are read from its files.

The conclusions from the figures, as sentences: the advice at the top of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from lorafold.adapter import Adapter, load
from lorafold.core.attach import only
from lorafold.errors import NoTokenizer
from lorafold.inspecting import token_directions
from lorafold.inspecting.residual_stream import evenness, gain, heads_of, stream_of
from lorafold.inspecting.spectra import (
    COSINE,
    TOP,
    advice,
    against_base,
    in_base_spectrum,
    pooled,
    spectrum,
)
from lorafold.inspecting.subspaces import SHOWN, across_experts, across_layers, compared
from lorafold.inspecting.updates import AdaptedModule, Svd, largest, load_below, of_experts, sites
from lorafold.layers import layer_of
from lorafold.peft.saved import Saved
from lorafold.resolve import Base
from lorafold.resolve.base import check_language_model

INDIFFERENT = 0.1  # a strength between 1 - this and 1 + this is no preference


def sentences(found: Figures) -> list[str]:
    """One sentence or two on each kind of figure that was measured."""
    sites = [site for site in found["sites"].values() if site["numerical_rank"]]
    if not sites:
        return ["The update is zero everywhere: this adapter changes nothing."]
    whole, every = found["whole"], found["sites"]
    parts = [
        f"Over all sites together, {advice(whole['rank'], whole)}. A single site needs"
        f" {whole['effective_rank_95']:.1f} directions for 95% on average.",
        of_base(whole, sites),
        of_strength(sites),
        of_tokens(sites, found["chance_cosine"]),
        of_evenness(every),
        of_heads(every),
    ]
    if "position_read" in sites[0]:
        parts += [of_position(sites), of_intruders(sites)]
    if "against" in found:
        parts.append(of_other(found["against"]))
    return [part for part in parts if part]


def of_base(whole: Figures, sites: list[Figures]) -> str:
    """The size of the update relative to the base (`subspaces`)."""
    pairs = [(site["projection"], site["random_projection"]) for site in sites]
    known = [own / random for own, random in pairs if random]
    if not known or whole["amplification"] is None:
        return "The base's weights are zero at the sites of this adapter."
    return (
        f"The norm of the update is {whole['relative_norm']:.2%} of that of the base. In the"
        f" update's own directions the base is {median(known):.1f} times as strong as in random"
        f" directions, and the update is {whole['amplification']:.2f} times as strong as the base"
        " (amplification; both are medians over sites)."
    )


def of_strength(sites: list[Figures]) -> str:
    """Whether the update changes weak or strong directions of the base; empty for a zero base."""
    known = [site for site in sites if site["strength_read"] is not None]
    if not known:
        return ""
    read, written = (
        median(site[f"strength_{side}"] for site in known) for side in ("read", "written")
    )

    def kind(strength: float) -> str:
        if abs(strength - 1) < INDIFFERENT:
            return "no preference"
        return "weak directions" if strength < 1 else "strong directions"

    return (
        "Strength of the base in the update's directions: its energy is"
        f" {read:.2f} times the average along the directions that are read ({kind(read)}), and"
        f" {written:.2f} times along those that are written ({kind(written)}); medians over sites."
    )


def of_tokens(sites: list[Figures], chance: Figures) -> str:
    """The cosine of the token nearest to the strongest direction of each site, on sides in the
    residual stream; empty without such sides.
    """

    def nearest(site: Figures, verb: str) -> float:
        return max(abs(entry["cosine"]) for end in site[verb][0].values() for entry in end)

    near = {
        verb: [nearest(site, verb) for site in sites if verb in site]
        for verb in ("reads", "writes")
    }
    parts = [
        f"{fmean(cosines):.2f} for directions {side} (random ones: {chance[verb]:.2f})"
        for (verb, cosines), side in zip(near.items(), ("read", "written"), strict=True)
        if cosines
    ]
    return (
        "The token nearest to the strongest direction of a site has, on average, a cosine of"
        f" {' and '.join(parts)}."
        if parts
        else ""
    )


def of_evenness(sites: Figures) -> str:
    """How evenly the experts changed; empty without experts."""
    by_site = [[site["norm"] for site in own] for own in of_experts(sites).values()]
    every = [norm for norms in by_site for norm in norms]
    if not any(every):
        return ""
    uneven = median(max(norms) / fmean(norms) for norms in by_site if any(norms))
    return (
        f"Of {len(every)} matrices of experts {sum(norm > 0 for norm in every)} changed; the"
        f" largest update of a site is {uneven:.1f} times as large as the mean of its experts"
        " (median over sites)."
    )


def of_heads(sites: Figures) -> str:
    """Where the update of one head stands out most (`heads`); empty without heads."""
    if (most := evenness(sites)) is None:
        return ""
    path, head, share, n = most
    return (
        f"Of all attention heads, head {head} of {path} stands out most: {share:.0%} of that"
        f" module's update is there (an even share of {n} heads is {1 / n:.0%})."
    )


def of_position(sites: list[Figures]) -> str:
    """The update in the spectrum of the base (`base_svd`)."""
    top = median(site["projection"] / site["top_projection"] for site in sites)
    read, written = (
        fmean(sum(site[f"position_{side}"][:2]) for site in sites) for side in ("read", "written")
    )
    reads, writes = (
        fmean(min(site["shape"]) / site["shape"][side] for site in sites) / 5 for side in (1, 0)
    )
    return (
        f"{read:.0%} of the update's energy is read from the strongest fifth of the base's"
        f" directions, and {written:.0%} is written to it (an even distribution would have"
        f" {reads:.0%} and {writes:.0%}). The base is {top:.0%} as strong in the update's"
        " directions as in its own strongest ones."
    )


def of_intruders(sites: list[Figures]) -> str:
    """The number of intruder dimensions (`base_svd`)."""
    some = [site["intruders"] for site in sites if site["intruders"]]
    return (
        f"{len(some)} of {len(sites)} sites have intruder dimensions ({sum(some)} in all): top"
        f" {TOP} singular vectors of the changed weight whose cosine to every one of the base's is"
        f" below {COSINE}."
    )


def of_other(against: Figures) -> str:
    """The comparison with a second adapter (`against`)."""
    sites = list(against["sites"].values())
    if not sites:
        return f"This adapter and {against['adapter']} change no module in common."

    def mean(name: str) -> float:
        return fmean(site[name] for site in sites)

    first, every, chance = (
        f"{mean(f'{name}_read_{n}'):.2f} and {mean(f'{name}_written_{n}'):.2f}"
        for name, n in (("phi", "first"), ("phi", "all"), ("chance", "all"))
    )
    return (
        f"Compared with {against['adapter']}: the updates have a cosine of {mean('cosine'):+.3f};"
        f" phi of the directions read and written is {first} for the first directions and {every}"
        f" for all (unrelated updates: {chance})."
    )


def of_paths(paths: Figures) -> list[str]:
    """The loss along lines in weight space (`paths`)."""
    at = dict(paths["scaling"])
    best, lowest = min(at.items(), key=lambda point: point[1])
    found = [
        f"Along base + t dW the loss goes from {at[0.0]:.4f} at t = 0 to {at[1.0]:.4f} at t = 1;"
        f" the lowest is {lowest:.4f} at t = {best:g}"
        + (
            "."
            if abs(best - 1) < 0.3
            else ": a smaller update would be better."
            if best < 1
            else ": a larger update would be better."
        )
    ]
    if "between" in paths:
        rise = paths["barrier"]
        how = "connected without a barrier" if rise < 0.01 else "separated by a barrier"
        found.append(
            f"The two adapters are {how}: between them the loss rises at most {rise:.4f} nats above"
            " the straight line."
        )
    return found


Progress = Callable[[int, int], None]  # sites done, sites in all
Figures = dict[str, Any]
EXPERTS = "Of the experts of a block, the one with the largest update has tables of tokens."
FUSED = (
    "The heads of projections that are one matrix for queries, keys and values are left out: which"
    " rows are whose is not said."
)
WHOLE = (
    "effective_rank_90",
    "effective_rank_95",
    "effective_rank_99",
    "stable_rank",
    "entropy_rank",
)


@torch.no_grad()
def inspect(
    base: Base,
    stack: Sequence[Saved],
    *,
    against: Saved | None = None,
    directions: str | Path | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> Figures:
    """Measure a saved adapter of any method that folds.

    Args:
        stack: The adapter, after those that it was trained over, lowest first; they are part of its
            base here.
        against: A second adapter to compare with: over the same ones, or one of them.
        directions: A safetensors file of vectors in the residual stream.
        full: Also compare with the spectrum of the base, which takes the SVD of every weight.
        progress: Called as progress(sites done, sites in all).

    Raises LorafoldError as `load`, and for a method that does not change matrices. Without a
    tokenizer the tables of tokens are left out, and `tokens_left_out` says why.
    """
    check_language_model(base, [*stack, *([against] if against is not None else [])])
    *over, saved = stack
    left_out = None
    try:
        tokenizer = base.tokenizer(stack)
    except NoTokenizer as error:
        tokenizer, left_out = None, f"The tables of tokens are left out: {error}."
    mapped, allowed = base.mapped(), base.allow_other_base
    below = load_below(mapped.model, base, stack)
    adapter = load(mapped.model, saved, "inspected", allow_other_base=allowed)
    other = None
    if against is not None:
        with only(mapped.model, *below):
            other = load(mapped.model, against, "against", allow_other_base=allowed)
    stream = stream_of(mapped.model)
    projections, fused = heads_of(mapped.model, stream)
    changed, figures, svds = list(sites(adapter, below)), dict[str, Figures](), dict[str, Svd]()
    for done, site in enumerate(changed, 1):
        weights = site.weights()
        for name, svd in site.parts():
            figures[name] = of_matrix(site, svd, weights[name].float(), full)
            if name in projections:
                figures[name]["heads"] = projections[name].shares(svd)
            svds[name] = kept_of(site, svd)
        if progress is not None:
            progress(done, len(changed))
    embedding, unembedding = (
        layer_of(end).dense()[0]
        for end in (mapped.model.get_input_embeddings(), mapped.model.get_output_embeddings())
    )
    norm = stream.final_norm
    through = gain(mapped.model.get_submodule(norm), stream.size) if norm else None
    vocabulary = {"reads": (embedding.t(), None), "writes": (unembedding, through)}
    shown = {name: svds[name] for name in largest(figures)}
    sides = token_directions.sides_of(mapped.model, stream, shown)
    if tokenizer is not None:
        for verb, ends in vocabulary.items():
            named = token_directions.tables(
                sides[verb], *ends, lambda n: str(tokenizer.decode([n]))
            )
            for at, table in named.items():
                figures[at][verb] = table
    if directions is not None:
        vectors = token_directions.read_vectors(directions, len(embedding))
        for verb, own in sides.items():
            for at, found in of_vectors(own, shown, *vectors).items():
                figures[at] |= {f"{verb}_{what}": value for what, value in found.items()}
    among = across_experts(svds, stream)
    result: Figures = {
        "adapter": str(saved),
        **({"over": [*map(str, over)]} if over else {}),
        "model": base.name,
        "method": str(adapter.spec),
        "beside": beside(adapter),
        "whole": of_whole(figures),
        "sites": figures,
        "layers": across_layers(svds, stream),
        **({"experts": among, "experts_left_out": EXPERTS} if among else {}),
        **({"heads_left_out": FUSED} if figures.keys() & set(fused) else {}),
        "chance_cosine": {v: token_directions.chance(*ends) for v, ends in vocabulary.items()},
        "tokens_left_out": left_out,
    }
    if against is not None and other is not None:
        others = sites(other, below if other.over else ())
        result["against"] = {
            "adapter": str(against),
            **compared(svds, {n: kept_of(site, svd) for site in others for n, svd in site.parts()}),
        }
    return {**result, "advice": sentences(result)}


def of_matrix(site: AdaptedModule, svd: Svd, w: torch.Tensor, full: bool) -> Figures:
    """The figures of a matrix.

    Args:
        svd: The SVD of its update.
        w: W0, (out, in), in fp32.
        full: Those that need the spectrum of W0 too.
    """
    figures = spectrum(svd.s, site.rank)
    directions = len(svd.s) if figures["factored"] else int(figures["effective_rank_95"])
    found = {**figures, **against_base(svd, w, directions), "directions": directions}
    if full:
        found |= in_base_spectrum(w, svd, directions)
    about = {
        "shape": list(w.shape),
        "singular_values": svd.s.tolist(),
        "advice": advice(site.rank, pooled([svd.s])),
    }
    return {**found, **about}


def of_whole(sites: Mapping[str, Figures]) -> Figures:
    """Means and medians over the sites, and the loss of cutting all sites to one rank."""
    size, own = (
        math.hypot(*(site[name] for site in sites.values())) for name in ("norm", "base_norm")
    )
    ranks = {name: fmean(site[name] for site in sites.values()) for name in WHOLE}
    given = {site["rank"] if site["factored"] else None for site in sites.values()}
    known = [site["amplification"] for site in sites.values() if site["amplification"] is not None]
    return {
        "sites": len(sites),
        "rank": given.pop() if len(given) == 1 else None,
        **ranks,
        "norm": size,
        "relative_norm": size / own if own else None,
        "amplification": median(known) if known else None,
        **pooled([torch.tensor(site["singular_values"]) for site in sites.values()]),
    }


def kept_of(site: AdaptedModule, svd: Svd) -> Svd:
    """The SVD of a dense update cut to its top directions, so that those of all sites fit in
    memory; one of factors is small and stays whole.
    """
    return svd if site.rank is not None else svd.top(SHOWN).copied()


def of_vectors(
    sides: Mapping[str, token_directions.Directions],
    svds: Mapping[str, Svd],
    names: Sequence[str],
    vectors: torch.Tensor,
) -> dict[str, Figures]:
    """The user's vectors (n, d) nearest to each side in the residual stream, and those with the
    largest shares of its update, by module path.
    """
    streams = {path: side for path, side in sides.items() if not side.of_tokens}
    tables = token_directions.tables(streams, vectors, None, names.__getitem__)
    return {
        path: {
            "vectors": table,
            "shares": token_directions.largest_shares(streams[path], svds[path].s, names, vectors),
        }
        for path, table in tables.items()
    }


def beside(adapter: Adapter) -> dict[str, int]:
    """The number of other deltas of the adapter, by class: biases, whole modules, tokens. They are
    not part of the figures.
    """
    own = {id(delta) for delta in adapter.own_deltas.values()}
    kinds = [type(part).__name__ for _, part in adapter.parts() if id(part) not in own]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
