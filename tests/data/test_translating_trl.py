"""Configurations of TRL's trainers as recipes: every field of TRL's own classes has an outcome, its
defaults are written, and a file is known by what is in it.
"""

import dataclasses
import warnings

import pytest
import yaml
from transformers import TrainingArguments
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ModelConfig,
    RewardConfig,
    RLOOConfig,
    ScriptArguments,
    SFTConfig,
)
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.rloo import RLOOScriptArguments

from lorafold.config_import.rules import NOT_KNOWN
from lorafold.config_import.trl import RULES
from lorafold.errors import LorafoldError
from lorafold.recipe.recipe import Recipe
from translation_cases import keys, remark, translated, trl_of

with warnings.catch_warnings():  # both are experimental there
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

REWARDED = {"reward_funcs": ["rewards.score"]}
TRAINERS = {
    "trl-sft": (SFTConfig, ScriptArguments, {}),
    "trl-dpo": (DPOConfig, ScriptArguments, {}),
    "trl-kto": (KTOConfig, ScriptArguments, {}),
    "trl-orpo": (ORPOConfig, ScriptArguments, {}),
    "trl-cpo": (CPOConfig, ScriptArguments, {"loss_type": "simpo"}),
    "trl-reward": (RewardConfig, ScriptArguments, {}),
    "trl-grpo": (GRPOConfig, GRPOScriptArguments, REWARDED),
    "trl-rloo": (RLOOConfig, RLOOScriptArguments, REWARDED),
}
LEAST = {"model_name_or_path": "m", "use_peft": True}
# Written where TRL has None, which it looks up
LOOKED_UP = {"bf16", "lora_target_modules", "reward_funcs", "center_rewards_coefficient"}


def defaults_of(*kinds):
    """The fields of dataclasses with their defaults."""
    found = {}
    for kind in kinds:
        for field in dataclasses.fields(kind):
            made = field.default_factory is not dataclasses.MISSING
            found[field.name] = field.default_factory() if made else field.default
    return found


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_field_of_trl_has_an_outcome_and_its_defaults_are_trls(tmp_path, kind):
    config, script, given = TRAINERS[kind]
    theirs = defaults_of(config, script, ModelConfig, DatasetMixtureConfig)
    known = {rule.key: rule.default for rule in RULES[kind]}
    assert set(theirs) <= set(known)
    written = {k: v for k, v in known.items() if k in theirs and v is not None}
    assert {k for k, v in written.items() if v != theirs[k]} <= LOOKED_UP
    # what is off without a default of ours is off in theirs
    silent = translated(tmp_path, yaml.safe_dump(LEAST | given), kind)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    plain = {k: str(v) if type(v).__module__ != "builtins" else v for k, v in plain.items()}
    # null is no limit there, and what a file that is silent has is TRL's default
    told = translated(tmp_path, yaml.safe_dump({**plain, **LEAST, **given}), kind)
    same = {"seed", "betas", "eps", "eval_every", "save_every"}  # TRL's numbers, now given
    for name in set(Recipe.model_fields) - same:
        assert getattr(told.recipe, name) == getattr(silent.recipe, name), name
    assert all(not e.outcome.remark.startswith(NOT_KNOWN) for e in told.entries)
    assert sorted(e.key for e in told.entries if e.given or e.key in theirs) == sorted(theirs)


def test_the_arguments_of_transformers_are_fields_of_every_trainer():
    beneath = {field.name for field in dataclasses.fields(TrainingArguments)}
    for config, _, _ in TRAINERS.values():
        assert beneath <= set(defaults_of(config))


SFT = """
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
DPO = """
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


def test_a_file_of_sft_field_by_field(tmp_path):
    found = translated(tmp_path, SFT)
    assert found.tool == "TRL's SFT"
    assert found.recipe == Recipe(
        rank=32, alpha=16, dropout=0.05, targets="all-linear", objective="sft", storage="nf4",
        lr=2e-4, lr_b=2e-4, schedule="linear", warmup=0.0, optimizer="adamw", epochs=1, batch=16,
        accumulate=8, max_length=2048, packing=True, gradient_checkpointing=True, eval_every=100,
    )  # fmt: skip
    assert keys(found, "changed") == {"packing", "per_device_train_batch_size"}
    assert keys(found, "left") == {"model_name_or_path", "dataset_name", "eos_token", "output_dir"}
    assert "every token of {messages}" in remark(found, "assistant_only_loss")
    assert "--data acme/chats --out out" in found.command()


def test_a_file_of_dpo_field_by_field(tmp_path):
    found = translated(tmp_path, DPO)
    assert found.tool == "TRL's DPO"
    assert found.recipe == Recipe(
        rank=32, alpha=32, dropout=0.0, objective="dpo", beta=0.2,
        objective_options={"sft_weight": 0.5}, storage="bf16", lr=5e-6, lr_b=5e-6,
        schedule="linear", warmup=0.0, optimizer="adamw", epochs=3, batch=8, max_length=512,
        packing=False, gradient_checkpointing=True,
    )  # fmt: skip
    assert "micro-batch" in remark(found, "loss_type")


