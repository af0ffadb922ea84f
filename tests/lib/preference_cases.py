"""Pairs and judged completions, and trainers of TRL that have the values of our adapters."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafold as lf
from lorafold.data.preference_examples import BranchedRow, encode_preferences

PAIRS = [
    {"prompt": "Book a table for four.", "chosen": "The table is booked.", "rejected": "No."},
    {"prompt": "Call the plumber.", "chosen": "He comes at eight.", "rejected": "A lazy dog."},
    {"prompt": "Is it raining in the mountains today?", "chosen": "It is.", "rejected": "A fox."},
    {"prompt": "Hi", "chosen": "Good evening.", "rejected": "it rains it rains it rains"},
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row, name in zip(PAIRS, ("chosen", "rejected", "chosen", "rejected"), strict=True)
]


def adapted(model: Any, seed: int = 0) -> lf.Adapter:
    """A LoRA adapter with both factors drawn, so that it changes the model."""
    torch.manual_seed(seed)
    adapter = lf.attach(model, lf.LoRA(rank=4, alpha=8, dropout=0.0))
    for name, p in adapter.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if name.endswith("B") else 0.1)
    return adapter


def examples_of(rows: list[dict[str, Any]], tokenizer: Any, kind: str = "pairs") -> Any:
    return encode_preferences(rows, tokenizer, 512, kind).examples


def asked(example: BranchedRow) -> tuple[list[int], list[list[int]]]:
    """The ids of the prompt, and those of each completion that are trained on."""
    prompt = [*example.shared, example.branches[0].ids[0]]
    return prompt, [[n for n in branch.labels if n != -100] for branch in example.branches]


def trainer_of(
    kind: Any, config: Any, rows: list[dict[str, Any]], path: Path, saved: Path
) -> Any:
    """A trainer of TRL whose LoRA has the values of a saved adapter."""
    factors = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    peft_config = LoraConfig(**factors, task_type="CAUSAL_LM")
    trainer = kind(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(rows), peft_config=peft_config,
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    state = load_file(saved / "adapter_model.safetensors")
    assert not set_peft_model_state_dict(trainer.model, state).unexpected_keys
    return trainer


def check_gradients(trainer: Any, loss: Tensor, adapter: lf.Adapter, own: Tensor) -> None:
    assert float(own.detach()) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
    loss.backward()
    own.backward()
    theirs = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in adapter.named_parameters()}
    assert len(theirs) == len(ours) > 0
    off = whole = 0.0
    for name, grad in ours.items():
        path, _, factor = name.rpartition(".")
        [match] = [g for n, g in theirs.items() if f"{path}.lora_{factor}." in n]
        off, whole = off + float((grad - match).square().sum()), whole + float(match.square().sum())
    assert math.sqrt(off) <= 1e-5 * math.sqrt(whole)
