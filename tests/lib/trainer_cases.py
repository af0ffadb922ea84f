"""Trainers of Hugging Face and TRL with AdapterCallback, and a callback that kills the process."""

import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import lorafold as lf

LORA = lf.LoRA(rank=4, dropout=0.1)
SETTINGS = {
    "max_steps": 8, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2,
    "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 3,
}  # fmt: skip


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (12, 8), generator=generator).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in ids]


class Killed(TrainerCallback):
    """Stands after AdapterCallback, and kills the process in the middle of step 8."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def made(kind: str, model_dir: Path, out: Path, spec: lf.LoRA, *more, **settings):
    """A trainer of a kind, and the adapter that it trains."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapter = lf.attach(model, spec)
    callbacks = [lf.AdapterCallback(adapter), *more]
    given, held_out = SETTINGS | settings, rows()[:2] if "eval_strategy" in settings else None
    if kind == "trainer":
        arguments = TrainingArguments(str(out), **given)
        beside = {"eval_dataset": held_out, "callbacks": callbacks}
        trainer = Trainer(model, arguments, train_dataset=rows(), **beside)
    else:
        data = Dataset.from_list([{"text": f"Book a table for {n} at eight."} for n in range(12)])
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        arguments = SFTConfig(str(out), max_length=32, bf16=False, **given)
        beside = {"processing_class": tokenizer, "callbacks": callbacks}
        trainer = SFTTrainer(model, arguments, train_dataset=data, **beside)
    return trainer, adapter


def train_until_killed(kind: str, model_dir: Path, out: Path) -> None:
    made(kind, model_dir, out, LORA, Killed())[0].train()
