"""TRL's trainers as recipes: every field has an outcome, and a file tells which trainer has it."""

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
from translation_cases import remark, translated, trl_of

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
