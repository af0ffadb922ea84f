"""Files of other tools as recipes, field by field; what comes out is written, read and trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter_files import json_of
from lorafold.api.train import train
from lorafold.config_import.rules import REASONS, UNKNOWN_KEY
from lorafold.config_import.translate import write
from lorafold.peft.config import CONFIG
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe
from preference_cases import PAIRS
from translation_cases import (
    AXOLOTL,
    axolotl_of,
    grpo_of,
    keys,
    llamafactory_of,
    remark,
    swift_of,
    torchtune_of,
    translated,
    trl_of,
)

pytestmark = pytest.mark.usefixtures("unestimated")

TORCHTUNE = """
output_dir: /tmp/chef
model:
  _component_: torchtune.models.llama3_2.qlora_llama3_2_1b
  lora_attn_modules: [q_proj, output_proj]
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 4
  lora_alpha: 8
  use_dora: True
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: ${base}/original/tokenizer.model
  max_seq_len: 1536
base: /tmp/tiny-llama
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ${base}
  model_type: LLAMA3_2
  recipe_checkpoint: null
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: acme/sums
  column_map: {input: question, output: answer}
  packed: True
seed: 7
batch_size: 2
gradient_accumulation_steps: 4
epochs: 2
max_steps_per_epoch: 50
optimizer:
  _component_: bitsandbytes.optim.PagedAdamW8bit
  lr: 3e-4
  weight_decay: 0.05
loss:
  _component_: torchtune.rlhf.loss.DPOLoss
  beta: 0.2
