"""The loss of preferences as a module: log-probabilities of completions, and the law over them.

    loss = Preferences(model, Dpo(beta=0.1), how, pad_id)
    loss.references(examples)          log p_ref (n, k), of the adapters below the highest one
    loss(**loss.collate(examples, device), **loss.of_step(examples))

The reference is the model without its highest adapter, the one that trains: no second model. How
the completions of a row meet their prompt depends on the model: it is computed once for both
(`step.branches`), once for each in a packed sequence, or in padded sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorafold.core.attach import only, selection_of
from lorafold.core.draws import named
from lorafold.core.evaluating import evaluating
from lorafold.data.batches import collate, micro_batches
from lorafold.data.branches import Branched
from lorafold.data.examples import NO_LOSS
from lorafold.ops.documents import Documents
from lorafold.step.branches import Branching
from lorafold.step.divergence import beside
from lorafold.step.head import document_losses
from lorafold.step.head_scores import document_scores
from lorafold.step.losses import Loss, head_rules, within
from lorafold.step.preference_laws import Law, Scored, moved


class Preferences(Loss):
    """The loss of a law over rows of completions, in nats, summed over rows.

    Args:
        model: The model with its adapters, of which the highest trains.
        how: How far the model goes with packed documents; None pads.
        pad_id: The token that fills short sequences.
        tokens: The most tokens that are computed at a time where nothing is trained.
    """

    def __init__(
        self, model: nn.Module, law: Law, how: Branching | None, pad_id: int, tokens: int = 2048
    ) -> None:
        super().__init__(model)
        self.law, self.pad_id, self.tokens = law, pad_id, tokens
        self.pace = law.pace
        self.rules = head_rules(model) if law.reads_head else law.rules
        self.how = how if how is not None and how.packs else None

    @property
    def shares(self) -> bool:
        """Whether a prompt is computed once for its completions."""
        return self.how is not None and self.how.shares

    def count(self, example: Branched) -> int:
        return 1

    def micro_batches(
        self, examples: Sequence[Branched], n: int, tokens: int
    ) -> list[Sequence[Branched]]:
        capacity = None if self.how is None else within(self.model, tokens)
        return micro_batches(examples, n, capacity, lambda e: self.size(self.trained(e)))

    def trained(self, example: Branched) -> Branched:
        """The example with those of its completions that have gradients."""
        return example.some(slice(self.law.trained))

    def size(self, example: Branched) -> int:
        """The tokens that are computed for an example."""
        own = sum(len(branch.ids) for branch in example.branches)
        once = self.shared_in([example])
        return own + len(example.shared) * (1 if once else len(example.branches))

    def shared_in(self, examples: Sequence[Branched]) -> bool:
        """Whether the prompts of a batch of these examples are computed once."""
        if self.how is None or not self.shares:
            return False
        longest = max(len(e.shared) + len(b.ids) for e in examples for b in e.branches)
        return self.how.longest is None or longest <= self.how.longest

    def collate(self, examples: Sequence[Branched], device: torch.device) -> dict[str, Tensor]:
        """The `tensors`, each (B, T) or (n, k), of the completions that have gradients."""
        return self.tensors([self.trained(example) for example in examples], device)

    def tensors(self, examples: Sequence[Branched], device: torch.device) -> dict[str, Tensor]:
        """input_ids and labels (B, T) with positions or a mask; `document` (B, T), which completion
        a position belongs to; `reference` (n, k), `desirable` (n,); and where prompts are shared
        `lens` (n, 1 + k), the tokens of each prompt and of each completion.
        """
        found = (self._shared if self.shared_in(examples) else self._apart)(examples)
        found["desirable"] = torch.tensor([e.desirable for e in examples])
        if self.law.has_reference and all(e.reference for e in examples):
            found["reference"] = torch.tensor([e.reference for e in examples])
        return {name: tensor.to(device) for name, tensor in found.items()}

    def _shared(self, examples: Sequence[Branched]) -> dict[str, Tensor]:
        ids: list[int] = []
        positions, targets, document = list[int](), list[int](), list[int]()
        number = 0
        for e in examples:
            s = len(e.shared)
            ids += e.shared
            positions += range(s)
            targets += [NO_LOSS] * s
            document += [number] * s
            for branch in e.branches:
                ids += branch.ids
                positions += range(s, s + len(branch.ids))
                targets += [*branch.labels[1:], NO_LOSS]
                document += [number] * len(branch.ids)
                number += 1
        lens = [[len(e.shared), *(len(branch.ids) for branch in e.branches)] for e in examples]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([targets]),
            "document": torch.tensor([document]),
            "lens": torch.tensor(lens),
        }

    def _apart(self, examples: Sequence[Branched]) -> dict[str, Tensor]:
        documents = [document for e in examples for document in e.documents()]
        found = collate(documents, self.how is not None, self.pad_id)
        number = torch.arange(len(documents))
        if self.how is None:
            found["document"] = number[:, None].expand_as(found["labels"])
        else:
            lengths = torch.tensor([len(document.ids) for document in documents])
            found["document"] = number.repeat_interleave(lengths)[None]
        return found

    def names(
        self, examples: Sequence[Branched], rows: Sequence[int], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        document = inputs["document"]
        row, shared = torch.tensor(
            [(row, len(e.shared)) for row, e in zip(rows, examples, strict=True)],
            device=document.device,
        ).t()
        of, branch = document // (k := len(self.trained(examples[0]).branches)), document % k
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(document.shape[1], device=document.device)
        # a prompt that is computed with each completion has the names that it has if it is shared
        return named(row[of], positions, branch * (positions >= shared[of]))

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """Return the loss in nats, (), summed over the rows; arguments as `collate` gives them.

        A reference that is not given is computed.
        """
        mismatched = inputs.pop("mismatched", None)
        scored = self.beside_reference(labels, **inputs)
        return self.law.loss(scored._replace(mismatched=mismatched)).sum()

    def of_step(self, examples: Sequence[Branched]) -> dict[str, Tensor]:
        """`mismatched` (2,) as `Scored` has it, where rows have completions without gradients; like
        the reference they are computed without dropout.
        """
        others = [example.some(slice(self.law.trained, None)) for example in examples]
        if not all(example.branches for example in others):
            return {}
        found = torch.zeros(2, device=self.device)
        with evaluating(self):
            for group in self.groups(others):
                tensors = self.tensors([others[i] for i in group], self.device)
                found += moved(self.beside_reference(**tensors).ratios)
        return {"mismatched": found}

    def beside_reference(
        self, labels: Tensor, desirable: Tensor, reference: Tensor | None = None, **inputs: Tensor
    ) -> Scored:
        """The log-probabilities (n, k) of a batch, and of its reference, computed if not given.

        Args:
            labels, desirable, reference, inputs: As `tensors` gives them.
        """
        logps, tokens = self.logps(labels, len(desirable), **inputs)
        if reference is None and self.law.has_reference:
            with evaluating(self), self.below():
                reference, _ = self.logps(labels, len(desirable), **inputs)
        return Scored(logps, reference, tokens, desirable)

    def logps(
        self, labels: Tensor, n: int, document: Tensor, lens: Tensor | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log p of the completions in nats (or the scores that a head gives the documents,
        if the law reads them), and the tokens of the completions, both (n, k).

        Args:
            labels, document, lens, inputs: As `tensors` gives them.
        """
        with self.over(labels, lens):
            k = int(document.max()) + 1
            if self.law.reads_head:
                scores, counts = document_scores(
                    self.model, labels, inputs, document, k, self.pad_id
                )
                return scores.view(n, -1), counts.view(n, -1)
            losses, counts = document_losses(self.model, labels, inputs, document, k)
        return -losses.view(n, -1), counts.view(n, -1)

    @contextmanager
    def over(self, labels: Tensor, lens: Tensor | None) -> Iterator[None]:
        """Tell the model's attention the documents of a batch until the `with` block ends.

        Args:
            labels: (B, T), of the batch.
            lens: As `tensors` gives it; None where each completion has its own prompt.
        """
        if lens is None or self.how is None:
            yield
            return
        shared, *_ = lens.t().tolist()
        docs = Documents.branching(shared, lens[:, 1:].tolist(), labels.device)
        with self.how.over(docs):
            yield

    @contextmanager
    def below(self) -> Iterator[None]:
        """A context in which the model is the reference: without its highest adapter."""
        with only(self.model, *selection_of(self.model).names[:-1]):
            yield

    def groups(self, examples: Sequence[Branched]) -> list[list[int]]:
        """The indices of examples in batches of similar length, of at most `tokens` together."""
        sizes = [self.size(e) for e in examples]
        groups: list[list[int]] = [[]]
        for i in sorted(range(len(sizes)), key=sizes.__getitem__):
            if groups[-1] and (len(groups[-1]) + 1) * sizes[i] > self.tokens:
                groups.append([])
            groups[-1].append(i)
        return groups

    def references(self, examples: Sequence[Branched]) -> Iterator[tuple[int, list[float]]]:
        """Yield the index and the log-probabilities under the reference of each example."""
        for group in self.groups(examples):
            with evaluating(self), self.below():
                found = self.scored([examples[i] for i in group]).logps
            yield from zip(group, found.tolist(), strict=True)

    def scored(self, examples: Sequence[Branched]) -> Scored:
        """The log-probabilities of the examples under the model as it is, with their references."""
        inputs = self.tensors(examples, self.device)
        labels, desirable = inputs.pop("labels"), inputs.pop("desirable")
        reference = inputs.pop("reference", None)
        logps, tokens = self.logps(labels, len(examples), **inputs)
        return Scored(logps, reference, tokens, desirable)

    def against_reference(self, examples: Sequence[Branched]) -> tuple[Scored, float]:
        """The log-probabilities of the examples under the model and its reference, and the KL of
        the model to it in nats, summed over the tokens of the completions.
        """
        inputs = self.tensors(examples, self.device)
        labels, lens = inputs.pop("labels"), inputs.pop("lens", None)
        document, desirable = inputs.pop("document"), inputs.pop("desirable")
        inputs.pop("reference", None)
        with self.over(labels, lens):
            found = beside(self.model, labels, inputs, self.below)
        of = document[labels != NO_LOSS]
        sums = (-found.losses, -found.others, torch.ones_like(found.losses))
        documents = sum(len(e.branches) for e in examples)
        logps, reference, tokens = (
            x.new_zeros(documents).index_add(0, of, x).view(len(examples), -1) for x in sums
        )
        return Scored(logps, reference, tokens, desirable), float(found.kl)
