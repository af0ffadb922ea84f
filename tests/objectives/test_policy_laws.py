"""The algorithms of policies: TRL's losses on the same tensors, closed forms, and advantages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import nanstd

import lorafold as lf
from conftest import SIZE
from lorafold.engine import Engine, Request
from lorafold.engine.operations import unsteady
from lorafold.errors import LorafoldError
from lorafold.training import loop
from lorafold.training_step.lm_head_loss import token_losses
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
    "rloo": (Rloo(), {"rloo": True}),
    "rloo clipped lower": (Rloo(clip=0.05), {"rloo": True, "epsilon": 0.05}),
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


pytestmark = pytest.mark.usefixtures("unestimated")
ROWS = [{"prompt": word} for word in ("r", "Say blue", "Say green, and then say gold", "Say red")]


def length(completion: str) -> float:
    return len(set(completion))


def mismatch(model: Any, out: Path, exact: bool = True, **changes: Any) -> list[float]:
    """The largest difference of each step."""
    options = {"group": 3, "max_new_tokens": 9, "exact": exact, **changes.pop("options", {})}
    given = {"objective": "grpo", "steps": 3, "batch": 2, "storage": "fp32", "lr": 0.05, "seed": 1}
    above = {name: changes.pop(name) for name in ("over",) if name in changes}
    recipe = lf.Recipe(**{**given, **changes}, objective_options=options)
    lf.train(recipe, model=model, data=ROWS, rewards=length, out=out, overwrite=True, **above)
    found = lf.history(out).steps["largest mismatch"]
    assert len(found) == 3
    return [float(one) for one in found if one is not None]


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "bf16"},
        {"storage": "int8", "method": "dora"},
        {"storage": "nf4", "options": {"updates": 2}},
        {"method": "vera"},
        {"method": "ia3", "beta": 0.1},
        {"method": "full", "lr": 0.01},
        {"method": "lora", "targets": ("lm_head", "q_proj")},
        {"gradient_checkpointing": True, "accumulate": 2},
        {"options": {"temperature": 0.7, "mini_batches": 2}},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_there_is_no_difference(
    changes: dict[str, Any], tiny_model, tiny_model_dir, tmp_path: Path
) -> None:
    shapes = [tuple(p.shape) for p in tiny_model("llama").parameters() if p.dim() == 2]
    if any(unsteady(shapes, dtype) for dtype in (torch.float32, torch.bfloat16)):
        pytest.skip("products of this processor depend on the number of rows")
    assert mismatch(tiny_model_dir("llama"), tmp_path / "out", **changes) == [0.0, 0.0, 0.0]


def test_a_policy_over_an_adapter(tiny_model_dir, tmp_path: Path) -> None:
    mismatch(tiny_model_dir("llama"), tmp_path / "below", method="dora")
    above = {"over": tmp_path / "below", "storage": "fp32"}
    found = mismatch(tiny_model_dir("llama"), tmp_path / "above", **above)
    assert found == [0.0, 0.0, 0.0]


def test_without_it_there_is_rounding(tiny_model_dir, tmp_path: Path) -> None:
    found = mismatch(tiny_model_dir("llama"), tmp_path / "out", exact=False)
    assert all(0 < one < 0.2 for one in found)


@pytest.mark.parametrize("length", [6, 15])
def test_a_pass_has_as_many_tokens_as_it_needs(length: int, tiny_model) -> None:
    with Engine(tiny_model("llama"), slots=1, length=length, as_trained=True) as engine:
        stream = engine.submit(Request("1", (5, 6, 7), length - 3))
        engine.run()
        assert len(stream.result().tokens) == length - 3


def test_few_positions_have_the_bits_of_many() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {"hidden_size": 576}, vocab_size=300)).eval()
    ids = torch.randint(300, (1, 300))
    inputs = {"input_ids": ids}

    def losses(n: int) -> torch.Tensor:
        labels = ids.roll(-1).masked_fill(torch.arange(300) >= n, -100)
        return token_losses(model, labels, inputs, own=True)

    if unsteady([(300, 576)], torch.float32):
        pytest.skip("products of this processor depend on the number of rows")
    whole = losses(290)
    for n in (1, 3, 5, 257, 259):
        assert torch.equal(losses(n), whole[:n])


def test_padded_sequences_are_refused(tiny_model_dir, tmp_path: Path) -> None:
    with pytest.raises(LorafoldError, match="exact: found padded sequences, expected packed ones"):
        mismatch(tiny_model_dir("llama"), tmp_path / "out", packing=False)
    assert not (tmp_path / "out").exists()
