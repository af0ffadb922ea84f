"""Plain LoRA in PEFT's format, as servers load it: one rank, scale 1, no patterns.

    B (out, r) contains every scale, alpha = r; smaller ranks are padded with zeros
    share(r) = KL(adapted, truncated to rank r) / KL(adapted, base)     over the prompts, in fp32

PiSSA and OLoRA change the base, so their difference to the original base is written, which has
twice the rank. Adapters of other methods can be truncated to the best LoRA of a given rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorafold.core.anatomy import last_part
from lorafold.core.attach import only, selection_of
from lorafold.core.expert_matrices import module_at
from lorafold.data.render import ensure_chat_template
from lorafold.errors import LorafoldError, NoTokenizer, join_problems
from lorafold.exporting.proof import ReferenceAnswers, kl_divergences, last_logprobs
from lorafold.exporting.target import Factors, Progress, SiteFactors, Subject, Update, update_of
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.record import TRAINED_ON
from lorafold.inspecting.updates import add_lora, pad_rank
from lorafold.layers import layer_of
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.peft.config import CONFIG, WEIGHTS
from lorafold.resolve import Base

ADAPTER_NAME = "canonical"
FILES = (WEIGHTS, CONFIG)
TEMPLATE = "chat_template.jinja"
OTHER_TEMPLATE = f"the chat template differs from the base model's: {TEMPLATE}"
ADAPTER = "adapter"
FORMAT = "a plain LoRA"
HEADS = ("embed_tokens", "lm_head")


def write_plain_lora(base: Base, factors: SiteFactors, out: Path) -> SavedAdapter:
    rank = Update(factors).rank
    same_rank = {path: pad_rank(pair, rank) for path, pair in factors.items()}
    adapter = add_lora(base.mapped().model, same_rank, ADAPTER_NAME)
    adapter.save(out, record={"exported": {"rank": rank}, TRAINED_ON: None})
    return SavedAdapter.open(out)


@dataclass(frozen=True)
class BaseReference:
    """The base as another engine loads it: a Hub ID or directory, its revision, and notes."""

    model: str
    revision: str | None
    notes: tuple[str, ...]


def base_reference(base: Base) -> BaseReference:
    path = base.source.path
    if base.source.gguf is not None:
        note = f"the base is a GGUF file; the engine loads the unpacked copy {path}"
        return BaseReference(str(path), None, (note,))
    if path.parent.name == "snapshots" and not Path(base.name).is_dir():
        return BaseReference(base.name, path.name, ())
    return BaseReference(str(path), None, ())


def write_template(subject: Subject, directory: Path) -> bool:
    try:
        tokenizer = subject.tokenizer
    except NoTokenizer:
        return False
    ensure_chat_template(tokenizer)
    text = tokenizer.chat_template
    if not isinstance(text, str) or text == subject.base.tokenizer().chat_template:
        return False
    (directory / TEMPLATE).write_text(text, encoding="utf-8")
    return True


def tied_heads(subject: Subject) -> list[str]:
    """The adapted embedding and head if tied, because servers can't adapt them separately."""
    if not getattr(subject.config.get_text_config(), "tie_word_embeddings", False):
        return []
    return [path for path in subject.update.factors if last_part(path) in HEADS]


def write_adapter(
    subject: Subject, factors: SiteFactors, directory: Path
) -> tuple[BaseReference, list[str], list[str], list[str]]:
    write_plain_lora(subject.base, factors, directory / ADAPTER)
    base, template = base_reference(subject.base), write_template(subject, directory)
    files = [f"{ADAPTER}/{name}" for name in FILES] + [TEMPLATE] * template
    options = ["--revision", base.revision] if base.revision else []
    options += ["--chat-template", f"{{out}}/{TEMPLATE}"] * template
    notes = [f"rank {subject.update.rank} in every module, scale 1", *base.notes]
    return base, files, options, notes


def zero_factors(subject: Subject, path: str) -> Factors:
    layer = layer_of(module_at(subject.model, path))
    outputs, inputs = layer.shape
    return torch.zeros(*layer.matrices, outputs, 1), torch.zeros(*layer.matrices, 1, inputs)


