"""TRL's trainers at their default settings over an attached model: first losses, resumption, and
the reference that lorafold gives them.
"""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import lorafold as lf
from lorafold.errors import LorafoldError
from lorafold.training.trainer_callback import check_reference
from method_cases import IDS, moved
from preference_cases import JUDGED, PAIRS

SPECS: dict[str, Any] = {
    "lora": lf.LoRA(rank=4, dropout=0.1),
    "dora": lf.DoRA(lf.LoRA(rank=4, dropout=0.1)),
    "ia3": lf.IA3(),
    "stack": lf.LoRA(rank=4, dropout=0.1),
}
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
TEXTS = [{"text": f"{row['prompt']} {row['chosen']}"} for row in PAIRS]
COMPARED = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in PAIRS]


def model_of(model_dir: Path, name: str, kind: Any = AutoModelForCausalLM) -> Any:
    """A model with the adapter `run`, which trains, over `sft`, which is frozen, in a stack."""
    torch.manual_seed(0)
    given = {"num_labels": 1} if kind is AutoModelForSequenceClassification else {}
    model = kind.from_pretrained(model_dir, dtype=torch.float32, **given)
    if name == "stack":
        moved(lf.attach(model, lf.LoRA(rank=2), name="sft"), 0.3).requires_grad_(False)
    return model, lf.attach(model, SPECS[name], name="run")


def trainer_of(kind: str, name: str, model_dir: Path, out: Path) -> tuple[Any, lf.Adapter]:
    """A trainer of TRL with default settings but for what a test must bound."""
    settings: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 2, "save_steps": 1, "logging_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    classifier = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    model, adapter = model_of(model_dir, name, classifier)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    beside = {"processing_class": tokenizer}

    def rows(of: list[dict[str, Any]]) -> dict[str, Any]:
        return {"train_dataset": Dataset.from_list(of), **beside}

    if kind == "sft":
        return SFTTrainer(model, SFTConfig(**settings), **rows(TEXTS)), adapter
    if kind == "reward":
        return RewardTrainer(model, RewardConfig(**settings), **rows(COMPARED)), adapter
    if kind == "grpo":
        config = GRPOConfig(**settings, beta=0.1, num_generations=2, max_completion_length=8)
        trainer = GRPOTrainer(model, reward_funcs=[reward], args=config, **rows(PROMPTS))
        trainer.ref_model = lf.reference(model)
        return trainer, adapter
    trained, config, of = {
        "dpo": (DPOTrainer, DPOConfig, PAIRS),
        "kto": (KTOTrainer, KTOConfig, JUDGED),
    }[kind]
    return trained(model, lf.reference(model), args=config(**settings), **rows(of)), adapter


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def first(trainer: Any) -> dict[str, float]:
    return trainer.state.log_history[0]


