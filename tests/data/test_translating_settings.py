"""What settings of other tools become in a recipe, and those that are refused by name."""

from functools import partial
from typing import Any

import pytest

from error_cases import refusal
from translation_cases import axolotl_of, grpo_of, llamafactory_of, mlx_of, trl_of, unsloth_of

Settings = dict[str, Any]
FILES = {
    "axolotl": axolotl_of, "axolotl-grpo": grpo_of, "llamafactory": llamafactory_of, "mlx": mlx_of,
    "llamafactory-dpo": partial(llamafactory_of, stage="dpo", model_name_or_path="m"),
    "unsloth": unsloth_of,
}  # fmt: skip


def reader(tool: str) -> Any:
    """What translates a least file of a tool with some settings."""
    return partial(trl_of, kind=tool) if tool.startswith("trl") else FILES[tool]


def each(table: dict[str, list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    return [(tool, *row) for tool, rows in table.items() for row in rows]


SETTINGS: dict[str, list[tuple[Any, ...]]] = {
    "axolotl": [
        ({"load_in_8bit": True}, {"storage": "int8"}),
        ({"bf16": True}, {"storage": "bf16"}),
        ({"bf16": False}, {"storage": "fp32"}),
        ({"bf16": "auto", "fp16": True}, {"storage": "bf16"}),
        ({"float32": True}, {"storage": "fp32"}),
        ({"lr_scheduler": "constant", "warmup_ratio": 0.2}, {"schedule": "constant", "warmup": 0}),
        ({"lr_scheduler": "rex"}, {"schedule": "cosine"}),
        ({"warmup_steps": 5}, {"warmup": 0.03, "warmup_steps": 5}),
        ({"warmup_steps": 0.1}, {"warmup": 0.1, "warmup_steps": None}),
        ({"batch_size": 32, "micro_batch_size": 4}, {"batch": 32, "accumulate": 8}),
        ({"val_set_size": 100}, {"eval_fraction": 0.0}),
        ({"optimizer": "paged_adamw_32bit"}, {"optimizer": "adamw"}),
        ({"adam_beta2": 0.95}, {"betas": (0.9, 0.95)}),
        ({"peft_use_rslora": True}, {"method": "rslora"}),
        ({"peft_use_dora": True, "peft_use_rslora": True}, {"options": {"over": "rslora"}}),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, {"options": {"init": "loftq"}}),
        ({"peft_init_lora_weights": "pissa_niter_4"}, {"options": {"niter": 4}}),
        ({"use_wandb": True, "use_tensorboard": True}, {"trackers": ("wandb", "tensorboard")}),
        ({"tokens": ["<|a|>"]}, {"new_tokens": ("<|a|>",)}),
        (
            {"chat_template": "jinja", "chat_template_jinja": "r.jinja"},
            {"chat_template": "r.jinja"},
        ),
        ({"adapter": None, "lora_r": None}, {"method": "full", "rank": None, "lr_b": None}),
        ({"lora_model_dir": "old"}, {"rank": None, "targets": None, "lr": 1e-4}),
    ],
    "llamafactory": [
        ({"finetuning_type": "full", "bf16": True}, {"method": "full", "storage": "fp32"}),
        ({"finetuning_type": "full", "pure_bf16": True}, {"method": "full", "storage": "bf16"}),
        ({"pissa_init": True}, {"method": "pissa", "options": {"niter": 16}}),
        ({"quantization_bit": 2, "quantization_method": "hqq"}, {"storage": "nf4"}),
        ({"lora_target": "all"}, {"targets": "all-linear"}),
        ({"additional_target": "embed_tokens,lm_head"},
         {"modules_to_save": ("embed_tokens", "lm_head")}),
        ({"stage": "pt"}, {"objective": "sft", "packing": True}),
        ({"packing": True}, {"packing": True}),
        ({"neat_packing": True}, {"packing": True}),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup": 0.1}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"adapter_name_or_path": "old", "lora_rank": 4}, {"rank": None, "alpha": None}),
        ({"stage": "kto"}, {"objective": "kto", "beta": 0.1, "objective_options": {}}),
        (
            {"stage": "kto", "kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5, "pref_beta": 1},
            {
                "beta": 1.0,
                "objective_options": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
            },
        ),
        ({"stage": "rm"}, {"objective": "reward", "beta": None, "objective_options": {}}),
        ({"stage": "rm", "lora_dropout": 0.1, "pref_ftx": 1.0}, {"dropout": 0.1}),
        ({"stage": "dpo", "packing": True}, {"packing": False, "lr": 5e-5, "lr_b": 5e-5}),
        ({"stage": "dpo", "finetuning_type": "full", "pref_loss": "ipo"},
         {"objective": "ipo", "method": "full", "lr": 5e-5}),
        ({"stage": "sft", "pref_beta": 0.5, "pref_ftx": 1.0, "pref_loss": "ipo"},
         {"objective": "sft", "beta": None, "objective_options": {}}),
        ({"stage": "dpo", "pref_loss": "orpo", "ref_model": "another"}, {"objective": "orpo"}),
    ],
    "mlx": [
        ({"grad_accumulation_steps": 4}, {"steps": 150, "batch": 16, "accumulate": 4}),
        ({"lr_schedule": {"name": "cosine_decay", "warmup": 10, "arguments": [2e-5, 600]}},
         {"lr": 2e-5, "lr_b": 2e-5, "schedule": "cosine", "warmup_steps": 10}),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": ["1e-5", 0.0, 600]}},
         {"schedule": "linear", "warmup": 0.0}),
        ({"optimizer": "adamw"}, {"weight_decay": 0.01}),
        ({"optimizer": "adamw", "optimizer_config": {"adamw": {"betas": [0.9, 0.98]}}},
         {"betas": (0.9, 0.98)}),
        ({"model": "mlx-community/tiny-4bit"}, {"storage": "nf4"}),
        ({"fine_tune_type": "dora"}, {"method": "dora"}),
        ({"fine_tune_type": "full", "num_layers": -1}, {"method": "full", "lr_b": None}),
    ],
    "trl-grpo": [
        ({}, {"batch": 1, "accumulate": 1, "beta": None}),
        ({"per_device_train_batch_size": 1}, {"batch": 1}),  # of eight processes
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3},
         {"batch": 6, "accumulate": 3}),
        ({"gradient_accumulation_steps": 2, "num_generations": 16}, {"batch": 1, "accumulate": 1}),
        ({"scale_rewards": True, "beta": 0.1}, {"beta": 0.1}),
        ({"use_peft": False}, {"method": "full", "storage": "fp32", "lr": 1e-6, "lr_b": None}),
        ({"dtype": "bfloat16"}, {"storage": "bf16"}),
        ({"bf16": False}, {"storage": "fp32"}),
        ({"torch_dtype": "auto", "use_dora": True}, {"storage": "auto", "method": "dora"}),
        ({"load_in_8bit": True}, {"storage": "int8"}),
        ({"chat_template_kwargs": {"enable_thinking": False}},
         {"template_kwargs": {"enable_thinking": False}}),
    ],
    "unsloth": [
        ({"load_in_4bit=True": "load_in_8bit=True"}, {"storage": "int8"}),
        ({"load_in_4bit=True": "load_in_4bit=False"}, {"storage": "auto"}),
        ({"load_in_4bit=True": "full_finetuning=True"}, {"method": "full", "lr_b": None}),
        ({"r=32": "r=32, use_rslora=True, lora_dropout=0.1"}, {"method": "rslora", "dropout": 0.1}),
        ({"SFT": "DPO"}, {"objective": "dpo", "beta": 0.1, "lr": 2e-4}),
        ({"max_steps=60": "max_length=512, packing=True"}, {"max_length": 512, "packing": True}),
    ],
}  # fmt: skip
OF_TRAINERS = [
    ("trl-sft", {}, {"objective": "sft", "lr": 2e-5, "dropout": 0.05, "max_length": 1024}),
    ("trl-sft", {"max_seq_length": 512}, {"max_length": 512}),
    ("trl-sft", {"max_length": None}, {"max_length": 1024}),
    ("trl-sft", {"chat_template_path": "a.jinja"}, {"chat_template": "a.jinja"}),
    ("trl-dpo", {"loss_type": "ipo"}, {"objective": "ipo", "beta": 0.1, "lr": 1e-6}),
    ("trl-dpo", {"loss_type": "hinge"}, {"objective": "hinge"}),
    ("trl-dpo", {"loss_type": "robust", "label_smoothing": 0.1},
     {"objective": "dpo", "objective_options": {"loss_type": "robust", "label_smoothing": 0.1}}),
    ("trl-dpo", {"loss_type": "exo_pair"}, {"objective_options": {"loss_type": "exo"}}),
    ("trl-dpo", {"disable_dropout": False}, {"dropout": 0.05}),
    ("trl-kto", {"desirable_weight": 1.5},
     {"objective": "kto", "objective_options": {"desirable_weight": 1.5}}),
    ("trl-orpo", {"beta": 0.3}, {"objective": "orpo", "beta": 0.3, "dropout": 0.0}),
    ("trl-cpo", {"loss_type": "simpo"}, {
        "objective": "simpo", "beta": 0.1,
        "objective_options": {"gamma": 0.5, "sft_weight": 1.0}}),
    ("trl-cpo", {"loss_type": "simpo", "cpo_alpha": 0, "simpo_gamma": 1.0},
     {"objective_options": {}}),
    ("trl-reward", {"center_rewards_coefficient": 0.01, "lora_task_type": "SEQ_CLS",
                    "lora_modules_to_save": ["score"]},
     {"objective": "reward", "objective_options": {"centre": 0.01}, "lr": 1e-4,
      "modules_to_save": ()}),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "settings", "fields"), [*each(SETTINGS), *OF_TRAINERS])
