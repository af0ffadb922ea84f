"""The advice of `lorafold lab inspect`: a sentence or two on each kind of figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from lorafold.files.templates import render_text
from lorafold.inspecting.result import (
    AdapterFigures,
    AdapterOverlap,
    LossPaths,
    MatrixFigures,
    Sites,
)
from lorafold.inspecting.spectra import MAX_INTRUDER_COSINE, NUM_TOP, advice
from lorafold.inspecting.updates import group_experts

NEUTRAL_MARGIN = 0.1  # strengths within 1 +- this count as no preference


def sentences(
    whole: AdapterFigures, sites: Sites, chance: Mapping[str, float], against: AdapterOverlap | None
) -> list[str]:
    changed = [site for site in sites.values() if site.numerical_rank]
    if not changed:
        return ["The update is zero everywhere: this adapter changes nothing."]
    overlaps = [vars(site) for site in against.sites.values()] if against else []
    return render_text(
        "inspecting/summary.jinja",
        whole=whole,
        advice=advice(whole.rank, whole.pooled),
        margin=NEUTRAL_MARGIN,
        base=base_strength(changed) if whole.amplification is not None else None,
        strengths=median_strengths(changed),
        tokens=[*token_cosines(changed, chance)],
        experts=expert_norms(sites),
        head=outstanding_head(sites),
        positions=energy_in_top_fifth(changed),
        intruders=intruder_sentence([s.intruders for s in changed if s.intruders is not None]),
        against=against,
        overlap={n: fmean(o[n] for o in overlaps) for n in next(iter(overlaps), {})},
    ).splitlines()


def base_strength(sites: Sequence[MatrixFigures]) -> float | None:
    """The median strength of the base in the update's directions, relative to random ones."""
    bases = [site.base for site in sites]
    known = [b.projection / b.random_projection for b in bases if b.random_projection]
    return median(known) if known else None


def median_strengths(sites: Sequence[MatrixFigures]) -> list[float]:
    """The median strengths of the base in the directions read and written, or an empty list."""
    strengths = [(site.base.strength_read, site.base.strength_written) for site in sites]
    known = [[one for one in side if one is not None] for side in zip(*strengths, strict=True)]
    return [*map(median, known)] if all(known) else []


def token_cosines(
    sites: Sequence[MatrixFigures], chance: Mapping[str, float]
) -> Iterator[tuple[str, float, float]]:
    """Yields (side, mean cosine of the nearest tokens, cosine by chance)."""
    for verb, side in (("reads", "read"), ("writes", "written")):
        strongest = [tables[0] for site in sites if (tables := getattr(site, verb))]
        cosines = [
            max(abs(one.cosine) for one in (*ends.positive, *ends.negative)) for ends in strongest
        ]
        if cosines:
            yield side, fmean(cosines), chance[verb]


def expert_norms(sites: Sites) -> tuple[int, int, float] | None:
    """The number of matrices of experts, how many changed, and how uneven their updates are."""
    by_module = [[figures.base.norm for figures in of] for of in group_experts(sites).values()]
    norms = [norm for of in by_module for norm in of]
    if not any(norms):
        return None
    uneven = median(max(of) / fmean(of) for of in by_module if any(of))
    return len(norms), sum(norm > 0 for norm in norms), uneven


def outstanding_head(sites: Sites) -> tuple[str, int, float, int] | None:
    """The module, number and share of the head that stands out most, and the number of heads."""
    heads = {path: site.heads for path, site in sites.items() if site.heads}
    known = [(max(shares), path, shares) for path, shares in heads.items() if any(shares)]
    if not known:
        return None
    share, path, shares = max(known, key=lambda one: one[0] * len(one[2]))
    return path, shares.index(share), share, len(shares)


def energy_in_top_fifth(
    sites: Sequence[MatrixFigures],
) -> tuple[tuple[float, float], tuple[float, float], float] | None:
    """The shares of the update's energy in the strongest fifth of the base's input and output
    directions, each with that of an even distribution, and the relative strength of the base.
    """
    known = [(site.base.projection, site.shape, at) for site in sites if (at := site.positions)]
    if not known:
        return None
    read = fmean(sum(at.position_read[:2]) for _, _, at in known)
    written = fmean(sum(at.position_written[:2]) for _, _, at in known)
    reads, writes = (
        fmean(min(shape) / shape[side] for _, shape, _ in known) / 5 for side in (1, 0)
    )
    top = median(projection / at.top_projection for projection, _, at in known)
    return (read, reads), (written, writes), top


def intruder_sentence(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    return (
        f"{sum(map(bool, counts))} of {len(counts)} modules have intruder dimensions ({sum(counts)}"
        f" in all): top {NUM_TOP} singular vectors of the changed weight whose cosine to every"
        f" singular vector of the base is below {MAX_INTRUDER_COSINE}."
    )


def path_sentences(paths: LossPaths) -> list[str]:
    best, lowest = min(paths.scaling, key=lambda point: point[1])
    return render_text(
        "inspecting/paths.jinja",
        losses=dict(paths.scaling), best=best, lowest=lowest, barrier=paths.barrier,
    ).splitlines()  # fmt: skip