@pytest.mark.parametrize(
    ("kind", "settings", "fields"),
    [
        ("trl-sft", {}, {"objective": "sft", "lr": 2e-5, "dropout": 0.05, "max_length": 1024}),
        ("trl-sft", {"max_seq_length": 512}, {"max_length": 512}),
        ("trl-sft", {"max_length": None}, {"max_length": 1024}),
        ("trl-sft", {"chat_template_path": "a.jinja"}, {"chat_template": "a.jinja"}),
        ("trl-dpo", {"loss_type": "ipo"}, {"objective": "ipo", "beta": 0.1, "lr": 1e-6}),
        ("trl-dpo", {"loss_type": "hinge"}, {"objective": "hinge"}),
        ("trl-dpo", {"loss_type": "robust"}, {"objective": "dpo"}),
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
    ],
)  # fmt: skip
def test_settings_of_trainers(tmp_path, kind, settings, fields):
    recipe = translated(tmp_path, yaml.safe_dump(LEAST | settings), kind).recipe
    assert {name: getattr(recipe, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("kind", "settings", "part"),
    [
        ("trl-sft", {"loss_type": "dft"}, "loss_type: found 'dft'"),
        ("trl-dpo", {"loss_type": "robust", "label_smoothing": 0.1}, "loss_type: found ['robust']"),
        ("trl-dpo", {"loss_type": "aot"}, "expected sigmoid, hinge, ipo"),
        ("trl-dpo", {"f_divergence_type": "js_divergence"}, "f_divergence_type: found 'js_div"),
        ("trl-dpo", {"use_weighting": True}, "use_weighting: found True"),
        ("trl-dpo", {"ld_alpha": 0.5}, "ld_alpha: found 0.5"),
        ("trl-dpo", {"sync_ref_model": True}, "sync_ref_model: found True"),
        ("trl-kto", {"loss_type": "apo_zero_unpaired"}, "lorafold's kto has the loss kto alone"),
        ("trl-cpo", {}, "of CPO's losses lorafold has simpo alone"),
        ("trl-cpo", {"loss_type": "simpo", "alpha": 0.1}, "alpha: found 0.1"),
    ],
)
def test_what_lorafold_can_not_train_is_refused_by_name(tmp_path, kind, settings, part):
    with pytest.raises(LorafoldError) as caught:
        translated(tmp_path, yaml.safe_dump(LEAST | settings), kind)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "tool"),
    [
        ({"beta": 0.1, "loss_type": "sigmoid"}, "TRL's DPO"),
        ({"beta": 0.1, "loss_type": ["hinge"]}, "TRL's DPO"),
        ({"beta": 0.1, "desirable_weight": 1.0}, "TRL's KTO"),
        ({"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 1.0}, "TRL's CPO"),
        ({"center_rewards_coefficient": 0.01}, "TRL's reward trainer"),
        ({"packing": True}, "TRL's SFT"),
        ({"reward_funcs": ["a.b"], "scale_rewards": "none"}, "TRL's GRPO"),
        ({"reward_funcs": ["a.b"], "normalize_advantages": True}, "TRL's RLOO"),
        ({"stage": "sft", "lora_rank": 8, "finetuning_type": "lora"}, "LLaMA-Factory"),
    ],
)
def test_a_file_is_known_by_what_is_in_it(tmp_path, extra, tool):
    common = {"model_name_or_path": "m", "learning_rate": 1e-5, "output_dir": "out"}
    assert translated(tmp_path, yaml.safe_dump(common | extra)).tool == tool


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (LEAST | {"beta": 0.1}, ["TRL's DPO, TRL's KTO", "--kind trl-dpo, trl-kto"]),
        (LEAST | {"learning_rate": 1e-5}, ["TRL's SFT, TRL's DPO", "trl-reward"]),
        (LEAST | {"packing": True, "a": 1, "b": 2, "c": 3}, ["TRL's SFT does not know a, b, c"]),
        ({"reward_funcs": ["a.b"]}, ["TRL's GRPO, TRL's RLOO know as many", "trl-grpo, trl-rloo"]),
        ({"compute_environment": "LOCAL_MACHINE", "fsdp_config": {}}, ["accelerate's", "torchrun"]),
        ({"zero_optimization": {}, "train_batch_size": 8}, ["DeepSpeed's", "--strategy fsdp"]),
        ({"model": "m", "model_class": "llm", "peft_config": {}}, ["LLaMA-Factory's v1", "stage"]),
        ({"model_type": "llama", "architectures": []}, ["a model's configuration"]),
        ({"base_model": "m", "model_type": "x", "a": 1, "b": 2}, ["axolotl does not know a, b"]),
    ],
)
def test_a_file_that_fits_no_tool_well_is_refused_with_what_is_unknown(tmp_path, config, parts):
    with pytest.raises(LorafoldError) as caught:
        translated(tmp_path, yaml.safe_dump(config))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 300


def test_where_rows_lie(tmp_path):
    found = trl_of(tmp_path, "trl-sft", dataset_name="acme/a", dataset_config="small")
    assert "its configuration small" in remark(found, "dataset_name")
    assert "--data DATA" in found.command()
    mixed = trl_of(tmp_path, "trl-sft", datasets=[{"path": "acme/a"}, {"path": "acme/b"}])
    assert "--data acme/a --data acme/b" in mixed.command()
    text = trl_of(tmp_path, "trl-sft", dataset_text_field="story")
    assert "--columns text=story" in text.command()
