"""axolotl's training YAML: the table of rules, one for a key, with axolotl's own defaults.

Read off axolotl's configuration schema and its builders as of July 2026. Values that need more
than a conversion are read in `axolotl_readers`, those of preferences and policies in modules
of their own, and keys that a recipe has no field for are listed in `no_counterpart`.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating import axolotl_policies as policies
from lorafold.translating import axolotl_preferences as preferences
from lorafold.translating import axolotl_readers as readers
from lorafold.translating import trainer
from lorafold.translating.axolotl_preferences import objective_of
from lorafold.translating.axolotl_rows import datasets
from lorafold.translating.convert import boolean, integer, names, number
from lorafold.translating.no_counterpart import AXOLOTL, SYSTEM
from lorafold.translating.policies import OWN_DRAWS
from lorafold.translating.preferences import law_option
from lorafold.translating.rules import (
    Outcome,
    Rule,
    Settings,
    all_without,
    changed,
    left,
    option,
    refusing,
    taken,
    to,
    without,
)

OF_AXOLOTL = "axolotl.integrations."
LEARNS_OTHERWISE = {
    "densemixer": "passes gradients to the router through every expert",
    "diffusion": "trains a model that fills in masks",
    "grokfast": "filters the gradients of past steps",
    "hatchery": "trains on another machine",
    "kd": "learns a teacher's probabilities",
    "llm_compressor": "keeps weights at zero",
    "nemo_gym": "is rewarded by environments of its own",
    "spectrum": "trains the layers with the most signal",
}
LEARNS_THE_SAME = (
    "cut_cross_entropy", "expert_parallel", "kernels", "liger", "lm_eval", "swanlab"
)  # fmt: skip


def plugins(value: Any, settings: Settings) -> Outcome:
    """`plugins`. LorafoldError for one that lorafold has nothing in place of."""
    others = []
    for name in names(value):
        part = name.removeprefix(OF_AXOLOTL).partition(".")[0]
        if name.startswith(OF_AXOLOTL) and part in LEARNS_OTHERWISE:
            raise LorafoldError(f"found {name}, which {LEARNS_OTHERWISE[part]}: lorafold does not")
        if not (name.startswith(OF_AXOLOTL) and part in LEARNS_THE_SAME):
            others.append(name)
    if others:
        return left(f"what {', '.join(others)} does there is not known and not done")
    return left("they make steps faster there, measure or log, and do not change what is learned")


SIGNS = (
    "base_model adapter micro_batch_size sequence_len num_epochs lora_r lora_target_linear"
    " sample_packing val_set_size lora_target_modules lora_model_dir"
)

RULES: tuple[Rule, ...] = (
    Rule("adapter", readers.adapter, readers.NO_ADAPTER),
    Rule("peft_use_dora", readers.of_lora(readers.part_of_method), False),
    Rule("peft_use_rslora", readers.of_lora(readers.part_of_method), False),
    Rule("peft_init_lora_weights", readers.of_lora(readers.part_of_method)),
    Rule("peft", readers.of_lora(readers.part_of_method)),
    Rule("lora_r", readers.of_lora(to("rank", integer))),
    Rule("lora_alpha", readers.of_lora(to("alpha", number))),
    Rule("lora_dropout", readers.of_lora(preferences.dropout), 0.0),
    Rule("lora_target_linear", readers.of_lora(readers.target_linear)),
    Rule("lora_target_modules", readers.of_lora(readers.target_modules)),
    Rule("lora_target_parameters", readers.of_lora(readers.target_parameters)),
    Rule("lora_rank_pattern", readers.of_lora(to("rank_pattern"))),
    Rule("lora_alpha_pattern", readers.of_lora(to("alpha_pattern"))),
    Rule("lora_modules_to_save", readers.of_lora(to("modules_to_save", names))),
    Rule("lora_model_dir", preferences.lora_model_dir),
    Rule("load_in_4bit", readers.quantized(4)),
    Rule("load_in_8bit", readers.quantized(8)),
    Rule("bf16", readers.bf16, "auto"),
    Rule("bfloat16", lambda value, settings: taken("bf16 decides")),
    Rule("fp16", readers.fp16),
    Rule("float16", readers.fp16),
    Rule("float32", readers.fp32),
    Rule("learning_rate", to("lr", number)),
    Rule("loraplus_lr_ratio", readers.of_lora(trainer.loraplus_ratio), 1),
    Rule("lr_scheduler", trainer.schedule, "cosine"),
    Rule("warmup_steps", readers.warmup_steps),
    Rule("warmup_ratio", readers.warmup_ratio, 0.03),
    Rule("optimizer", trainer.optimizer, "adamw_torch_fused"),
    Rule("weight_decay", to("weight_decay", number), 0.0),
    Rule("max_grad_norm", trainer.max_grad_norm, 1.0),
    *trainer.ADAM_RULES,
    Rule("num_epochs", to("epochs", number), 1.0),
    Rule("max_steps", trainer.max_steps),
    Rule("micro_batch_size", readers.batch, 1),
    Rule("gradient_accumulation_steps", readers.micro_batches, 1),
    Rule("batch_size", lambda value, settings: taken("accumulation follows from it")),
    Rule("sequence_len", readers.sequence_len, 512),
    Rule("excess_length_strategy", readers.excess_length, "drop"),
    Rule("sample_packing", readers.sample_packing, False),
    Rule("train_on_inputs", readers.train_on_inputs),
    Rule("gradient_checkpointing", lambda value, settings: (
        changed("activations are recomputed, and not offloaded", gradient_checkpointing=True)
        if str(value).startswith(("offload", "unsloth"))
        else taken(gradient_checkpointing=boolean(value)))),
    Rule("val_set_size", trainer.held_out_rows, 0.0),
    Rule("eval_steps", trainer.interval("eval_every", "each checkpoint is evaluated")),
    Rule("evals_per_epoch", readers.per_epoch("eval_every", "each checkpoint is evaluated")),
    Rule("save_steps", trainer.interval("save_every", "there are about ten checkpoints a run")),
    Rule("saves_per_epoch",
        readers.per_epoch("save_every", "there are about ten checkpoints a run")),
    Rule("save_strategy", trainer.interval_strategy),
    Rule("eval_strategy", trainer.interval_strategy),
    Rule("evaluation_strategy", trainer.interval_strategy),
    Rule("save_total_limit", trainer.save_total_limit),
    Rule("seed", to("seed", integer)),
    Rule("default_system_message", without(SYSTEM)),
    Rule("tokens", readers.new_tokens),
    Rule("chat_template", readers.chat_template),
    Rule("chat_template_jinja", readers.chat_template_jinja),
    Rule("chat_template_kwargs", readers.chat_template_kwargs),
    Rule("use_wandb", readers.tracker("wandb")),
    Rule("wandb_project", readers.wandb_project),
    Rule("use_tensorboard", readers.tracker("tensorboard")),
    Rule("use_mlflow", readers.tracker("mlflow")),
    Rule("use_comet", readers.tracker("comet_ml")),
    Rule("use_trackio", readers.tracker("trackio")),
    Rule("use_swanlab", readers.tracker("swanlab")),
    Rule("base_model", option("--model")),
    Rule("model_revision", option("--revision")),
    Rule("revision_of_model", option("--revision")),
    Rule("trust_remote_code", lambda value, settings: (
        left("pass --trust-remote-code", "--trust-remote-code")
        if boolean(value) else taken("it is off"))),
    Rule("output_dir", option("--out")),
    Rule("datasets", datasets(objective_of)),
    Rule("pretraining_dataset", datasets(objective_of)),
    Rule("test_datasets", lambda value, settings: (
        left("pass its rows as --eval-data", "--eval-data EVAL_DATA"))),
    Rule("resume_from_checkpoint", without("lorafold resumes runs of its own: --resume")),
    Rule("auto_resume_from_checkpoints", without("pass --resume to go on with a run")),
    Rule("rl", preferences.rl),
    Rule("dpo_loss_type", preferences.loss_type, ["sigmoid"]),
    Rule("dpo_loss_weights", preferences.loss_weights),
    Rule("trl", preferences.beta_of("trl")),
    Rule("trl.beta", preferences.beta_of("trl.beta")),
    *policies.RULES,
    Rule("vllm", without(OWN_DRAWS)),
    Rule("rl_beta", preferences.beta_of("rl_beta"), 0.1),
    Rule("dpo_beta", preferences.beta_of("dpo_beta")),
    Rule("orpo_alpha", preferences.beta_of("orpo_alpha")),
    Rule("dpo_label_smoothing", preferences.label_smoothing),
    Rule("dpo_use_weighting", refusing("lorafold weighs every pair alike")),
    Rule("rpo_alpha", refusing("axolotl refuses it; dpo_loss_type: [sigmoid, sft] has the term")),
    Rule("dpo_norm_loss", refusing("axolotl refuses it")),
    Rule("simpo_gamma", law_option("gamma", objective_of)),
    Rule("cpo_alpha", preferences.cpo_alpha, 1.0),
    Rule("kto_desirable_weight", law_option("desirable_weight", objective_of)),
    Rule("kto_undesirable_weight", law_option("undesirable_weight", objective_of)),
    Rule("reward_model", preferences.reward_model),
    Rule("center_rewards_coefficient", preferences.center_rewards),
    Rule("num_labels", preferences.num_labels),
    Rule("process_reward_model", refusing("lorafold's reward models score whole texts")),
    Rule("reinit_weights", refusing("lorafold does not pretrain")),
    Rule("relora", refusing("lorafold does not restart LoRA")),
    Rule("unfrozen_parameters", readers.unfrozen_parameters),
    Rule("qat", refusing("lorafold does not train for later quantization")),
    Rule("plugins", plugins),
    Rule("diffusion", refusing("lorafold does not train a model that fills in masks")),
    Rule("special_tokens",
        without("the tokenizer's own are used; words that are to be tokens: --new-tokens")),
    Rule("lora_fan_in_fan_out",
        readers.of_lora(lambda value, settings: taken("the base's storage decides"))),
    *(rule for why, keys in AXOLOTL for rule in all_without(why, keys)),
)  # fmt: skip
