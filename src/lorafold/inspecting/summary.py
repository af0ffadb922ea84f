"""The advice of `lorafold lab inspect`: a sentence or two on each kind of figure."""

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
from lorafold.inspecting.spectra import MAX_INTRUDER_COSINE, NUM_TOP, advice
from lorafold.inspecting.updates import group_experts

NEUTRAL_MARGIN = 0.1  # strengths within 1 +- this count as no preference


def sentences(
    whole: AdapterFigures, sites: Sites, chance: Mapping[str, float], against: AdapterOverlap | None
) -> list[str]:
    changed = [site for site in sites.values() if site.numerical_rank]
    if not changed:
        return ["The update is zero everywhere: this adapter changes nothing."]
    result = [
        f"For all modules together, {advice(whole.rank, whole.pooled)}. On average, a single module"
        f" needs {whole.effective_rank_95:.1f} directions for 95%.",
        base_sentence(whole, changed),
        strength_sentence(changed),
        token_sentence(changed, chance),
        expert_sentence(sites),
        head_sentence(sites),
        position_sentence(changed),
        intruder_sentence([site.intruders for site in changed if site.intruders is not None]),
        overlap_sentence(against),
    ]
    return [sentence for sentence in result if sentence]


def base_sentence(whole: AdapterFigures, sites: Sequence[MatrixFigures]) -> str:
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


def strength_sentence(sites: Sequence[MatrixFigures]) -> str:
    strengths = [(site.base.strength_read, site.base.strength_written) for site in sites]
    known = [[one for one in side if one is not None] for side in zip(*strengths, strict=True)]
    if not all(known):
        return ""

    def kind(strength: float) -> str:
        if abs(strength - 1) < NEUTRAL_MARGIN:
            return "no preference"
        return "weak directions" if strength < 1 else "strong directions"

    read, written = map(median, known)
    return (
        "Strength of the base in the update's directions: the base's energy is"
        f" {read:.2f} times the average along the input directions ({kind(read)}), and"
        f" {written:.2f} times along the output directions ({kind(written)}); medians over modules."
    )


def token_sentence(sites: Sequence[MatrixFigures], chance: Mapping[str, float]) -> str:
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


def expert_sentence(sites: Sites) -> str:
    expert_norms = [[figures.base.norm for figures in of] for of in group_experts(sites).values()]
    norms = [norm for of in expert_norms for norm in of]
    if not any(norms):
        return ""
    uneven = median(max(of) / fmean(of) for of in expert_norms if any(of))
    return (
        f"Of {len(norms)} matrices of experts, {sum(norm > 0 for norm in norms)} changed; the"
        f" largest update in a module is {uneven:.1f} times as large as the mean of its experts"
        " (median over modules)."
    )


def head_sentence(sites: Sites) -> str:
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


def position_sentence(sites: Sequence[MatrixFigures]) -> str:
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


def intruder_sentence(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    return (
        f"{sum(map(bool, counts))} of {len(counts)} modules have intruder dimensions ({sum(counts)}"
        f" in all): top {NUM_TOP} singular vectors of the changed weight whose cosine to every"
        f" singular vector of the base is below {MAX_INTRUDER_COSINE}."
    )


def overlap_sentence(against: AdapterOverlap | None) -> str:
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


def path_sentences(paths: LossPaths) -> list[str]:
    losses = dict(paths.scaling)
    best, lowest = min(paths.scaling, key=lambda point: point[1])
    size = "smaller" if best < 1 else "larger"
    advice = f": a {size} update would be better" * (abs(best - 1) >= 0.3)
    conclusions = [
        f"Along base + t dW, the loss is {losses[0.0]:.4f} at t = 0 and {losses[1.0]:.4f} at t = 1;"
        f" the lowest loss is {lowest:.4f} at t = {best:g}{advice}."
    ]
    if paths.barrier is not None:
        verb = "connected without" if paths.barrier < 0.01 else "separated by"
        conclusions.append(
            f"The two adapters are {verb} a barrier: between them, the loss rises at most"
            f" {paths.barrier:.4f} nats per token above the straight line."
        )
    return conclusions