def test_settings_become_fields(tmp_path, tool: str, settings: Settings, fields: Settings) -> None:
    recipe = reader(tool)(tmp_path, **settings).recipe
    assert {name: getattr(recipe, name) for name in fields} == fields


POLICIES = [
    ({"num_iterations": 2, "delta": 2}, "delta: found 2, but with num_iterations"),
    ({"loss_type": "sapo"}, "loss_type: found 'sapo', but lorafold does not support this"),
    ({"loss_type": "ppo"}, "loss_type: found 'ppo', expected dapo or bnpo"),
    ({"loss_type": "cispo"}, "'cispo' and 0.2 as epsilon_high, but with cispo it is the upper"),
    ({"loss_type": "cispo", "epsilon_high": 5, "importance_sampling_level": "sequence"},
     "importance_sampling_level: found 'sequence'"),
    ({"scale_rewards": "std"}, "scale_rewards: found 'std', expected group or batch or none"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "lorafold sums rewards before"),
    ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model: found True, but lorafold's reference"),
    ({"num_generations": 1}, "num_generations: found 1, expected 2 or more"),
    ({"reward_weights": [1, 2]}, "found 1 functions and 2 reward_weights"),
    ({"reward_funcs": ["acme/judge"]}, "reward_funcs: found 'acme/judge', a reward model"),
    ({"epsilon": 2}, "epsilon"),
    ({"top_entropy_quantile": 0.2}, "top_entropy_quantile: found 0.2"),
    ({"entropy_coef": 0.1}, "entropy_coef: found 0.1"),
]
REFUSED: dict[str, list[tuple[Any, ...]]] = {
    "axolotl-grpo": [*POLICIES, ({"rollout_func": "play"}, "rollout_func: found 'play'")],
    "trl-grpo": POLICIES,
    "axolotl": [
        ({"rl": "gdpo"}, "rl: found 'gdpo', but lorafold sums rewards before it normalizes them"),
        ({"rl": "ebft"}, "rl: found 'ebft', but lorafold has no energy-based objective"),
        ({"rl": "ppp"}, "rl: found 'ppp', expected dpo or ipo"),
        ({"rl": "dpo", "sample_packing": True}, "rl: found 'dpo' and sample_packing"),
        ({"rl": "simpo"}, "simpo_gamma missing"),
        ({"rl": "dpo", "dpo_loss_type": ["aot"]}, "dpo_loss_type: found ['aot']"),
        ({"rl": "dpo", "dpo_loss_type": ["ipo", "sft"]}, "ipo does not support an SFT term"),
        ({"rl": "dpo", "dpo_loss_type": ["sigmoid", "hinge"]}, "one loss of weight 1"),
        ({"rl": "dpo", "dpo_loss_type": ["ipo"], "dpo_loss_weights": [2]}, "with weights [2.0]"),
        ({"rl": "dpo", "dpo_loss_weights": [1]}, "dpo_loss_weights: found [1] without"),
        ({"rl": "dpo", "dpo_use_weighting": True}, "dpo_use_weighting: found True"),
        ({"rl": "dpo", "rpo_alpha": 1.0}, "rpo_alpha: found 1.0, but axolotl rejects this"),
        ({"rl": "kto", "kto_desirable_weight": -1}, "kto_desirable_weight: objective kto"),
        ({"reward_model": True, "num_labels": 3}, "num_labels: found 3"),
        ({"process_reward_model": True}, "process_reward_model: found True"),
    ],
    "llamafactory-dpo": [
        ({"pref_loss": "kto_pair"}, "pref_loss: found 'kto_pair'"),
        ({"pref_loss": "sigmoidal"}, "pref_loss: found 'sigmoidal', expected sigmoid or hinge"),
        ({"pref_loss": "orpo", "pref_ftx": 0.5}, "pref_ftx: found 0.5, but lorafold's objective"),
        ({"pref_loss": "ipo", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing: found 0.1"),
        ({"dpo_label_smoothing": 0.7}, "dpo_label_smoothing: objective dpo: label_smoothing"),
        ({"pref_beta": 0}, "pref_beta: objective dpo: beta: found 0.0, expected"),
        ({"pref_bco_weight": 0.5}, "pref_bco_weight: found 0.5"),
        ({"ld_alpha": 0.5}, "ld_alpha: found 0.5"),
        ({"pissa_init": True}, "pissa_init: found True, which LLaMA-Factory rejects"),
        ({"neat_packing": True}, "neat_packing: found True, which LLaMA-Factory rejects"),
        ({"mask_history": True}, "mask_history: found True"),
        ({"ref_model": "other"}, "ref_model: found other as the reference, but lorafold loads"),
        ({"ref_model": "m", "ref_model_adapters": "a"}, "ref_model: found a on top of m as"),
        ({"ref_model": "m", "adapter_name_or_path": "a", "create_new_adapter": True},
         "ref_model: found m as the reference"),
        ({"stage": "kto", "pref_ftx": 0.1}, "objective kto does not support an SFT term"),
    ],
    "mlx": [
        ({"fine_tune_type": "full"}, "the last 16 layers (num_layers)"),
        ({"lora_parameters": {"rank": 8}}, "lora_parameters: scale, dropout missing"),
        ({"lr_schedule": "cosine"}, "lr_schedule: found 'cosine', expected an object"),
        ({"optimizer": "lion"}, "optimizer: found 'lion'"),
    ],
    "unsloth": [
        ({"text": "model = ("}, "train.py: line 1: not valid Python"),
        ({"text": "SFTTrainer(args=SFTConfig(seed=1))"},
         "found no from_pretrained call of FastLanguageModel or FastModel"),
        ({"r=32": "r='many'"}, "get_peft_model.r: found 'many', expected a number"),
    ],
}  # fmt: skip
BY_TRAINERS = [
    ("trl-sft", {"loss_type": "dft"}, "loss_type: found 'dft'"),
    ("trl-dpo", {"loss_type": "aot"}, "expected sigmoid or hinge or ipo"),
    ("trl-dpo", {"f_divergence_type": "js_divergence"}, "f_divergence_type: found 'js_div"),
    ("trl-dpo", {"use_weighting": True}, "use_weighting: found True"),
    ("trl-dpo", {"ld_alpha": 0.5}, "ld_alpha: found 0.5"),
    ("trl-dpo", {"sync_ref_model": True}, "sync_ref_model: found True"),
    ("trl-kto", {"loss_type": "apo_zero_unpaired"}, "lorafold's kto supports only the loss kto"),
    ("trl-cpo", {}, "lorafold supports only simpo of CPO's losses"),
    ("trl-cpo", {"loss_type": "simpo", "alpha": 0.1}, "alpha: found 0.1"),
]


@pytest.mark.parametrize(("tool", "settings", "part"), [*each(REFUSED), *BY_TRAINERS])
def test_what_lorafold_has_not_is_refused_by_name(tmp_path, tool: str, settings, part: str) -> None:
    assert part in refusal(reader(tool), tmp_path, **settings)