EXPECTED = {"dpo": math.log(2), "kto": 0.5, "grpo": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *product(("dpo", "kto", "grpo", "sft", "reward"), ("lora", "stack")),
        *(("dpo", "dora"), ("sft", "ia3")),
    ],
)
def test_first_loss_and_resumption(kind: str, name: str, tiny_model_dir, tmp_path: Path) -> None:
    model_dir = tiny_model_dir("llama")
    trainer, adapter = trainer_of(kind, name, model_dir, tmp_path)
    expected = EXPECTED[kind] if kind in EXPECTED else at_start(trainer)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert first(trainer)["loss"] == pytest.approx(expected, abs=5e-3)
    if kind == "grpo":
        assert first(trainer)["kl"] == pytest.approx(0.0, abs=1e-4)
    norm = norm_of(adapter)
    again, fresh = trainer_of(kind, name, model_dir, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert norm_of(fresh) == pytest.approx(norm, rel=1e-6)
    at_one = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert any(".deltas.run." in key for key in at_one)


def norm_of(adapter: lf.Adapter) -> float:
    return math.sqrt(sum(float(p.double().square().sum()) for p in adapter.parameters()))


def at_start(trainer: Any) -> float:
    """The loss of the first batch, under the trainer's own loss."""
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    return float(loss)


def test_the_reference_is_the_model_without_what_trains(tiny_model) -> None:
    model = tiny_model("llama")
    moved(lf.attach(model, lf.LoRA(rank=2, dropout=0.5), name="sft")).requires_grad_(False)
    moved(lf.attach(model, lf.LoRA(rank=2, dropout=0.5), name="dpo"))
    model.train()
    reference = lf.reference(model)
    assert type(reference).__name__ == type(model).__name__
    assert isinstance(reference, type(model))
    assert reference.config is model.config
    with torch.no_grad(), lf.only(model, "sft"):
        expected = model.eval()(IDS).logits
    model.train()
    found = reference.train()(IDS)
    assert torch.equal(found.logits, expected)
    assert not found.logits.requires_grad
    assert model.training
    assert model.model.layers[0].training
    reference.requires_grad_(False)
    reference.eval()
    assert model.model.layers[0].training
    assert any(p.requires_grad for p in model.parameters())
    # what a trainer does to the one is not done to the other
    reference.forward = lambda *args, **kwargs: "patched"
    assert reference(IDS) == "patched"
    assert model(IDS).logits.requires_grad
    again = lf.reference(model)
    plain = model.forward
    model.forward = lambda *args, **kwargs: ("patched too", plain(*args, **kwargs).logits)
    assert again(IDS)[0] == "patched too"
    assert torch.equal(again(IDS)[1], expected)


def test_there_is_no_reference_where_nothing_trains_or_the_base_does(tiny_model) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, lf.LoRA(rank=2), name="sft")
    adapter.requires_grad_(False)
    with pytest.raises(LorafoldError, match="found no active trainable adapter"):
        lf.reference(model)
    lf.attach(model, lf.Full(), name="all")
    with pytest.raises(LorafoldError, match="adapter all trains the base's own weights"):
        lf.reference(model)


@pytest.mark.parametrize("config", [DPOConfig, KTOConfig, GRPOConfig])
def test_the_callback_refuses_a_reference_without_the_adapters_below(
    config: Any, tiny_model, tmp_path: Path, caplog
) -> None:
    model = tiny_model("llama")
    lf.attach(model, lf.LoRA(rank=2), name="sft").requires_grad_(False)
    adapter = lf.attach(model, lf.LoRA(rank=2), name="run")
    args = config(output_dir=str(tmp_path), use_cpu=True, beta=0.1)
    with pytest.raises(LorafoldError, match=r"expected the model with sft, on top .*'run' trains"):
        check_reference(adapter, args)
    lf.reference(model)
    check_reference(adapter, args)
    alone = tiny_model("llama")
    with caplog.at_level("WARNING"):
        check_reference(lf.attach(alone, lf.LoRA(rank=2)), args)
    assert "loads the base again as reference" in caplog.text
    if config is GRPOConfig:
        caplog.clear()
        args.beta = 0.0
        check_reference(lf.attach(tiny_model("llama"), lf.LoRA(rank=2)), args)
        assert not caplog.records


def test_a_second_round_needs_a_reference_of_its_own(tiny_model) -> None:
    model, args = tiny_model("llama"), DPOConfig("out", use_cpu=True, report_to=[])
    first = lf.attach(model, lf.LoRA(rank=2), name="first")
    lf.reference(model)
    check_reference(first, args)
    moved(first, 0.3).requires_grad_(False)
    second = lf.attach(model, lf.LoRA(rank=2), name="second")
    with pytest.raises(LorafoldError, match="expected the model with first"):
        check_reference(second, args)
    lf.reference(model)
    check_reference(second, args)


@pytest.mark.slow
def test_the_callback_stops_a_dpo_over_a_stack(tiny_model_dir, tmp_path: Path) -> None:
    model, adapter = model_of(tiny_model_dir("llama"), "stack")
    trainer = DPOTrainer(
        model, args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(PAIRS), callbacks=[lf.AdapterCallback(adapter)],
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir("llama")),
    )  # fmt: skip
    with pytest.raises(LorafoldError, match="expected the model with sft"):
        trainer.train()
