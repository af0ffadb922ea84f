"""Configurations of other tools, translated, and what is remarked of them."""

from pathlib import Path

import yaml

from lorafold.config_import.translate import Translation, translate

AXOLOTL = """
base_model: acme/tiny-llama
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
adapter: qlora
lora_model_dir:
datasets:
  - path: acme/recipes
    type: chat_template
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/chef one
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.1
lora_target_linear: true
peft_use_dora: true
loraplus_lr_ratio: 16
gradient_accumulation_steps: 4
micro_batch_size: 3
num_epochs: 4
max_steps: 300
optimizer: adamw_bnb_8bit
lr_scheduler: linear
learning_rate: "2e-4"
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 2
saves_per_epoch: 1
weight_decay: 0.01
max_grad_norm: 0.5
train_on_inputs: false
seed: 7
special_tokens:
  pad_token: "<|pad|>"
wandb_project: chef
wandb_name:
"""


def translated(
    tmp_path: Path, text: str, kind: str | None = None, name: str = "theirs.yml"
) -> Translation:
    path = tmp_path / name
    path.write_text(text)
    return translate(path, kind)


def axolotl_of(tmp_path: Path, **settings) -> Translation:
    """A least axolotl file of LoRA, with these settings over it."""
    least = {
        "base_model": "m", "adapter": "lora", "lora_r": 8, "lora_alpha": 16,
        "lora_target_linear": True, "learning_rate": 1e-4,
    }  # fmt: skip
    return translated(tmp_path, yaml.safe_dump(least | settings), "axolotl")


def llamafactory_of(tmp_path: Path, **settings) -> Translation:
    return translated(tmp_path, yaml.safe_dump({"stage": "sft"} | settings), "llamafactory")


def trl_of(tmp_path: Path, kind: str = "trl-grpo", **settings) -> Translation:
    """A least file of TRL with these settings over it."""
    least = {"model_name_or_path": "m", "use_peft": True, "reward_funcs": ["rewards.score"]}
    return translated(tmp_path, yaml.safe_dump(least | settings), kind)


def grpo_of(tmp_path: Path, outside: dict | None = None, **block) -> Translation:
    """A least file of axolotl that trains a policy, with these settings in its block."""
    least = {"reward_funcs": ["rewards.score"], "max_completion_length": 64}
    return axolotl_of(tmp_path, rl="grpo", trl=least | block, **(outside or {}))


def torchtune_of(tmp_path: Path, **settings) -> Translation:
    least = {
        "model": {
            "_component_": "torchtune.models.llama3.lora_llama3_8b", "lora_attn_modules": ["q_proj"]
        },
        "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": "1e-3"}, "dtype": "fp32",
    }  # fmt: skip
    return translated(tmp_path, yaml.safe_dump(least | settings), "torchtune")


def swift_of(tmp_path: Path, **settings) -> Translation:
    return translated(tmp_path, yaml.safe_dump({"tuner_type": "lora"} | settings), "ms-swift")


MLX = {"model": "acme/tiny", "train": True, "fine_tune_type": "lora", "iters": 600}


def mlx_of(tmp_path: Path, **settings) -> Translation:
    return translated(tmp_path, yaml.safe_dump(MLX | settings))


SCRIPT = """
from unsloth import FastLanguageModel
length = 1024
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="acme/tiny", max_seq_length=length, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64, random_state=SEED)
rows = load_dataset("acme/chats", split="train")
trainer = SFTTrainer(
    model=model,
    train_dataset=rows.map(written),
    args=SFTConfig(
        learning_rate=2e-4, warmup_steps=5, max_steps=60, bf16=supported(), seed=SEED, odd=1
    ),
)
trainer = train_on_responses_only(trainer, response_part="<|assistant|>")
raise SystemExit("a script that is read is not run")
if False:
    model, tokenizer = FastLanguageModel.from_pretrained("saved", max_seq_length=8)
"""


def unsloth_of(tmp_path: Path, text: str = SCRIPT, **parts: str) -> Translation:
    """A script of Unsloth, with other texts in the place of parts of it."""
    for before, after in parts.items():
        text = text.replace(before, after)
    (tmp_path / "train.py").write_text(text)
    return translate(tmp_path / "train.py")


def keys(translation: Translation, how: str) -> set[str]:
    return {e.key for e in getattr(translation, how) if e.given}


def remark(translation: Translation, key: str) -> str:
    return next(e.outcome.remark for e in translation.entries if e.key == key)
