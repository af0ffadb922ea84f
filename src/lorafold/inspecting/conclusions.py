"""The conclusions from the figures, as sentences: the advice at the top of the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from lorafold.inspecting.base_svd import COSINE, TOP
from lorafold.inspecting.heads import evenness
from lorafold.inspecting.spectra import advice
from lorafold.inspecting.updates import site_of

INDIFFERENT = 0.1  # a strength between 1 - this and 1 + this is no preference


def sentences(found: Figures) -> list[str]:
    """One sentence or two on each kind of figure that was measured."""
    sites = [site for site in found["sites"].values() if site["numerical_rank"]]
    if not sites:
        return ["The update is zero everywhere: this adapter changes nothing."]
    parts = [
        of_rank(found["whole"]),
        of_base(found["whole"], sites),
        of_strength(sites),
        of_tokens(sites, found["chance_cosine"]),
    ]
    parts.append(of_experts(found["sites"]))
    parts.append(of_heads(found["sites"]))
    if "position_read" in sites[0]:
        parts += [of_position(sites), of_intruders(sites)]
    if "against" in found:
        parts.append(of_other(found["against"]))
    return [part for part in parts if part]


def of_rank(whole: Figures) -> str:
    """The rank that would be enough (`spectra`)."""
    text = advice(whole["rank"], whole)
    return (
        f"Over all sites together, {text}. A single site needs {whole['effective_rank_95']:.1f}"
        " directions for 95% on average."
    )


def of_base(whole: Figures, sites: list[Figures]) -> str:
    """The size of the update relative to the base (`subspaces`)."""
    known = [
        site["projection"] / site["random_projection"]
        for site in sites
        if site["random_projection"]
    ]
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
        return (
            "no preference"
            if abs(strength - 1) < INDIFFERENT
            else "weak directions"
            if strength < 1
            else "strong directions"
        )

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


def of_experts(sites: Figures) -> str:
    """How evenly the experts changed; empty without experts."""
    by_site = defaultdict[str, list[float]](list)
    for name, site in sites.items():
        if site_of(name) != name:
            by_site[site_of(name)].append(site["norm"])
    every = [norm for norms in by_site.values() for norm in norms]
    if not any(every):
        return ""
    uneven = median(max(norms) / fmean(norms) for norms in by_site.values() if any(norms))
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
