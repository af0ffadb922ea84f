"""The algorithms of policies: TRL's losses on the same tensors, closed forms, and advantages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import nanstd

import lorafold as lf
from lorafold.training import loop
from lorafold.training_step.policy_algorithms import (
    Cispo,
    Grpo,
    Gspo,
    Ppo,
    Reinforce,
    Rloo,
    SampledTokens,
)
from policy_losses import check_loss_of_trl, gradient_of_trl

NAN = float("nan")
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
def test_losses_are_those_of_trl(case: str, tiny_model_dir, tmp_path, monkeypatch) -> None:
    law, settings = CASES[case]
    settings = {"beta": 0.0, **settings}
    check_loss_of_trl(law, settings, tiny_model_dir("llama"), tmp_path, monkeypatch)


STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"objective": "grpo"}, {"loss_type": "dapo"}),
    "grpo as in the paper": (
        {"objective": "grpo", "average": "per-sequence"}, {"loss_type": "grpo"},
    ),
    "Dr. GRPO": (
        {"objective": "grpo", "average": "longest", "scale": "none"}, {"loss_type": "dr_grpo"},
    ),
    "luspo": (
        {"objective": "gspo", "average": "sums"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    "gspo": (
        {"objective": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "cispo": (
        {"objective": "cispo", "clip_high": 4.0}, {"loss_type": "cispo", "epsilon_high": 5.0},
    ),
    "ppo": ({"objective": "ppo"}, {"loss_type": "dapo"}),
    "reinforce": ({"objective": "reinforce"}, {"loss_type": "dapo"}),
    "rloo": ({"objective": "rloo"}, {"loss_type": "luspo"}),
}  # fmt: skip


@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize("case", STEPS)
def test_a_step_weighs_what_it_does_in_trl_where_a_group_is_alike(
    case: str, tiny_model_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group of four has one reward, so it counts in the mean alone."""
    options, settings = STEPS[case]
    options, seen = dict(options), list[Any]()
    recipe = lf.Recipe(
        objective=options.pop("objective"), steps=1, batch=4, storage="fp32", clip=0, lr=1e-9,
        lr_b=1e-9,
        objective_options={"group": 4, "max_new_tokens": 24, **options},
    )  # fmt: skip
    step = loop.train_step

    def watched(job: Any, examples: Any, n: int) -> float:
        def gradients(*_: Any) -> None:
            seen.append([p.grad.clone() for p in job.adapter.parameters()])

        seen.append(examples)
        job.optimizer.register_step_pre_hook(gradients)
        return step(job, examples, n)

    def judge(completion: str, word: str) -> float:
        return 0.1 if word == "green" else len(completion)

    base = tiny_model_dir("llama")
    rows = [{"prompt": f"Say {word}", "word": word} for word in ("red", "blue", "green", "gold")]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        lf.train(recipe, model=base, data=rows, out=tmp_path / "a", rewards=judge)
    rollouts, ours = seen
    assert [any(one.advantages) for one in rollouts].count(False) == 1
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = lf.load(model, tmp_path / "a", trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    gradient_of_trl({"beta": 0.0, **settings}, rollouts, model, tokenizer, 24, tmp_path)
    for x, p in zip(ours, adapter.parameters(), strict=True):
        torch.testing.assert_close(x, p.grad, rtol=1e-3, atol=1e-6)
    assert any(float(x.abs().max()) > 1e-4 for x in ours)


@pytest.mark.parametrize(
    "rewards",
    [
        [[1.0, 0.0, 0.5, 0.5], [2.0] * 4],
        [[1.0, NAN, 0.5, 0.0], [NAN] * 4, [NAN, 3.0, NAN, NAN]],
    ],
    ids=["all", "some missing"],
)
def test_advantages_are_those_of_trl(rewards: Any) -> None:
    rewards = torch.tensor(rewards)
    of = rewards - rewards.nanmean(1, keepdim=True)
    n = rewards.isfinite().sum(1, keepdim=True)
    others = (rewards.nansum(1, keepdim=True) - rewards) / (n - 1)
    for law, expected in [
        (Grpo(), of / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)),
        (Ppo(), of / (nanstd(rewards) + 1e-4)),
        (Rloo(), rewards - others),
        (Reinforce(), of),
    ]:
        torch.testing.assert_close(law.advantages(rewards), expected.nan_to_num(0.0))


def test_the_gradient_of_a_policy_of_two_tokens() -> None:
    """d/dz of the expected reward of softmax(0, z) is p (1 - p) (r_1 - r_0)."""
    z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    p = float(torch.sigmoid(z))
    rewards = torch.tensor([0.2, 1.0], dtype=torch.float64)
    expected = p * (1 - p) * float(rewards[1] - rewards[0])
    for law in (Reinforce(), Grpo(scale="none"), Cispo(scale="none"), Ppo(scale="none")):
        logps = torch.log_softmax(torch.stack([torch.zeros_like(z), z]), 0)
        mean = float((1 - p) * rewards[0] + p * rewards[1])
        drawn = SampledTokens(logps, logps.detach(), None, rewards - mean, torch.arange(2))
        loss = (law.loss(drawn) * torch.tensor([1 - p, p], dtype=torch.float64)).sum()
        (gradient,) = torch.autograd.grad(loss, z)
        assert float(-gradient) == pytest.approx(expected, rel=1e-12)


def test_what_is_clipped() -> None:
    logps = torch.log(torch.tensor([0.7, 0.7, 1.3, 1.3, 1.0]))
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    drawn = SampledTokens(logps.requires_grad_(True), torch.zeros(5), None, a, torch.arange(5))
    expected = [False, True, True, False, False]
    assert Grpo().clipped(drawn).tolist() == expected
    (gradient,) = torch.autograd.grad(Grpo().loss(drawn).sum(), logps)
    assert (gradient == 0).tolist() == expected
    assert not Cispo().clipped(drawn).any()
