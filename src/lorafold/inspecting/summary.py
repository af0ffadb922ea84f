"""The advice of `lorafold inspect`: a sentence or two on each kind of figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from lorafold.inspecting.result import (
    AdapterFigures,
    AdapterOverlap,
    LossPaths,
    MatrixFigures,
    Sites,
)
from lorafold.inspecting.spectra import COSINE, TOP, advice
from lorafold.inspecting.updates import of_experts

INDIFFERENT = 0.1  # strengths within 1 +- this count as no preference


def sentences(
    whole: AdapterFigures, sites: Sites, chance: Mapping[str, float], against: AdapterOverlap | None
) -> list[str]:
    changed = [site for site in sites.values() if site.numerical_rank]
    if not changed:
        return ["The update is zero everywhere: this adapter changes nothing."]
    parts = [
        f"For all modules together, {advice(whole.rank, whole.pooled)}. On average, a single module"
        f" needs {whole.effective_rank_95:.1f} directions for 95%.",
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
    bases = [site.base for site in sites]
    known = [b.projection / b.random_projection for b in bases if b.random_projection]
    if not known or whole.amplification is None:
        return "The base weights of this adapter's modules are zero."
    return (
        f"The norm of the update is {whole.relative_norm:.2%} of the norm of the base weights. In"
        f" the update's directions, the base is {median(known):.1f} times as strong as in random"
        f" directions, and the update is {whole.amplification:.2f} times as strong as the base"
        " (amplification); both figures are medians over modules."
    )


def of_strength(sites: Sequence[MatrixFigures]) -> str:
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
        "Strength of the base in the update's directions: the base's energy is"
        f" {read:.2f} times the average along the input directions ({kind(read)}), and"
        f" {written:.2f} times along the output directions ({kind(written)}); medians over modules."
    )


def of_tokens(sites: Sequence[MatrixFigures], chance: Mapping[str, float]) -> str:
    parts = []
    for verb, side in (("reads", "read"), ("writes", "written")):
        strongest = [tables[0] for site in sites if (tables := getattr(site, verb))]
        cosines = [
            max(abs(one.cosine) for one in (*ends.positive, *ends.negative)) for ends in strongest
        ]
        if cosines:
            random = f"(random directions: {chance[verb]:.2f})"
            parts.append(f"{fmean(cosines):.2f} for directions {side} {random}")
    return (
        "The token nearest to the strongest direction of a module has, on average, a cosine of"
        f" {' and '.join(parts)}."
    ) * bool(parts)


def of_evenness(sites: Sites) -> str:
    by_site = [[figures.base.norm for figures in of] for of in of_experts(sites).values()]
    norms = [norm for of in by_site for norm in of]
    if not any(norms):
        return ""
    uneven = median(max(of) / fmean(of) for of in by_site if any(of))
    return (
        f"Of {len(norms)} matrices of experts, {sum(norm > 0 for norm in norms)} changed; the"
        f" largest update in a module is {uneven:.1f} times as large as the mean of its experts"
        " (median over modules)."
    )


def of_heads(sites: Sites) -> str:
    heads = {path: site.heads for path, site in sites.items() if site.heads}
    known = [(max(shares), path, shares) for path, shares in heads.items() if any(shares)]
    if not known:
        return ""
    share, path, shares = max(known, key=lambda one: one[0] * len(one[2]))
    return (
        f"Of all attention heads, head {shares.index(share)} of {path} stands out most: it has"
        f" {share:.0%} of the module's update (an even share of {len(shares)} heads is"
        f" {1 / len(shares):.0%})."
    )


def of_position(sites: Sequence[MatrixFigures]) -> str:
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
        f"{read:.0%} of the update's energy is in the strongest fifth of the base's input"
        f" directions, and {written:.0%} in the strongest fifth of its output directions (an even"
        f" distribution: {reads:.0%} and {writes:.0%}). In the update's directions, the base is"
        f" {top:.0%} as strong as in its own strongest directions."
    )


def of_intruders(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    return (
        f"{sum(map(bool, counts))} of {len(counts)} modules have intruder dimensions ({sum(counts)}"
        f" in all): top {TOP} singular vectors of the changed weight whose cosine to every singular"
        f" vector of the base is below {COSINE}."
    )


def of_other(against: AdapterOverlap | None) -> str:
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
    losses = dict(paths.scaling)
    best, lowest = min(paths.scaling, key=lambda point: point[1])
    size = "smaller" if best < 1 else "larger"
    better = f": a {size} update would be better" * (abs(best - 1) >= 0.3)
    conclusions = [
        f"Along base + t dW, the loss is {losses[0.0]:.4f} at t = 0 and {losses[1.0]:.4f} at t = 1;"
        f" the lowest loss is {lowest:.4f} at t = {best:g}{better}."
    ]
    if paths.barrier is not None:
        how = "connected without" if paths.barrier < 0.01 else "separated by"
        conclusions.append(
            f"The two adapters are {how} a barrier: between them, the loss rises at most"
            f" {paths.barrier:.4f} nats per token above the straight line."
        )
    return conclusions
