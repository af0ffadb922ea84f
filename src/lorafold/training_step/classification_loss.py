"""The cross-entropy loss of sequence classification, from the logits at each text's last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.data.classification import LabelledExample
from lorafold.data.prefix_forest import prefix_forest
from lorafold.ops.host_tensors import send_all
from lorafold.training_step.losses import PrefixSharingLoss
from lorafold.training_step.score_head import run_to_head
from lorafold.training_step.shared_prefixes import PrefixSupport, document_layout


class Classification(PrefixSharingLoss):
    """The cross-entropy in nats, summed over texts, for a model with `.logits` (B, classes)."""

    # A text has only one label, so gradients are noisy: at LoRA+'s full learning rate, the last
    # hidden states of all texts become equal before the model learns the classes.
    pace_up = 2 / 15

    def __init__(self, model: nn.Module, pad_id: int, support: PrefixSupport | None = None) -> None:
        super().__init__(model, False, pad_id, support)

    def count(self, example: LabelledExample) -> int:
        return 1

    def collate(
        self, examples: Sequence[LabelledExample], device: torch.device
    ) -> dict[str, Tensor]:
        """Returns labels (n,), and right-padded input_ids and attention_mask (n, T). If prefixes
        are shared, the inputs are input_ids, position_ids and document (1, T), lens (n, 2), and
        `ends` (n,), the index of each text's last token.
        """
        if self.shares_prefixes(examples):
            tree, ends = prefix_forest(examples), []
            for e, place in zip(examples, tree.places, strict=True):
                # transformers classifies at the last token that is not padding
                texts = (i for i, token in enumerate(e.ids) if token != self.pad_id)
                ends.append(int(place[max(texts, default=0)]))
            names, tensors = ("input_ids", "position_ids", "document", "lens"), tree.tensors()
            inputs = {name: tensors[name] for name in names} | {"ends": torch.tensor(ends)}
        else:
            ids, pad = [torch.tensor(e.ids) for e in examples], nn.utils.rnn.pad_sequence
            inputs = {
                "input_ids": pad(ids, batch_first=True, padding_value=self.pad_id),
                "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            }
        inputs["labels"] = torch.tensor([e.label for e in examples])
        return send_all(inputs, device)

    def logits(self, **inputs: Tensor) -> Tensor:
        """The model's logits (n, classes), in fp32, for inputs from `collate`."""
        if (ends := inputs.pop("ends", None)) is None:
            return self.model(**inputs).logits.float()
        del inputs["document"]
        with document_layout(self.support, inputs.pop("lens"), ends.device):
            return run_to_head(self.model, inputs).output[0, ends].float()

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(**inputs), labels, reduction="sum")
