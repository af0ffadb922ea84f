"""There equals here: how far an engine's answers are from lorafold's own in fp32.

    p = softmax(ours), q = softmax(theirs), of the token after each prompt, over the vocabulary
    kl          sum_v p log(p / q) in nats: the mean, and the largest of a prompt
    distance    the same from ours with the adapters to ours without: what there is to lose
    share       kl / distance
    tied        the prompts in which the engine takes another of two experts that are as good as
                equal (`ties`); kl is then from ours with the same experts, measured from ours
    alone       kl of the two without adapters: how the engine rounds the base
    changed     the same from theirs with the adapters to theirs without; 0 where the engine took
                the files and changed nothing

Both sides are normalized here: an engine's own log-probabilities need not sum to one. Where greedy
texts part, the two likeliest tokens of ours are compared: closer than the largest difference of
log-probabilities that was measured, they are as good as equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.exporting.answers import Answers
from lorafold.files.page import Shown
from lorafold.merging.into import Distance

FAR, LEAST = 10, 1e-6  # a KL that experts may explain: times the median, in nats
LIKELY = 20  # the most likely tokens, whose log-probabilities are compared


@dataclass(frozen=True)
class Theirs:
    """What an engine answered: as `Answers`, with its name and version. `base` is of the first so
    many prompts, None where it has the merged model alone; `unused` are the tensors of the files
    that it did not take, if it tells.
    """

    adapted: Tensor
    base: Tensor | None
    greedy: tuple[tuple[int, ...], ...]
    engine: str
    version: str
    unused: tuple[str, ...] = ()
    other_tokens: tuple[int, ...] = ()  # the prompts whose texts it tokenizes in another way
    other_texts: tuple[int, ...] = ()  # those that its own template application writes so


@dataclass(frozen=True)
class Proof(Shown):
    """The figures above, over so many prompts. `top` counts those with the same likeliest token,
    `greedy` the same greedy texts, `near` those that part where ours has two as good as equal.
    `gap` is the largest difference of log-probabilities among our most likely tokens.
    """

    engine: str
    version: str
    prompts: int
    kl: float
    kl_largest: float
    distance: float
    changed: float | None
    alone: float | None
    tied: int
    measured: float
    top: int
    gap: float
    greedy: int
    near: int
    unused: tuple[str, ...]
    other_tokens: tuple[int, ...]
    other_texts: tuple[int, ...]

    @property
    def share(self) -> float | None:
        """What of the distance was lost; None where the adapters change nothing."""
        return self.kl / self.distance if self.distance else None

    @property
    def rounding(self) -> bool:
        """Whether the adapters are as near as the base is without them."""
        return self.alone is not None and self.kl <= 2 * self.alone

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        n = self.prompts
        part = "" if self.share is None else f", {self.share:.2%} of what the adapters change"
        asked = f"{n} prompt{'s' * (n != 1)}"
        alone = "" if self.alone is None else f" ({self.alone:.1e} for the base alone)"
        top = f"the same likeliest token {self.top} of {n}"
        near = f", {self.near} part where two tokens are as good as equal" * bool(self.near)
        tied = (
            f", with the engine's experts in {self.tied} where two are as good as equal"
            f" ({self.measured:.1e} with ours)"
        ) * bool(self.tied)
        other = {"tokens": self.other_tokens, "texts": self.other_texts}
        told = "".join(
            f"; other {what} there of {len(found)} chats" for what, found in other.items() if found
        )
        return (
            f"{self.engine} {self.version}, {asked}: KL {self.kl:.1e} nats on average,"
            f" {self.kl_largest:.1e} at most{part}{alone}{tied}; {top},"
            f" the same greedy text {self.greedy} of {n}{near}{told}"
        )


def proof(
    ours: Answers,
    theirs: Theirs,
    margin: Callable[[int, int], float],
    exchanged: Callable[[int], Iterable[Tensor]] = lambda prompt: (),
) -> Proof:
    """The figures of an engine's answers to the same prompts. Raises LorafoldError for NaN among
    them, from which nothing has a distance.

    Args:
        margin: of a prompt, and a number of greedy tokens after it, the difference of our two
            largest log-probabilities there.
        exchanged: of a prompt, our answers (vocabulary,) with two close experts exchanged.
    """
    if theirs.adapted.isnan().any():
        raise LorafoldError(f"{theirs.engine} {theirs.version}: it computes NaN for a prompt")
    adapted, bare = theirs.adapted.double().log_softmax(-1), theirs.base
    size = min(adapted.shape[-1], ours.adapted.shape[-1])
    kls = divergences(ours.adapted, adapted)
    measured, usual, tied = float(kls.mean()), max(FAR * float(kls.median()), LEAST), []
    for n in (kls > usual).nonzero().flatten().tolist():
        same = (divergences(row[None], adapted[n : n + 1])[0] for row in exchanged(n))
        if (found := next((kl for kl in same if kl <= usual), None)) is not None:
            kls[n] = found
            tied.append(n)
    likely = ours.adapted.topk(LIKELY).indices.clamp_max(size - 1)
    gaps = ours.adapted.gather(1, likely).double() - adapted.gather(1, likely)
    gaps[tied] = 0
    gap = float(gaps.abs().max())
    pairs = [*zip(ours.greedy, theirs.greedy, strict=True)]
    parted = {n: parting(own, other) for n, (own, other) in enumerate(pairs) if own != other}
    return Proof(
        engine=theirs.engine,
        version=theirs.version,
        prompts=len(kls),
        kl=float(kls.mean()),
        kl_largest=float(kls.max()),
        distance=float(divergences(ours.adapted, ours.base).mean()),
        changed=None if bare is None else float(divergences(adapted[: len(bare)], bare).mean()),
        alone=None if bare is None else float(divergences(ours.base[: len(bare)], bare).mean()),
        tied=len(tied),
        measured=measured,
        top=int((ours.adapted.argmax(-1) == adapted.argmax(-1)).sum()),
        gap=gap,
        greedy=len(pairs) - len(parted),
        near=sum(margin(n, at) <= 2 * gap for n, at in parted.items()),
        unused=theirs.unused,
        other_tokens=theirs.other_tokens,
        other_texts=theirs.other_texts,
    )


def divergences(p: Tensor, q: Tensor) -> Tensor:  # (prompts, vocabulary), both -> (prompts,)
    """KL(p, q) of log-probabilities, over the tokens that both have."""
    size = min(p.shape[-1], q.shape[-1])
    p, q = (side[:, :size].double().log_softmax(-1) for side in (p, q))
    terms = p.exp() * (p - q)
    return terms.where(p.isfinite() & q.isfinite(), 0).sum(-1).clamp_min(0)


def distance(p: Tensor, q: Tensor) -> Distance:  # (prompts, vocabulary), both
    """How far the distributions q are from p, in log-probabilities."""
    size = min(p.shape[-1], q.shape[-1])
    same = p[:, :size].argmax(-1) == q[:, :size].argmax(-1)
    return Distance(float(divergences(p, q).mean()), float(same.double().mean()))


def parting(own: Sequence[int], other: Sequence[int]) -> int:
    """The first place at which two sequences differ."""
    same = [a == b for a, b in zip(own, other, strict=False)]
    return same.index(False) if False in same else len(same)

