"""What the figures say, in sentences: the advice that stands above them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from lorafold.inspecting.against import TOP
from lorafold.inspecting.base_svd import COSINE
from lorafold.inspecting.spectra import advice

Figures = Mapping[str, Any]
INDIFFERENT = 0.1  # a strength this near to 1 tells nothing


def conclusions(found: Figures) -> list[str]:
    """One sentence or two on each thing that was measured."""
    sites = [site for site in found["sites"].values() if site["numerical_rank"]]
    if not sites:
        return ["The update is zero everywhere: this adapter changes nothing."]
    sentences = [
        of_rank(found["whole"]),
        of_base(found["whole"], sites),
        of_strength(sites),
        of_tokens(sites, found["chance_cosine"]),
    ]
    if "position_read" in sites[0]:
        sentences += [of_position(sites), of_intruders(sites)]
    if "against" in found:
        sentences.append(of_other(found["against"]))
    return [sentence for sentence in sentences if sentence]


def of_rank(whole: Figures) -> str:
    return (
        f"{advice(whole['rank'], whole)} (all sites together; one alone needs"
        f" {whole['effective_rank_95']:.1f} directions for 95% on average)."
    )


def of_base(whole: Figures, sites: list[Figures]) -> str:
    known = [
        site["projection"] / site["random_projection"]
        for site in sites
        if site["random_projection"]
    ]
    if not known or whole["amplification"] is None:
        return "The base's weights are zero where this adapter lies."
    return (
        f"The update is {whole['relative_norm']:.2%} of the base in size. In the update's own"
        f" directions the base is {median(known):.1f} times as strong as in random ones, and the"
        f" update {whole['amplification']:.2f} times the base (amplification; medians over sites)."
    )


def of_strength(sites: list[Figures]) -> str:
    """Empty where the base is zero."""
    known = [site for site in sites if site["strength_read"] is not None]
    if not known:
        return ""
    read, written = (
        median(site[f"strength_{side}"] for site in known) for side in ("read", "written")
    )

    def word(strength: float) -> str:
        return (
            "no preference"
            if abs(strength - 1) < INDIFFERENT
            else "weak directions"
            if strength < 1
            else "strong directions"
        )

    return (
        "Does it amplify weak directions of the base? The base's energy along what it reads is"
        f" {read:.2f} times the average ({word(read)}), along what it writes {written:.2f} times"
        f" ({word(written)}; medians)."
    )


def of_tokens(sites: list[Figures], chance: Figures) -> str:
    """Of the strongest direction of each site on a side that is in the residual stream; empty where
    there is none.
    """

    def nearest(site: Figures, verb: str) -> float:
        return max(abs(entry["cosine"]) for end in site[verb][0].values() for entry in end)

    near = {
        verb: [nearest(site, verb) for site in sites if verb in site]
        for verb in ("reads", "writes")
    }
    parts = [
        f"{fmean(cosines):.2f} for what is {word} (random ones {chance[verb]:.2f})"
        for (verb, cosines), word in zip(near.items(), ("read", "written"), strict=True)
        if cosines
    ]
    return (
        f"The token nearest to a site's strongest direction has a cosine of {', '.join(parts)} on"
        " average."
        if parts
        else ""
    )


def of_position(sites: list[Figures]) -> str:
    top = median(site["projection"] / site["top_projection"] for site in sites)
    read, written = (
        fmean(sum(site[f"position_{side}"][:2]) for site in sites) for side in ("read", "written")
    )
    reads, writes = (
        fmean(min(site["shape"]) / site["shape"][side] for site in sites) / 5 for side in (1, 0)
    )
    return (
        f"The base's strongest fifth of directions holds {read:.0%} of the energy that is read and"
        f" {written:.0%} of what is written (without preference {reads:.0%} and {writes:.0%}); the"
        f" base in the update's directions is {top:.0%} of what it is in its own strongest."
    )


def of_intruders(sites: list[Figures]) -> str:
    some = [site["intruders"] for site in sites if site["intruders"]]
    return (
        f"{len(some)} of {len(sites)} sites have intruder dimensions ({sum(some)} in all): singular"
        f" vectors among the top {TOP} of the changed weight that are like none of the base's"
        f" (cosine below {COSINE})."
    )


def of_other(against: Figures) -> str:
    sites = list(against["sites"].values())
    if not sites:
        return f"Beside {against['adapter']}: no module that both change."

    def mean(name: str) -> float:
        return fmean(site[name] for site in sites)

    first, every, chance = (
        f"{mean(f'{name}_read_{n}'):.2f} and {mean(f'{name}_written_{n}'):.2f}"
        for name, n in (("phi", "first"), ("phi", "all"), ("chance", "all"))
    )
    return (
        f"Beside {against['adapter']}: cosine of the updates {mean('cosine'):+.3f}; phi of what is"
        f" read and of what is written {first} for the first directions, {every} for all (unrelated"
        f" ones {chance})."
    )


def of_paths(paths: Figures) -> list[str]:
    """What the loss does along the lines."""
    at = dict(paths["scaling"])
    best, lowest = min(at.items(), key=lambda point: point[1])
    sentences = [
        f"Along base + t dW the loss falls from {at[0.0]:.4f} at 0 to {at[1.0]:.4f} at 1; least"
        f" {lowest:.4f} at t = {best:g}"
        + (
            "."
            if abs(best - 1) < 0.3
            else ": the update is too large."
            if best < 1
            else ": the update stops short."
        )
    ]
    if "between" in paths:
        rise = paths["barrier"]
        word = "connected without a barrier" if rise < 0.01 else "apart by a barrier"
        sentences.append(
            f"The two adapters are {word}: between them the loss rises at most {rise:.4f} nats"
            " above the straight line."
        )
    return sentences
