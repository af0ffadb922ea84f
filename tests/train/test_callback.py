"""Hugging Face's Trainer and TRL's SFTTrainer with AdapterCallback."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lorafold as lf
from lorafold.errors import LorafoldError
from noise import moved
from trainer_cases import LORA, SETTINGS, made, rows, train_until_killed
from training_cases import killed

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(24).reshape(3, 8) % 100


def final(run: Path) -> bytes:
    return (run / "adapter" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["trainer", pytest.param("sft", marks=pytest.mark.slow)])
def test_killed_and_resumed_it_has_the_same_bytes(kind, tiny_model_dir, tmp_path, caplog) -> None:
    model_dir, stopped = tiny_model_dir("llama"), tmp_path / "stopped"
    made(kind, model_dir, tmp_path / "straight", LORA)[0].train()
    killed(train_until_killed, kind, model_dir, stopped)
    assert not (stopped / "adapter").exists()
    last = lf.AdapterCallback.last_checkpoint(stopped)
    assert last == str(stopped / "checkpoint-6")
    with caplog.at_level("WARNING"):
        made(kind, model_dir, stopped, LORA)[0].train(resume_from_checkpoint=last)
    assert "missing keys" not in caplog.text
    assert final(stopped) == final(tmp_path / "straight")
    # the steps after the checkpoint count
    assert final(stopped) != final(stopped / "checkpoint-6")


@pytest.mark.parametrize(
    ("spec", "base"),
    [(lf.PiSSA(rank=4), "gemma"), (lf.BitFit(), "qwen2"), (lf.VeRA(rank=8), "gpt2")],
    ids=["pissa", "bitfit", "vera"],
)
def test_a_method_that_files_hold_otherwise_than_memory_does_is_resumed_to_the_byte(
    spec: lf.LoRA, base: str, tiny_model_dir, tmp_path: Path
) -> None:
    made("trainer", tiny_model_dir(base), tmp_path / "straight", spec)[0].train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    trainer, _ = made("trainer", tiny_model_dir(base), tmp_path / "again", spec)
    trainer.train(resume_from_checkpoint=True)
    assert final(tmp_path / "again") == final(tmp_path / "straight")
    assert final(tmp_path / "again") != final(tmp_path / "again" / "checkpoint-6")


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tiny_model_dir, tmp_path: Path) -> None:
    trainer, adapter = made("trainer", tiny_model_dir("llama"), tmp_path / "run", LORA)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    assert load_file(checkpoint / "model.safetensors") == {}
    assert (checkpoint / "model.safetensors").stat().st_size < 100
    fresh = base_of(tiny_model_dir("llama"))
    lf.load(fresh, checkpoint / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, trainer.model.eval()(IDS).logits)
    # the model is as it was: it is saved whole
    trainer.model.save_pretrained(tmp_path / "base")
    written = load_file(tmp_path / "base" / "model.safetensors")
    assert written.keys() == trainer.model.state_dict().keys()
    adapter.detach()
    assert trainer.model.state_dict().keys() < written.keys()


def test_one_checkpoint_and_a_kill_before_it(tiny_model_dir, tmp_path, monkeypatch) -> None:
    """A run that stops while Trainer writes leaves the checkpoint before, which is the last one."""
    asked = ("trainer", tiny_model_dir("llama"), tmp_path / "run", LORA)
    trainer, _ = made(*asked, save_total_limit=1)
    write = trainer._save_optimizer_and_scheduler

    def stopping(output_dir: str) -> None:
        if output_dir.endswith("-6"):
            raise KeyboardInterrupt
        write(output_dir)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", stopping)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-3", "checkpoint-6"]
    last = lf.AdapterCallback.last_checkpoint(tmp_path / "run")
    assert last == str(tmp_path / "run" / "checkpoint-3")
    resumed, _ = made(*asked, save_total_limit=1)
    resumed.train(resume_from_checkpoint=last)
    assert lf.AdapterCallback.last_checkpoint(tmp_path / "run").endswith("checkpoint-8")
    assert lf.AdapterCallback.last_checkpoint(tmp_path / "none") is None


def test_an_interrupted_evaluation_leaves_the_model_whole(tiny_model_dir, tmp_path: Path) -> None:
    class Interrupting(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer, _ = made(
        "trainer", tiny_model_dir("llama"), tmp_path / "run", LORA, Interrupting(),
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.model.save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors").keys() == (
        trainer.model.state_dict().keys()
    )


def test_the_best_adapter_is_the_one_at_the_end(tiny_model_dir, tmp_path: Path) -> None:
    trainer, _ = made(
        "trainer", tiny_model_dir("llama"), tmp_path / "run", LORA,
        eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-3"  # the loss falls, and the largest is asked for
    assert final(tmp_path / "run") == final(best) != final(tmp_path / "run" / "checkpoint-8")


def test_where_trainer_chooses_late_the_base_is_saved_too(tiny_model_dir, tmp_path) -> None:
    trainer, _ = made(
        "trainer", tiny_model_dir("llama"), tmp_path / "run", LORA, eval_strategy="steps",
        eval_steps=4, save_strategy="best", metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    last = Path(lf.AdapterCallback.last_checkpoint(tmp_path / "run"))
    assert load_file(last / "model.safetensors").keys() == trainer.model.state_dict().keys()
    assert len(trainer.model.state_dict()) > 20


@pytest.fixture(scope="module")
def half_done(tiny_model_dir, tmp_path_factory) -> Path:
    """The output directory of a run of 8 steps that was stopped after 3."""
    out = tmp_path_factory.mktemp("half") / "run"
    trainer, _ = made("trainer", tiny_model_dir("llama"), out, LORA, max_steps=8)
    trainer.train()
    shutil.rmtree(out / "checkpoint-8")
    shutil.rmtree(out / "checkpoint-6")
    return out


def base_of(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def resumed(model_dir: Path, out: Path, spec: lf.LoRA) -> None:
    trainer, _ = made("trainer", model_dir, out, spec)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-3"))


@pytest.mark.parametrize("file", ["adapter/adapter_model", "adapter-state/adapter"])
def test_a_damaged_adapter_is_refused(file: str, half_done, tiny_model_dir, tmp_path) -> None:
    out = Path(shutil.copytree(half_done, tmp_path / "run"))
    path = out / "checkpoint-3" / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LorafoldError, match=r"content differs.*there is no complete checkpoint"):
        resumed(tiny_model_dir("llama"), out, LORA)
    assert lf.AdapterCallback.last_checkpoint(out) is None


def test_a_foreign_adapter_is_refused(half_done: Path, tiny_model_dir, tmp_path: Path) -> None:
    out = Path(shutil.copytree(half_done, tmp_path / "run"))
    with pytest.raises(LorafoldError, match=r"of this adapter: found LoRA\(rank=4.*expected"):
        resumed(tiny_model_dir("llama"), out, lf.LoRA(rank=4, alpha=1.0, dropout=0.1))
    moved(other := base_of(tiny_model_dir("llama")), 1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LorafoldError, match=r"of this adapter: .*trained on another base"):
        resumed(tmp_path / "other", out, LORA)
    shutil.rmtree(out / "checkpoint-3" / "adapter")
    with pytest.raises(LorafoldError, match=r"checkpoint-3/adapter: the .* can't be .*: missing"):
        resumed(tiny_model_dir("llama"), out, LORA)


def test_a_checkpoint_elsewhere_is_named(half_done: Path, tiny_model_dir, tmp_path: Path) -> None:
    trainer, adapter = made("trainer", tiny_model_dir("llama"), tmp_path / "new", LORA)
    with pytest.raises(LorafoldError, match=r"resumed another checkpoint than .*new/checkpoint-3"):
        trainer.train(resume_from_checkpoint=str(half_done / "checkpoint-3"))
    trainer.pop_callback(lf.AdapterCallback)
    trainer.add_callback(lf.AdapterCallback(adapter, resume_from=half_done / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=str(half_done / "checkpoint-3"))
    assert final(tmp_path / "new") == final(half_done)


def test_an_existing_end_is_refused_before_the_first_step(tiny_model_dir, tmp_path: Path) -> None:
    model = base_of(tiny_model_dir("llama"))
    adapter = lf.attach(model, LORA)
    adapter.save(tmp_path / "end")
    before = (tmp_path / "end" / WEIGHTS).read_bytes()
    arguments = TrainingArguments(str(tmp_path / "run"), **SETTINGS | {"max_steps": 1})
    refused, allowed = (
        Trainer(model, arguments, train_dataset=rows(), callbacks=[
            lf.AdapterCallback(adapter, tmp_path / "end", overwrite=overwrite)])
        for overwrite in (False, True)
    )  # fmt: skip
    with pytest.raises(LorafoldError, match="end exists"):
        refused.train()
    allowed.train()
    assert (tmp_path / "end" / WEIGHTS).read_bytes() != before
    assert not (tmp_path / "run" / "adapter").exists()


def test_what_the_callback_would_not_save_is_refused(tiny_model, tmp_path: Path) -> None:
    def trainer(model: nn.Module, adapter: lf.Adapter) -> Trainer:
        arguments = TrainingArguments(str(tmp_path / "run"), **SETTINGS)
        return Trainer(model, arguments, callbacks=[lf.AdapterCallback(adapter)])

    model = tiny_model("llama")
    one = lf.attach(model, LORA, name="one")
    with pytest.raises(LorafoldError, match="the adapter 'one' is not attached to the trainer"):
        trainer(tiny_model("llama"), one)
    two = lf.attach(model, LORA, name="two")
    with pytest.raises(LorafoldError, match=r"only the adapter 'one', but 28 other parameters"):
        trainer(model, one)
    two.requires_grad_(False)
    trainer(model, one)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(LorafoldError, match=r"1 other parameters .*: lm_head.weight; freeze them"):
        trainer(model, one)
    one.detach()
    with pytest.raises(LorafoldError, match="the adapter 'one' is not attached"):
        trainer(model, one)
    with pytest.raises(LorafoldError, match="found LlamaForCausalLM, expected the adapter"):
        lf.AdapterCallback(model)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lf.AdaLoRA(), "AdaLoRA computes after each step and adds a penalty to the loss, which"),
        (lf.DoRA(lf.AdaLoRA()), "DoRA computes after each step"),
        (lf.FishMask(), "FishMask computes before the first step"),
        (lf.Full(), "Full trains the base's own weights"),
    ],
    ids=["adalora", "dora", "fish", "full"],
)
def test_a_method_that_a_trainer_would_do_half_of_is_refused(spec, message, tiny_model) -> None:
    with pytest.raises(LorafoldError, match=message):
        lf.AdapterCallback(lf.attach(tiny_model("llama"), spec))


def test_a_penalty_that_a_trainer_would_leave_out_is_refused(tiny_model, monkeypatch) -> None:
    adapter = lf.attach(tiny_model("llama"), LORA)
    lf.AdapterCallback(adapter)
    monkeypatch.setattr(lf.LoRA, "penalty", lambda self, deltas: torch.zeros(()))
    with pytest.raises(LorafoldError, match="LoRA adds a penalty to the loss, which a trainer"):
        lf.AdapterCallback(adapter)