clip_grad_norm: 1.0
dtype: bf16
enable_activation_checkpointing: True
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger}
oddity: 1
"""
SWIFT = """
model: acme/tiny-qwen
train_type: lora
use_hf: true
dataset: [acme/chats#500, rows.jsonl]
lora_rank: 16
target_modules: [q_proj, v_proj]
modules_to_save: [embed_tokens]
quant_bits: 4
quant_method: bnb
per_device_train_batch_size: 2
loss_scale: last_round+ignore_empty_think
packing: true
attn_impl: flash_attn
max_length: 2048
truncation_strategy: right
warmup_ratio: 0.05
system: Be brief.
oddity: 1
"""
LLAMAFACTORY = """
model_name_or_path: acme/tiny-qwen
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 12
lora_target: q_proj, v_proj
use_rslora: true
quantization_bit: 8
dataset: chef,identity
template: qwen3
cutoff_len: 1536
output_dir: saves/chef
logging_steps: 10
save_steps: 100
report_to: tensorboard
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 50
resume_from_checkpoint: null
"""
AXOLOTL_GRPO = """
base_model: acme/tiny-llama
vllm: {host: 0.0.0.0, port: 8000, max_model_len: 2048}
adapter: lora
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
rl: grpo
trl:
  beta: 0.001
  use_vllm: true
  vllm_server_timeout: 300
  async_prefetch: true
  num_generations: 4
  max_completion_length: 256
  temperature: 0.7
  loss_type: dr_grpo
  scale_rewards: false
  epsilon_high: 0.28
  mask_truncated_completions: true
  reward_funcs: [rewards.accuracy, lib.more.form]
  reward_weights: [1.0, 0.5]
  oddity: 1
datasets:
  - {path: acme/sums, type: rewards.transform}
sequence_len: 768
micro_batch_size: 4
gradient_accumulation_steps: 4
num_epochs: 1
learning_rate: 5.0e-6
lr_scheduler: cosine
bf16: true
output_dir: ./out
"""
TRL_GRPO = """
model_name_or_path: acme/tiny-qwen
dataset_name: acme/sums
use_peft: true
lora_r: 8
lora_target_modules: [q_proj, v_proj]
load_in_4bit: true
num_generations: 8
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
importance_sampling_level: sequence
loss_type: grpo
epsilon: 3.0e-4
epsilon_high: 4.0e-4
max_completion_length: 1024
max_prompt_length: 512
use_vllm: true
reward_funcs: [rewards.score, accuracy_reward]
reward_weights: [0.2, 2.0]
learning_rate: 1.0e-5
max_steps: 100
output_dir: out
"""
LLAMAFACTORY_DPO = """
### an adapter of preferences over one of answers
model_name_or_path: acme/tiny-qwen
adapter_name_or_path: saves/answers one
create_new_adapter: true
trust_remote_code: false
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 16
lora_dropout: 0.1
lora_target: all
pref_loss: sigmoid
pref_beta: 0.3
pref_ftx: 0.5
dpo_label_smoothing: 0.1
ref_model: acme/tiny-qwen
ref_model_adapters: saves/answers one
dataset: chef_ranked
template: qwen3
cutoff_len: 1024
output_dir: saves/chef
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 5.0e-6
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
AXOLOTL_KTO = """
base_model: acme/tiny-llama
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
rl: kto
rl_beta: 0.2
kto_desirable_weight: 0.2
datasets:
  - path: acme/thumbs
    type: chatml.argilla
remove_unused_columns: false
sequence_len: 2048
micro_batch_size: 4
num_epochs: 1
learning_rate: 1.0e-5
lr_scheduler: linear
precompute_ref_log_probs: true
output_dir: ./out
"""
TRL_SFT = """
model_name_or_path: acme/tiny-qwen
dataset_name: acme/chats
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
load_in_4bit: true
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
max_length: 2048
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eos_token: <|im_end|>
eval_strategy: steps
eval_steps: 100
output_dir: out
"""
TRL_DPO = """
model_name_or_path: acme/tiny-qwen
dataset_name: acme/pairs
beta: 0.2
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.5]
use_peft: true
lora_r: 32
learning_rate: 5.0e-6
max_length: 512
"""


@dataclass
class File:
    """A file of a tool, its recipe, and the keys that are changed, left out and remarked on."""

    text: str
    tool: str
    recipe: Recipe
    changed: set[str]
    left: set[str]
    remarks: dict[str, str] = field(default_factory=dict)
    command: str = ""


FILES = {
    "axolotl": File(
        AXOLOTL, "axolotl",
        Recipe(
            method="dora", rank=32, alpha=16, dropout=0.1, targets="all-linear", storage="nf4",
            lr=2e-4, lr_b=3.2e-3, schedule="linear", warmup_steps=10, weight_decay=0.01, clip=0.5,
            optimizer="adamw8bit", epochs=4, steps=300, batch=12, accumulate=4, max_length=4096,
            packing=True, gradient_checkpointing=True, eval_fraction=0.05,
            eval_every=38,  # an eighth of 300 steps
            save_every=75, seed=7, trackers=("wandb",),
        ),
        {"micro_batch_size", "wandb_project"},
        {"base_model", "model_type", "datasets", "output_dir", "flash_attention", "special_tokens"},
        {"micro_batch_size": "packed sequences", "datasets": "acme/recipes (chat_template)"},
        "lorafold train --config r.yaml --model acme/tiny-llama --data acme/recipes"
        " --out './outputs/chef one'",
    ),
    "llamafactory": File(
        LLAMAFACTORY, "LLaMA-Factory",
        Recipe(
            method="rslora", rank=12, alpha=24, dropout=0.0, targets=("q_proj", "v_proj"),
            storage="int8", lr=1e-4, lr_b=1e-4, schedule="cosine", warmup=0.1, optimizer="adamw",
            epochs=3, batch=16, accumulate=8, max_length=1536, packing=False, eval_fraction=0.1,
            eval_every=50, save_every=100, trackers=("tensorboard",),
        ),
        set(), {"model_name_or_path", "dataset", "template", "output_dir", "logging_steps"},
    ),
    "axolotl-grpo": File(
        AXOLOTL_GRPO, "axolotl",
        Recipe(
            rank=32, alpha=64, dropout=0.0, targets="all-linear", objective="grpo", beta=0.001,
            objective_options={
                "average": "longest", "clip": 0.2, "clip_high": 0.28, "group": 4, "scale": "none",
                "max_new_tokens": 256, "truncated": "masked", "temperature": 0.7,
                "rewards": ["rewards.py:accuracy", "0.5*lib/more.py:form"],
            },
            storage="bf16", lr=5e-6, lr_b=5e-6, optimizer="adamw", epochs=1, batch=4, accumulate=4,
            max_length=768 + 256,
        ),
        {"lora_dropout", "sequence_len", "trl.beta", "trl.reward_funcs",
         "trl.mask_truncated_completions"},
        {"base_model", "datasets", "output_dir", "vllm", "trl.use_vllm", "trl.vllm_server_timeout",
         "trl.async_prefetch", "trl.oddity"},
        {"trl.oddity": UNKNOWN_KEY, "trl.use_vllm": REASONS["sampling"],
         "datasets": "rows of {prompt} and the columns that the rewards read",
         "trl.reward_funcs": "lists of messages"},
    ),
    "trl-grpo": File(
        TRL_GRPO, "TRL's GRPO",
        Recipe(
            rank=8, alpha=32, dropout=0.0, targets=("q_proj", "v_proj"), objective="gspo",
            objective_options={
                "average": "per-sequence", "clip": 3e-4, "clip_high": 4e-4, "group": 8,
                "scale": "group", "max_new_tokens": 1024, "truncated": "counted",
                "rewards": ["0.2*rewards.py:score"],
            },
            storage="nf4", lr=1e-5, lr_b=1e-5, schedule="linear", warmup=0.0, optimizer="adamw",
            epochs=3, steps=100, batch=4, accumulate=4, max_length=1536,
            gradient_checkpointing=True,
        ),
        {"reward_funcs", "gradient_accumulation_steps", "max_prompt_length"},
        {"model_name_or_path", "dataset_name", "output_dir", "use_vllm"},
        {"reward_funcs": "no file for accuracy_reward",
         "gradient_accumulation_steps": "whole groups"},
        "--model acme/tiny-qwen --data acme/sums --out out --reward 2*FILE.py:FUNCTION",
    ),
    "llamafactory-dpo, an adapter of preferences over one of answers": File(
        LLAMAFACTORY_DPO, "LLaMA-Factory",
        Recipe(
            rank=16, alpha=32, dropout=0.0, targets="all-linear", objective="dpo", beta=0.3,
            objective_options={"sft_weight": 0.5, "label_smoothing": 0.1}, storage="bf16", lr=5e-6,
            lr_b=5e-6, warmup=0.1, optimizer="adamw", epochs=2, batch=8, accumulate=4,
            max_length=1024, packing=False,
        ),
        set(), {"model_name_or_path", "adapter_name_or_path", "dataset", "template", "output_dir"},
        {"dataset": "{prompt, chosen, rejected}",
         "lora_dropout": "turns dropout off in preference training"},
        "--out saves/chef --over 'saves/answers one'",
    ),
    "axolotl-kto": File(
        AXOLOTL_KTO, "axolotl",
        Recipe(
            rank=32, alpha=64, dropout=0.0, targets="all-linear", objective="kto", beta=0.2,
            objective_options={"desirable_weight": 0.2}, storage="nf4", lr=1e-5, lr_b=1e-5,
            schedule="linear", optimizer="adamw", epochs=1, batch=4, max_length=2048, packing=False,
        ),
        set(), {"base_model", "datasets", "output_dir", "precompute_ref_log_probs"},
        {"datasets": "{prompt, completion, label}"},
    ),
    "torchtune": File(
        TORCHTUNE, "torchtune",
        Recipe(
            method="dora", rank=4, alpha=8, dropout=0.0, objective="dpo", beta=0.2,
            targets=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), storage="nf4",
            lr=3e-4, lr_b=3e-4, schedule="constant", warmup=0.0, optimizer="paged-adamw8bit",
            weight_decay=0.05, epochs=2, steps=100, batch=8, accumulate=4, max_length=1536,
            packing=True, gradient_checkpointing=True, seed=7,
        ),
        {"batch_size", "max_steps_per_epoch"},
        {"output_dir", "tokenizer._component_", "tokenizer.path", "checkpointer._component_",
         "checkpointer.checkpoint_dir", "checkpointer.model_type", "dataset._component_",
         "metric_logger", "base", "oddity"},
        {"oddity": UNKNOWN_KEY, "batch_size": "packed sequences"},
        "--model /tmp/tiny-llama --data acme/sums --columns completion=answer,prompt=question"
        " --out /tmp/chef",
    ),
    "ms-swift": File(
        SWIFT, "ms-swift",
        Recipe(
            rank=16, alpha=32, dropout=0.05, targets=("q_proj", "v_proj"), objective="sft",
            modules_to_save=("embed_tokens",), storage="nf4", lr=1e-4, lr_b=1e-4, warmup=0.05,
            betas=(0.9, 0.95), weight_decay=0.1, optimizer="adamw", epochs=3, batch=16,
            accumulate=8, max_length=2048, packing=True, train_on="last", seed=42,
            gradient_checkpointing=True, eval_fraction=0.0,
        ),
        {"per_device_train_batch_size"},
        {"model", "dataset", "attn_impl", "system", "oddity"},
        {"oddity": UNKNOWN_KEY, "dataset": "acme/chats (only 500 rows", "system": "column system"},
        "--model acme/tiny-qwen --data acme/chats --data rows.jsonl --out OUT",
    ),
    "trl-sft": File(
        TRL_SFT, "TRL's SFT",
        Recipe(
            rank=32, alpha=16, dropout=0.05, targets="all-linear", objective="sft", storage="nf4",
            lr=2e-4, lr_b=2e-4, schedule="linear", warmup=0.0, optimizer="adamw", epochs=1,
            batch=16, accumulate=8, max_length=2048, packing=True, gradient_checkpointing=True,
            eval_every=100,
        ),
        {"packing", "per_device_train_batch_size"},
        {"model_name_or_path", "dataset_name", "eos_token", "output_dir"},
        {"assistant_only_loss": "every token of {messages}"}, "--data acme/chats --out out",
    ),
    "trl-dpo": File(
        TRL_DPO, "TRL's DPO",
        Recipe(
            rank=32, alpha=32, dropout=0.0, objective="dpo", beta=0.2,
            objective_options={"sft_weight": 0.5}, storage="bf16", lr=5e-6, lr_b=5e-6,
            schedule="linear", warmup=0.0, optimizer="adamw", epochs=3, batch=8, max_length=512,
            packing=False, gradient_checkpointing=True,
        ),
        {"loss_type"}, {"model_name_or_path", "dataset_name"}, {"loss_type": "micro-batch"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_field_by_field(name: str, tmp_path: Path) -> None:
    wanted = FILES[name]
    found = translated(tmp_path, wanted.text)
    assert (found.tool, found.recipe) == (wanted.tool, wanted.recipe)
    assert (keys(found, "changed"), keys(found, "left")) == (wanted.changed, wanted.left)
    for key, part in wanted.remarks.items():
        assert part in remark(found, key)
    assert found.command("r.yaml").endswith(wanted.command)
    write(found, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == found.recipe
    fields = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    unchanged = {n for n, v in fields.items() if v == Recipe().model_dump(mode="json")[n]}
    assert unchanged <= {"storage"}, unchanged


SHORT = {"max_steps": 2, "warmup_steps": 1}
TEXTS = [{"prompt": f"Book a table for {n}", "completion": f'{{"n": {n}}}'} for n in range(8)]
PROMPTS = [{"prompt": f"Name {n} trees."} for n in range(4)]
FOUR = {"micro_batch_size": 4, "float32": True}
DRAWN = {"num_generations": 2, "max_completion_length": 4}
PLAIN = {"max_steps": 2, "bf16": False, "learning_rate": 1e-3}
# what translates the settings, and rows that the recipe trains on
TRAINED: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]] = {
    "axolotl": (
        axolotl_of, SHORT | {
            "micro_batch_size": 2, "gradient_accumulation_steps": 2, "float32": True}, TEXTS,
    ),
    "llamafactory": (
        llamafactory_of, SHORT | {"per_device_train_batch_size": 2, "learning_rate": 1e-3}, TEXTS,
    ),
    "torchtune": (torchtune_of, {"batch_size": 2, "epochs": 1, "max_steps_per_epoch": 2}, TEXTS),
    "ms-swift": (
        swift_of, {"max_steps": 2, "lora_alpha": 16, "lora_dropout": 0, "torch_dtype": "float32",
        "gradient_accumulation_steps": 1}, TEXTS,
    ),
    "axolotl-dpo": (axolotl_of, SHORT | FOUR | {"rl": "dpo"}, PAIRS * 2),
    "llamafactory-dpo": (
        llamafactory_of, SHORT | {
            "stage": "dpo", "per_device_train_batch_size": 4, "pref_beta": 0.3,
            "dpo_label_smoothing": 0.1}, PAIRS * 2,
    ),
    "trl-grpo": (trl_of, DRAWN | PLAIN | {"per_device_train_batch_size": 4}, PROMPTS),
    "axolotl-grpo": (grpo_of, DRAWN | {"outside": FOUR | PLAIN}, PROMPTS),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_a_translated_recipe_trains(name: str, tiny_model_dir, tmp_path, monkeypatch) -> None:
    tool, settings, rows = TRAINED[name]
    (tmp_path / "rewards.py").write_text(
        "def score(completions, **row):\n    return [len(text) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    write(tool(tmp_path, **settings), tmp_path / "recipe.yaml")
    recipe, model = load_recipe(tmp_path / "recipe.yaml"), tiny_model_dir("llama")
    result = train(recipe, data=rows, out=tmp_path / "a", model=model, device="cpu")
    assert result.steps == 2
    saved = json_of(tmp_path / "a", CONFIG)
    if rows is TEXTS:
        assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (8, 16, 0.0)
    if recipe.objective == "dpo":  # at the first step policy and reference agree
        assert math.isclose(result.train_loss, math.log(2), rel_tol=0.05)
    assert recipe.objective == name.partition("-")[2] or rows is TEXTS
