"""The figures of `lorafold inspect`, except the loss, for one adapter and its base, and the advice:
conclusions from the figures, in sentences. `result` has the figures.

The weights of one matrix of the base at a time are read from its files.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from lorafold.adapter import Adapter, load
from lorafold.core.attach import only
from lorafold.errors import NoTokenizer
from lorafold.inspecting.residual_stream import ResidualStream, gain, heads_of, stream_of
from lorafold.inspecting.result import (
    AdapterFigures,
    AdapterOverlap,
    Inspection,
    LossPaths,
    MatrixFigures,
    Sites,
)
from lorafold.inspecting.spectra import (
    COSINE,
    TOP,
    advice,
    against_base,
    effective_rank,
    entropy_rank,
    in_base_spectrum,
    pooled,
    stable_rank,
)
from lorafold.inspecting.subspaces import SHOWN, across_experts, across_layers, compared
from lorafold.inspecting.token_directions import (
    Directions,
    largest_shares,
    mean_nearest,
    read_vectors,
    sides_of,
    tables,
)
from lorafold.inspecting.updates import (
    AdaptedModule,
    Svd,
    Svds,
    largest,
    load_below,
    of_experts,
    sites,
)
from lorafold.layers import layer_of
from lorafold.peft.saved import Saved
from lorafold.resolve import Base
from lorafold.resolve.base import check_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]  # sites done, sites in all
Vocabulary = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]  # by verb: (V, d), (d,)
INDIFFERENT = 0.1  # a strength between 1 - this and 1 + this is no preference
EXPERTS = "Of the experts of a block, the one with the largest update has tables of tokens."
FUSED = (
    "The heads of projections that are one matrix for queries, keys and values are left out: which"
    " rows are whose is not said."
)


@torch.no_grad()
def inspect(
    base: Base,
    stack: Sequence[Saved],
    *,
    against: Saved | None = None,
    directions: str | Path | None = None,
    full: bool = False,
    progress: Progress = lambda done, total: None,
) -> Inspection:
    """Measure the last adapter of a stack, with those below as part of its base. `full` also
    compares with the spectrum of the base, which takes the SVD of every weight.
    """
    check_language_model(base, [*stack, *([against] if against is not None else [])])
    *over, saved = stack
    tokens_left_out = None
    try:
        tokenizer = base.tokenizer(stack)
    except NoTokenizer as error:
        tokenizer, tokens_left_out = None, f"The tables of tokens are left out: {error}."
    model, allowed = base.mapped().model, base.allow_other_base
    below = load_below(model, base, stack)
    adapter = load(model, saved, "inspected", allow_other_base=allowed)
    other = None
    if against is not None:
        with only(model, *below):
            other = load(model, against, "against", allow_other_base=allowed)
    stream = stream_of(model)
    heads, fused = heads_of(model, stream)
    changed, figures, svds = list(sites(adapter, below)), dict[str, MatrixFigures](), {}
    for done, site in enumerate(changed, 1):
        weights = site.weights()
        for name, svd in site.parts():
            figures[name] = matrix_figures(site, svd, weights[name].float(), full)
            if name in heads:
                figures[name] = replace(figures[name], heads=heads[name].shares(svd))
            svds[name] = in_memory(site, svd)
        progress(done, len(changed))
    vocabulary = vocabulary_of(model, stream)
    vectors = None if directions is None else read_vectors(directions, stream.size)
    shown = {name: svds[name] for name in largest(figures)}
    sides = sides_of(model, stream, shown)
    named = named_directions(sides, shown, vocabulary, tokenizer, vectors)
    measured = {name: replace(of, **named[name]) for name, of in figures.items()}
    experts, whole = across_experts(svds, stream), adapter_figures(measured)
    overlap = None
    if against is not None and other is not None:
        others = sites(other, below if other.over else ())
        theirs = {n: in_memory(site, svd) for site in others for n, svd in site.parts()}
        overlap = compared(str(against), svds, theirs)
    chance = {verb: mean_nearest(*ends) for verb, ends in vocabulary.items()}
    return Inspection(
        adapter=str(saved),
        model=base.name,
        method=str(adapter.spec),
        beside=not_measured(adapter),
        whole=whole,
        sites=measured,
        layers=across_layers(svds, stream),
        chance_cosine=chance,
        tokens_left_out=tokens_left_out,
        advice=sentences(whole, measured, chance, overlap),
        over=[*map(str, over)] or None,
        against=overlap,
        experts=experts or None,
        experts_left_out=EXPERTS if experts else None,
        heads_left_out=FUSED if measured.keys() & set(fused) else None,
    )


def vocabulary_of(model: PreTrainedModel, stream: ResidualStream) -> Vocabulary:
    """The tokens' vectors that directions read and write, and the gain between them."""
    embedding, unembedding = (
        layer_of(end).dense()[0]
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    norm = stream.final_norm
    through = gain(model.get_submodule(norm), stream.size) if norm else None
    return {"reads": (embedding.t(), None), "writes": (unembedding, through)}


def named_directions(
    sides: Mapping[str, Mapping[str, Directions]],
    svds: Svds,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase | None,
    vectors: tuple[Sequence[str], torch.Tensor] | None,  # n, (n, d)
) -> Mapping[str, dict[str, Any]]:
    """Nearest tokens and vectors, and the vectors' shares, as fields of `MatrixFigures`."""
    fields = defaultdict[str, dict[str, Any]](dict)
    for verb, of in sides.items():
        if tokenizer is not None:
            named = tables(of, *vocabulary[verb], lambda n: str(tokenizer.decode([n])))
            for name, table in named.items():
                fields[name][verb] = table
        if vectors is not None:
            streams = {name: side for name, side in of.items() if not side.of_tokens}
            for name, table in tables(streams, vectors[1], None, vectors[0].__getitem__).items():
                shares = largest_shares(streams[name], svds[name].s, *vectors)
                fields[name] |= {f"{verb}_vectors": table, f"{verb}_shares": shares}
    return fields


def matrix_figures(site: AdaptedModule, svd: Svd, w: torch.Tensor, full: bool) -> MatrixFigures:
    """The figures of a matrix w (out, in), in fp32, from the SVD of its update."""
    s, rank = svd.s, site.rank
    for_90, for_95, for_99 = (effective_rank(s, share) for share in (0.9, 0.95, 0.99))
    directions = for_95 if rank is None else len(s)
    intruders, positions = in_base_spectrum(w, svd, directions) if full else (None, None)
    return MatrixFigures(
        rank=len(s) if rank is None else rank,
        numerical_rank=len(s),
        effective_rank_90=for_90,
        effective_rank_95=for_95,
        effective_rank_99=for_99,
        factored=rank is not None,
        stable_rank=stable_rank(s),
        entropy_rank=entropy_rank(s),
        base=against_base(svd, w, directions),
        directions=directions,
        shape=list(w.shape),
        singular_values=s.tolist(),
        advice=advice(rank, pooled([s])),
        intruders=intruders,
        positions=positions,
    )


def adapter_figures(sites: Sites) -> AdapterFigures:
    """Means and medians over the sites, and the loss of cutting all sites to one rank."""
    figures = [*sites.values()]
    size, base = (math.hypot(*(getattr(f.base, n) for f in figures)) for n in ("norm", "base_norm"))
    ranks = {f.rank if f.factored else None for f in figures}
    known = [f.base.amplification for f in figures if f.base.amplification is not None]

    def mean(name: str) -> float:
        return fmean(getattr(f, name) for f in figures)

    return AdapterFigures(
        sites=len(figures),
        rank=ranks.pop() if len(ranks) == 1 else None,
        effective_rank_90=mean("effective_rank_90"),
        effective_rank_95=mean("effective_rank_95"),
        effective_rank_99=mean("effective_rank_99"),
        stable_rank=mean("stable_rank"),
        entropy_rank=mean("entropy_rank"),
        norm=size,
        relative_norm=size / base if base else None,
        amplification=median(known) if known else None,
        pooled=pooled([torch.tensor(f.singular_values) for f in figures]),
    )


def in_memory(site: AdaptedModule, svd: Svd) -> Svd:
    """The SVD of a dense update cut to its top directions, as those of all sites stay."""
    if site.rank is not None:
        return svd
    top = svd.top(SHOWN)
    return Svd(top.u.clone(), top.s.clone(), top.v.clone())


def not_measured(adapter: Adapter) -> dict[str, int]:
    """The number of other deltas of the adapter, by class: biases, whole modules, tokens."""
    measured = {id(delta) for delta in adapter.own_deltas.values()}
    kinds = Counter(type(p).__name__ for _, p in adapter.parts() if id(p) not in measured)
    return dict(sorted(kinds.items()))


def sentences(
    whole: AdapterFigures,
    sites: Sites,
    chance: Mapping[str, float],
    against: AdapterOverlap | None,
) -> list[str]:
    """One sentence or two on each kind of figure that was measured."""
    changed = [site for site in sites.values() if site.numerical_rank]
    if not changed:
        return ["The update is zero everywhere: this adapter changes nothing."]
    parts = [
        f"Over all sites together, {advice(whole.rank, whole.pooled)}. A single site needs"
        f" {whole.effective_rank_95:.1f} directions for 95% on average.",
        of_base(whole, changed),
        of_strength(changed),
        of_tokens(changed, chance),
        of_evenness(sites),
        of_heads(sites),
        of_position(changed),
        of_intruders([site.intruders for site in changed if site.intruders is not None]),
        of_other(against),
    ]
    return [part for part in parts if part]


def of_base(whole: AdapterFigures, sites: Sequence[MatrixFigures]) -> str:
    """The size of the update relative to the base."""
    bases = [site.base for site in sites]
    known = [b.projection / b.random_projection for b in bases if b.random_projection]
    if not known or whole.amplification is None:
        return "The base's weights are zero at the sites of this adapter."
    return (
        f"The norm of the update is {whole.relative_norm:.2%} of that of the base. In the"
        f" update's own directions the base is {median(known):.1f} times as strong as in random"
        f" directions, and the update is {whole.amplification:.2f} times as strong as the base"
        " (amplification; both are medians over sites)."
    )


def of_strength(sites: Sequence[MatrixFigures]) -> str:
    """Whether the update changes weak or strong directions of the base; empty for a zero base."""
    both = [(site.base.strength_read, site.base.strength_written) for site in sites]
    known = [[one for one in side if one is not None] for side in zip(*both, strict=True)]
    if not all(known):
        return ""

    def kind(strength: float) -> str:
        if abs(strength - 1) < INDIFFERENT:
            return "no preference"
        return "weak directions" if strength < 1 else "strong directions"

    read, written = map(median, known)
    return (
        "Strength of the base in the update's directions: its energy is"
        f" {read:.2f} times the average along the directions that are read ({kind(read)}), and"
        f" {written:.2f} times along those that are written ({kind(written)}); medians over sites."
    )


def of_tokens(sites: Sequence[MatrixFigures], chance: Mapping[str, float]) -> str:
    """The cosine of the token nearest to the strongest direction, where tokens are known."""
    parts = []
    for verb, side in (("reads", "read"), ("writes", "written")):
        strongest = [tables[0] for site in sites if (tables := getattr(site, verb))]
        cosines = [
            max(abs(one.cosine) for one in (*ends.positive, *ends.negative)) for ends in strongest
        ]
        if cosines:
            random = f"(random ones: {chance[verb]:.2f})"
            parts.append(f"{fmean(cosines):.2f} for directions {side} {random}")
    return (
        "The token nearest to the strongest direction of a site has, on average, a cosine of"
        f" {' and '.join(parts)}."
    ) * bool(parts)


def of_evenness(sites: Sites) -> str:
    """How evenly the experts changed; empty without experts."""
    by_site = [[figures.base.norm for figures in of] for of in of_experts(sites).values()]
    norms = [norm for of in by_site for norm in of]
    if not any(norms):
        return ""
    uneven = median(max(of) / fmean(of) for of in by_site if any(of))
    return (
        f"Of {len(norms)} matrices of experts {sum(norm > 0 for norm in norms)} changed; the"
        f" largest update of a site is {uneven:.1f} times as large as the mean of its experts"
        " (median over sites)."
    )


def of_heads(sites: Sites) -> str:
    """Where the update of one head stands out most; empty without heads."""
    heads = {path: site.heads for path, site in sites.items() if site.heads}
    known = [(max(shares), path, shares) for path, shares in heads.items() if any(shares)]
    if not known:
        return ""
    share, path, shares = max(known, key=lambda one: one[0] * len(one[2]))
    return (
        f"Of all attention heads, head {shares.index(share)} of {path} stands out most: {share:.0%}"
        f" of that module's update is there (an even share of {len(shares)} heads is"
        f" {1 / len(shares):.0%})."
    )


def of_position(sites: Sequence[MatrixFigures]) -> str:
    """The update in the spectrum of the base; empty where that was not measured."""
    known = [(site.base.projection, site.shape, at) for site in sites if (at := site.positions)]
    if not known:
        return ""
    top = median(projection / at.top_projection for projection, _, at in known)
    read = fmean(sum(at.position_read[:2]) for _, _, at in known)
    written = fmean(sum(at.position_written[:2]) for _, _, at in known)
    reads, writes = (
        fmean(min(shape) / shape[side] for _, shape, _ in known) / 5 for side in (1, 0)
    )
    return (
        f"{read:.0%} of the update's energy is read from the strongest fifth of the base's"
        f" directions, and {written:.0%} is written to it (an even distribution would have"
        f" {reads:.0%} and {writes:.0%}). The base is {top:.0%} as strong in the update's"
        " directions as in its own strongest ones."
    )


def of_intruders(counts: Sequence[int]) -> str:
    """The number of intruder dimensions of each site; empty where they were not counted."""
    if not counts:
        return ""
    return (
        f"{sum(map(bool, counts))} of {len(counts)} sites have intruder dimensions ({sum(counts)}"
        f" in all): top {TOP} singular vectors of the changed weight whose cosine to every one of"
        f" the base's is below {COSINE}."
    )


def of_other(against: AdapterOverlap | None) -> str:
    """The comparison with a second adapter; empty without one."""
    if against is None:
        return ""
    sites = against.sites.values()
    if not sites:
        return f"This adapter and {against.adapter} change no module in common."

    def mean(name: str) -> float:
        return fmean(getattr(site, name) for site in sites)

    first, every, chance = (
        f"{mean(f'{name}_read_{n}'):.2f} and {mean(f'{name}_written_{n}'):.2f}"
        for name, n in (("phi", "first"), ("phi", "all"), ("chance", "all"))
    )
    return (
        f"Compared with {against.adapter}: the updates have a cosine of {mean('cosine'):+.3f};"
        f" phi of the directions read and written is {first} for the first directions and {every}"
        f" for all (unrelated updates: {chance})."
    )


def of_paths(paths: LossPaths) -> list[str]:
    """The loss along lines in weight space."""
    losses = dict(paths.scaling)
    best, lowest = min(paths.scaling, key=lambda point: point[1])
    size = "smaller" if best < 1 else "larger"
    better = f": a {size} update would be better" * (abs(best - 1) >= 0.3)
    conclusions = [
        f"Along base + t dW the loss goes from {losses[0.0]:.4f} at t = 0 to {losses[1.0]:.4f} at"
        f" t = 1; the lowest is {lowest:.4f} at t = {best:g}{better}."
    ]
    if paths.barrier is not None:
        how = "connected without" if paths.barrier < 0.01 else "separated by"
        conclusions.append(
            f"The two adapters are {how} a barrier: between them the loss rises at most"
            f" {paths.barrier:.4f} nats above the straight line."
        )
    return conclusions