MAX_LOST = 0.01  # share of the adapters' effect
MAX_RANK = 128
CUT_NAME = "cut"
POWERS = [2**n for n in range(MAX_RANK.bit_length())]


@dataclass(frozen=True)
class Cut(ShownInNotebooks):
    """The result of truncating adapters to a rank.

    error: The norm of the lost part relative to the norm of the updates; `sites` has it by matrix.
    kl, share: KL in nats, and its share of the adapters' effect; None without a proof.
    enough: The smallest power of 2 whose share is below 1%; None if no rank up to 128 is enough.
    """

    rank: int
    error: float
    sites: Mapping[str, float]
    kl: float | None = None
    share: float | None = None
    enough: int | None = None

    def __str__(self) -> str:
        line = f"truncated to rank {self.rank}: {self.error:.2%} of the update's norm is lost"
        if self.share is None:
            return line
        least = f"rank {self.enough}" if self.enough else f"no rank up to {MAX_RANK}"
        return (
            f"{line}, KL {self.kl:.1e} nats, {self.share:.2%} of the adapters' effect;"
            f" {least} loses less than {MAX_LOST:.0%}"
        )


def cut_to(
    subject: Subject, rank: int, scratch: Path, reference: ReferenceAnswers | None
) -> tuple[Subject, Cut]:
    """Replaces the subject's adapters by one plain LoRA of this rank."""
    update = update_of(subject.model, subject.names, rank)
    if update.other:
        lines = [f"{p}: {change}, which LoRA can't represent" for p, change in update.other.items()]
        raise LorafoldError(f"--as-lora {rank}: {join_problems(lines)}")
    if not update.rank:
        raise LorafoldError(f"--as-lora {rank}: the adapters change no weight")
    saved = write_plain_lora(subject.base, update.factors, scratch)
    sites = {name: (lost / whole) ** 0.5 for name, (lost, whole) in update.lost.items() if whole}
    cut = Cut(rank, update.error, sites)
    if reference is not None:
        kls, distance = kl_by_rank(reference, subject, [rank, *POWERS])
        share = kls[rank] / distance if distance else None
        cut = replace(cut, kl=kls[rank], share=share, enough=_sufficient_rank(kls, distance))
    return replace(subject, adapters=(saved,), original=subject.adapters), cut


def sufficient_rank_note(subject: Subject, source: str | Path | None, progress: Progress) -> str:
    """The end of an error message, with a sufficient rank for --as-lora."""
    kls, distance = kl_by_rank(ReferenceAnswers.of(subject, source, progress), subject, POWERS)
    if (rank := _sufficient_rank(kls, distance)) is None:
        return f"; no LoRA up to rank {MAX_RANK} keeps {1 - MAX_LOST:.0%} of the adapters' effect"
    lost = kls[rank] / distance
    return f"; --as-lora {rank} writes the best LoRA and loses {lost:.2%} of the adapters' effect"


@torch.no_grad()
def kl_by_rank(
    reference: ReferenceAnswers, subject: Subject, ranks: list[int]
) -> tuple[dict[int, float], float]:
    """KL(adapted, truncated) in nats by rank, and KL(adapted, base)."""
    model, largest, kls = reference.model, max(ranks), {}
    update = update_of(model, selection_of(model).names, largest)
    factors = {path: pad_rank(pair, largest) for path, pair in update.factors.items()}
    with only(model):
        adapter = add_lora(model, factors, CUT_NAME)
        for rank in sorted({*ranks}, reverse=True):
            for name, factor in adapter.named_parameters():
                if name.endswith(".B"):
                    factor[..., rank:] = 0
            with only(model, CUT_NAME):
                cut = torch.stack([last_logprobs(model, ids) for ids in reference.prompts.ids])
            kls[rank] = float(kl_divergences(reference.answers.adapted, cut).mean())
        adapter.detach()
    return kls, float(kl_divergences(reference.answers.adapted, reference.answers.base).mean())


def _sufficient_rank(kls: Mapping[int, float], distance: float) -> int | None:
    return min((rank for rank in POWERS if kls[rank] < MAX_LOST * distance), default=None)
