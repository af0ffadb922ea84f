"""TRL's own losses of policies, and lorafold's, of the same tokens of completions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from lorafold.training_step.policy_algorithms import PolicyAlgorithm, SampledTokens
from lorafold.training_step.policy_loss import Rollout

LENGTHS = (3, 7, 1, 5)  # of the completions of two groups of two
LONGEST = 9


def given(reference: bool = True) -> tuple[SampledTokens, Tensor]:
    """Random tokens of completions of these lengths, and the rewards (2, 2)."""
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)

    def drawn(spread: float) -> Tensor:
        return spread * torch.randn(n, generator=generator, dtype=torch.float64)

    old = drawn(1.0) - 2
    logps = (old + drawn(0.3)).requires_grad_(True)
    of = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    rewards = torch.tensor([[1.0, 0.25], [0.0, 2.0]], dtype=torch.float64)
    ref = old + drawn(0.2) if reference else None
    return SampledTokens(logps, old, ref, of.double(), of), rewards


def averaged(law: PolicyAlgorithm, drawn: SampledTokens) -> Tensor:
    losses, lengths = law.loss(drawn), torch.tensor(LENGTHS)
    if law.average == "tokens":
        return losses.mean()
    sums = losses.new_zeros(4).index_add(0, drawn.of, losses)
    over = {"per-sequence": lengths, "longest": LONGEST}.get(law.average, 1)
    return (sums / over).mean()


def padded(x: Tensor, fill: float = 0.0) -> Tensor:
    """(4, 7) of values of tokens."""
    each = torch.split(x, LENGTHS)
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=fill)


def trainer_of_trl(
    model: Any, tokenizer: Any, out: Path, batch: int, longest: int, rloo: bool = False,
    **settings: Any,
) -> Any:  # fmt: skip
    kind, config_class = (RLOOTrainer, RLOOConfig) if rloo else (GRPOTrainer, GRPOConfig)
    config = config_class(
        str(out), per_device_train_batch_size=batch, max_completion_length=longest,
        report_to="none", use_cpu=True, bf16=False, **settings,
    )  # fmt: skip
    return kind(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * batch), processing_class=tokenizer,
    )  # fmt: skip


def loss_of_trl(
    settings: dict[str, Any], drawn: SampledTokens, advantages: Tensor, model_dir: Path, out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[float, Tensor]:  # fmt: skip
    """The loss of TRL's own code with these settings of GRPOConfig, and its gradient."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trainer = trainer_of_trl(model, tokenizer, out, 4, LONGEST, num_generations=2, **settings)
    mask = padded(torch.ones_like(drawn.sampled))
    logps = drawn.logps.detach().clone().requires_grad_(True)
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies",
        lambda *a, **k: (padded(logps), padded(torch.zeros_like(logps)), None),
    )  # fmt: skip
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, max(LENGTHS), dtype=torch.long),
        "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": padded(drawn.sampled), "num_items_in_batch": mask.sum(),
        "old_logps": padded(drawn.sampled).sum(1),
    }  # fmt: skip
    if drawn.reference is not None:
        inputs["ref_per_token_logps"] = padded(drawn.reference)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert logps.grad is not None
    assert float(logps.grad.abs().max()) > 0
    return float(loss), logps.grad


def check_loss_of_trl(
    law: PolicyAlgorithm, settings: dict[str, Any], model_dir: Path, out: Path, monkeypatch: Any
) -> None:
    drawn, rewards = given(reference=bool(law.beta))
    advantages = law.advantages(rewards).flatten()
    expected, gradient = loss_of_trl(settings, drawn, advantages, model_dir, out, monkeypatch)
    ours = averaged(law, drawn._replace(advantages=advantages[drawn.of]))
    ours.backward()
    assert float(ours) == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(drawn.logps.grad, gradient, rtol=1e-7, atol=1e-10)


def gradient_of_trl(
    settings: dict[str, Any], rollouts: Sequence[Rollout], model: Any, tokenizer: Any,
    longest: int, out: Path,
) -> None:  # fmt: skip
    """Add the gradient of TRL's whole step over groups of completions to a model's parameters.

    The advantages are those of the rollouts, which are none of TRL's.
    """
    pairs = [(one.shared, branch) for one in rollouts for branch in one.branches]
    prompts = [[*shared, branch.ids[0]] for shared, branch in pairs]
    own, n = [branch.ids[1:] for _, branch in pairs], len(rollouts[0].branches)
    how = {"num_generations": n, "temperature": 1.0, **settings}
    trainer = trainer_of_trl(model, tokenizer, out, len(own), longest, **how)

    def side_by_side(ids: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, ids))
        fill = [[0] * (width - len(one)) for one in ids]
        rows, masks = [], []
        for f, o in zip(fill, ids, strict=True):
            rows.append([*f, *o] if left else [*o, *f])
            masks.append([*f, *[1] * len(o)] if left else [*[1] * len(o), *f])
        return torch.tensor(rows), torch.tensor(masks)

    prompt_ids, prompt_mask = side_by_side(prompts, left=True)
    completion_ids, completion_mask = side_by_side(own, left=False)
    inputs = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask, "num_items_in_batch": completion_mask.sum(),
        "advantages": torch.tensor([a for one in rollouts for a in one.advantages]),
    }  # fmt: skip
    trainer._compute_loss(model, inputs).backward()
