"""Preference losses as an `nn.Module`, and the KL divergence between a model and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.contexts import evaluating
from lorafold.data.preference_examples import BranchedRow
from lorafold.ops.autocast import at_least_fp32
from lorafold.ops.cross_entropy import chunks
from lorafold.ops.host_tensors import on_host, send, send_all
from lorafold.training_step.branched_loss import BranchedLoss
from lorafold.training_step.lm_head_loss import at_labels, document_losses, head_logits, run_decoder
from lorafold.training_step.preference_algorithms import Law, Scored, ratio_sums
from lorafold.training_step.score_head import document_scores
from lorafold.training_step.shared_prefixes import PrefixSupport, document_layout


@torch.no_grad()
def losses_and_kl(
    model: Any, labels: Tensor, inputs: Mapping[str, Tensor],
    other: Callable[[], AbstractContextManager[None]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The token losses (n,) of the model, and of the model in the context `other()`, at the n
    labelled positions of labels (B, T); and the KL divergence () of the first from the second, in
    nats, summed over positions.
    """
    h, targets, *_ = run_decoder(model, labels, inputs)
    with other():
        h_other, *_ = run_decoder(model, labels, inputs)
    losses, others = (h.new_empty(len(h), dtype=at_least_fp32(h)) for _ in range(2))
    kl = losses.new_zeros(())
    for run in chunks(len(h)):
        log_p = torch.log_softmax(head_logits(model, h[run]).to(kl.dtype), -1)
        with other():
            log_q = torch.log_softmax(head_logits(model, h_other[run]).to(kl.dtype), -1)
        losses[run] = F.nll_loss(log_p, targets[run], reduction="none")
        others[run] = F.nll_loss(log_q, targets[run], reduction="none")
        kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return losses, others, kl


class Preferences(BranchedLoss):
    """A preference loss over rows of completions, in nats, summed over rows."""

    def __init__(
        self, model: nn.Module, algorithm: Law, support: PrefixSupport | None, pad_id: int,
        tokens: int = 2048,
    ) -> None:  # fmt: skip
        super().__init__(model, support, pad_id, tokens)
        self.algorithm, self.pace = algorithm, algorithm.pace

    def trained(self, example: BranchedRow) -> BranchedRow:
        return example.some(slice(self.algorithm.trained))

    def count(self, example: BranchedRow) -> int:
        return 1

    def collate(self, examples: Sequence[BranchedRow], device: torch.device) -> dict[str, Tensor]:
        """The result of `tensors`, (B, T) or (n, k) each, for the completions that have gradients.
        """
        return self.tensors([self.trained(example) for example in examples], device)

    def tensors(self, examples: Sequence[BranchedRow], device: torch.device) -> dict[str, Tensor]:
        """The tensors of `layout_tensors`, `desirable` (n,), and `reference` (n, k) if known."""
        tensors = self.layout_tensors(examples)
        tensors["desirable"] = torch.tensor([e.desirable for e in examples])
        if self.algorithm.has_reference and all(e.reference for e in examples):
            tensors["reference"] = torch.tensor([e.reference for e in examples])
        return send_all(tensors, device)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The loss in nats, (), summed over the rows of the tensors from `collate`. If these lack
        reference log-probabilities, the forward pass computes them.
        """
        mismatched = inputs.pop("mismatched", None)
        scored = self._scored(True, labels, **inputs)
        return self.algorithm.loss(scored._replace(mismatched=mismatched)).sum()

    def of_step(
        self,
        examples: Sequence[BranchedRow],
        idle: Sequence[BranchedRow] = (),
        passes: Callable[[int], int] = int,
    ) -> dict[str, Tensor]:
        """Returns `mismatched` (2,) for `Scored`, or nothing if all completions have gradients.
        Dropout is off, as for the reference.
        """
        others = [one.some(slice(self.algorithm.trained, None)) for one in (*examples, *idle)]
        if not all(one.branches for one in others):
            return {}
        sums = torch.zeros(2, device=self.device)
        groups = [*self.groups(others[: len(examples)])]
        more = passes(len(groups)) - len(groups)
        with evaluating(self):
            for group in groups + [[len(examples)]] * more:
                tensors = self.tensors([others[i] for i in group], self.device)
                ratios = self._scored(True, **tensors).ratios
                sums += ratio_sums(ratios) if group[0] < len(examples) else 0
        return {"mismatched": sums}

    def _scored(
        self, refer: bool, labels: Tensor, desirable: Tensor, reference: Tensor | None = None,
        **inputs: Tensor,
    ) -> Scored:  # fmt: skip
        """The log-probabilities (n, k) of a batch under the model and the reference; without
        `reference`, the latter are computed if `refer`.
        """
        logps, tokens = self.logps(labels, len(desirable), **inputs)
        if refer and reference is None and self.algorithm.has_reference:
            with evaluating(self), self.below():
                reference, _ = self.logps(labels, len(desirable), **inputs)
        return Scored(logps, reference, tokens, desirable)

    def logps(
        self, labels: Tensor, n: int, document: Tensor, lens: Tensor | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the completions in nats, or a head's scores, and the numbers of
        tokens, (n, k) each.
        """
        batch = self.model, labels, inputs, document, int(on_host(document).max()) + 1
        with document_layout(self.support, lens, labels.device):
            if self.algorithm.reads_head:
                scores, counts = document_scores(*batch, self.pad_id)
            else:
                losses, counts = document_losses(*batch)
                scores = -losses
        return scores.view(n, -1), counts.view(n, -1)

    def references(self, examples: Sequence[BranchedRow]) -> Iterator[tuple[int, list[float]]]:
        """Yields the index and the reference log-probabilities of each example."""
        for group in self.groups(examples):
            with evaluating(self), self.below():
                logps = self.scored([examples[i] for i in group]).logps
            yield from zip(group, logps.tolist(), strict=True)

    def scored(self, examples: Sequence[BranchedRow]) -> Scored:
        """The log-probabilities of the examples under the model, and those under the reference if
        the examples contain them.
        """
        return self._scored(False, **self.tensors(examples, self.device))

    def against_reference(self, examples: Sequence[BranchedRow]) -> tuple[Scored, float]:
        """The log-probabilities of the examples under the model and its reference, and the KL
        divergence between the two in nats, summed over tokens.
        """
        inputs = self.tensors(examples, self.device)
        labels, lens = inputs.pop("labels"), inputs.pop("lens", None)
        document, desirable = inputs.pop("document"), inputs.pop("desirable")
        inputs.pop("reference", None)
        with document_layout(self.support, lens, labels.device):
            losses, others, kl = losses_and_kl(self.model, labels, inputs, self.below)
        of = send(at_labels(document, labels), losses.device)
        sums = -losses, -others, torch.ones_like(losses)
        documents = sum(len(e.branches) for e in examples)
        logps, reference, tokens = (
            x.new_zeros(documents).index_add(0, of, x).view(len(examples), -1) for x in sums
        )
        return Scored(logps, reference, tokens, desirable), float(kl)
