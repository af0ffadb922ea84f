"""The laws of policies: TRL's losses on the same tensors, closed forms, and advantages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from lorafold.step.policy_laws import Cispo, Drawn, Grpo, Gspo, PolicyLaw, Ppo, Reinforce, Rloo

LENGTHS = (3, 7, 1, 5)  # of the completions of two groups of two
LONGEST = 9


def given(reference: bool = True) -> tuple[Drawn, Tensor]:
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
    return Drawn(logps, old, ref, of.double(), of), rewards


def averaged(law: PolicyLaw, drawn: Drawn) -> Tensor:
    """The loss over the step, as `step.policy` has it."""
    losses, lengths = law.loss(drawn), torch.tensor(LENGTHS)
    if law.average == "tokens":
        return losses.mean()
    sums = losses.new_zeros(4).index_add(0, drawn.of, losses)
    over = {"per-sequence": lengths, "longest": LONGEST}.get(law.average, 1)
    return (sums / over).mean()


def padded(x: Tensor, fill: float = 0.0) -> Tensor:
    """(4, 7) of values of tokens."""
    return torch.nn.utils.rnn.pad_sequence(
        torch.split(x, LENGTHS), batch_first=True, padding_value=fill
    )


CASES = {
    "grpo": (Grpo(), {"loss_type": "dapo"}),
    "grpo with KL": (Grpo(beta=0.1), {"loss_type": "dapo", "beta": 0.1}),
    "grpo as in the paper": (
        Grpo(beta=0.04, average="per-sequence"), {"loss_type": "grpo", "beta": 0.04},
    ),
    "Dr. GRPO": (
        Grpo(average="longest", scale="none"),
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "clipped higher": (Grpo(clip_high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "ppo": (Ppo(), {"loss_type": "dapo", "scale_rewards": "batch"}),
    "gspo": (
        Gspo(),
        {
            "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "cispo": (Cispo(clip_high=0.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_trl(
    case: str, tiny_model_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of TRL's own code, on the same log-probabilities."""
    law, settings = CASES[case]
    drawn, rewards = given(reference=bool(law.beta))
    settings, model_dir = {"beta": 0.0, **settings}, tiny_model_dir("llama")
    config = GRPOConfig(
        str(tmp_path), report_to="none", use_cpu=True, num_generations=2, bf16=False,
        per_device_train_batch_size=4, max_completion_length=LONGEST, **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config, train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )  # fmt: skip
    mask = padded(torch.ones_like(drawn.drawn))
    theirs = drawn.logps.detach().clone().requires_grad_(True)
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies",
        lambda *a, **k: (padded(theirs), padded(torch.zeros_like(theirs)), None),
    )  # fmt: skip
    advantages = law.advantages(rewards).flatten()
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, max(LENGTHS), dtype=torch.long),
        "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": padded(drawn.drawn), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if drawn.reference is not None:
        inputs["ref_per_token_logps"] = padded(drawn.reference)
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()
    ours = averaged(law, drawn._replace(advantages=advantages[drawn.of]))
    ours.backward()
    assert float(ours) == pytest.approx(float(expected), abs=1e-9)
    torch.testing.assert_close(drawn.logps.grad, theirs.grad, rtol=1e-7, atol=1e-10)
    assert float(theirs.grad.abs().max()) > 0


def test_advantages_are_those_of_trl() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0]])
    group = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    batch = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    torch.testing.assert_close(Grpo().advantages(rewards), group)
    torch.testing.assert_close(Ppo().advantages(rewards), batch)
    left_out = [[1 - 1 / 3, -2 / 3, 0.5 - 0.5, 0.5 - 0.5], [0.0] * 4]
    torch.testing.assert_close(Rloo().advantages(rewards), torch.tensor(left_out))


def test_the_gradient_of_a_policy_of_two_tokens() -> None:
    """d/dz of the expected reward of softmax(0, z) is p (1 - p) (r_1 - r_0); with both tokens drawn
    as often as they are probable, the surrogate has that gradient, for every law without a scale.
    """
    z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    p = float(torch.sigmoid(z))
    rewards = torch.tensor([0.2, 1.0], dtype=torch.float64)
    expected = p * (1 - p) * float(rewards[1] - rewards[0])
    for law in (Reinforce(), Grpo(scale="none"), Cispo(scale="none"), Ppo(scale="none")):
        logps = torch.log_softmax(torch.stack([torch.zeros_like(z), z]), 0)
        mean = float((1 - p) * rewards[0] + p * rewards[1])
        drawn = Drawn(logps, logps.detach(), None, rewards - mean, torch.arange(2))
        loss = (law.loss(drawn) * torch.tensor([1 - p, p], dtype=torch.float64)).sum()
        (gradient,) = torch.autograd.grad(loss, z)
        assert float(-gradient) == pytest.approx(expected, rel=1e-12)


def test_a_bandit_follows_the_exact_recursion() -> None:
    """Steps on the exact expectation of the surrogate raise the reward as gradient ascent does."""
    rewards = torch.tensor([0.0, 1.0, 0.3], dtype=torch.float64)
    ours = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    exact = torch.zeros(3, dtype=torch.float64)
    for _ in range(50):
        logps = torch.log_softmax(ours, 0)
        p = logps.detach().exp()
        drawn = Drawn(logps, logps.detach(), None, rewards - (p * rewards).sum(), torch.arange(3))
        loss = (Grpo(scale="none").loss(drawn) * p).sum()
        (gradient,) = torch.autograd.grad(loss, ours)
        with torch.no_grad():
            ours -= 2.0 * gradient
        q = torch.softmax(exact, 0)
        exact = exact + 2.0 * q * (rewards - (q * rewards).sum())
    torch.testing.assert_close(ours.detach(), exact, rtol=1e-10, atol=1e-10)
    assert float((torch.softmax(exact, 0) * rewards).sum()) > 0.9


def test_k3_is_the_kl_in_expectation() -> None:
    """Its mean over all tokens, each as probable as it is, is the full sum."""
    generator = torch.Generator().manual_seed(1)
    logp, ref = (
        torch.log_softmax(torch.randn(50, generator=generator, dtype=torch.float64), 0)
        for _ in range(2)
    )
    drawn = Drawn(logp, logp, ref, torch.zeros(50), torch.arange(50))
    expected = (logp.exp() * (logp - ref)).sum()
    torch.testing.assert_close((logp.exp() * drawn.kl).sum(), expected)
    assert bool((drawn.kl >= 0).all())


def test_what_is_clipped() -> None:
    logps = torch.log(torch.tensor([0.7, 0.7, 1.3, 1.3, 1.0]))
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    drawn = Drawn(logps.requires_grad_(True), torch.zeros(5), None, a, torch.arange(5))
    expected = [False, True, True, False, False]
    assert Grpo().clipped(drawn).tolist() == expected
    (gradient,) = torch.autograd.grad(Grpo().loss(drawn).sum(), logps)
    assert (gradient == 0).tolist() == expected
    assert not Cispo().clipped(drawn).any()
