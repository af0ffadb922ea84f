"""Other tools' configurations as recipes: defaults, unknown keys, PEFT's files, the command."""

import json
import random
from pathlib import Path

import pytest
import yaml

from conftest import lorafold, refused
from lorafold.config_import import axolotl, llamafactory, mlx, swift, torchtune, trl
from lorafold.config_import.rules import UNKNOWN_KEY
from lorafold.config_import.translate import TOOLS, Translation, translate, write
from lorafold.errors import LorafoldError
from lorafold.peft.config import CONFIG, read_config
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe
from lorafold.recipe.resolve_settings import spec_of
from translation_cases import AXOLOTL, axolotl_of, keys, llamafactory_of, remark, translated

pytestmark = pytest.mark.usefixtures("unestimated")


def test_what_a_file_leaves_out_has_the_other_tools_default(tmp_path):
    theirs = axolotl_of(tmp_path)
    assert theirs.recipe == Recipe(
        rank=8, alpha=16, dropout=0.0, targets="all-linear", storage="auto", lr=1e-4, lr_b=1e-4,
        optimizer="adamw", epochs=1, batch=1, max_length=512, packing=False,
    )  # fmt: skip
    assert llamafactory_of(tmp_path).recipe == Recipe(
        rank=8, alpha=16, dropout=0.0, targets="all-linear", storage="auto", lr=5e-5, lr_b=5e-5,
        schedule="linear", warmup=0.0, optimizer="adamw", epochs=3, batch=8, max_length=2048,
        packing=False,
    )  # fmt: skip
    assert "dropout: 0.0  # lora_dropout: 0.0 (tool default)" in theirs.to_yaml()
    assert {e.key for e in theirs.changed} == {"excess_length_strategy"}


VALUES = {"stage": "sft", "finetuning_type": "lora", "adapter": "lora", "quantization_bit": 4}
WORDS = [None, False, True, 0, -1, 1, 3, 0.5, float("inf"), "name", "a,b", ["x"], {"k": 1}]


RULES = {
    "axolotl": axolotl.RULES,
    "llamafactory": llamafactory.RULES,
    **trl.RULES,
    "mlx-lm": mlx.RULES,
    "torchtune": torchtune.RULES,
    "ms-swift": swift.RULES[swift.SFT],
}


@pytest.mark.parametrize("tool", RULES)
def test_every_key_is_told_exactly_once_or_the_file_is_refused_by_name(tmp_path, tool):
    known = [rule.key for rule in RULES[tool]]
    assert len(set(known)) == len(known)
    draw, told, refusals = random.Random(0), 0, []
    needed = {"lora_r": 4, "lora_alpha": 4, "lora_target_linear": True, "learning_rate": 1e-3}
    draws = 120 if tool.startswith("trl") else 400
    for _ in range(draws):
        some = draw.sample(known, 2 if tool == "mlx-lm" else 6)  # which has few keys
        config = {key: VALUES.get(key, draw.choice(WORDS)) for key in some}
        config[f"odd_{draw.random()}"] = draw.choice(WORDS)
        if tool == "axolotl":
            config = needed | {"adapter": "lora"} | config
        if tool == "trl-cpo":  # of its losses lorafold has this one
            config |= {"loss_type": "simpo"}
        try:
            found = translated(tmp_path, yaml.safe_dump(config), tool)
        except LorafoldError as error:
            refusals.append((str(error), config))
            continue
        told += 1
        counts = [[e.key for e in found.entries].count(key) for key in config]
        assert counts == [1] * len(config), config
        odd = next(key for key in config if key.startswith("odd_"))
        assert remark(found, odd).startswith(UNKNOWN_KEY)
    assert told > draws // 8
    assert len(refusals) > draws // 8
    for message, config in refusals:
        assert any(f"{key}: " in message or f"{key}, " in message for key in config), message


def test_plugins_that_learn_the_same_are_passed_over_and_unknown_ones_named(tmp_path):
    fast = "axolotl.integrations.liger.LigerPlugin"
    assert "affects speed" in remark(axolotl_of(tmp_path, plugins=[fast]), "plugins")
    found = axolotl_of(tmp_path, plugins=[fast, "my.Plugin"])
    assert "unknown plugins, which have no effect in lorafold: my.P" in remark(found, "plugins")


def test_an_unknown_key_is_listed_with_a_near_name(tmp_path):
    found = axolotl_of(tmp_path, lora_dropuot=0.3)
    assert keys(found, "left") == {"base_model", "lora_dropuot"}
    assert remark(found, "lora_dropuot") == f"{UNKNOWN_KEY}; did you mean lora_dropout?"
    assert found.recipe.dropout == 0.0


def test_an_adapter_to_start_from_brings_its_own(tmp_path):
    found = axolotl_of(tmp_path, lora_model_dir="old")
    assert "--init-adapter old" in found.command()
    assert {"lora_r", "lora_alpha", "adapter", "lora_model_dir"} <= keys(found, "left")
    assert not {"rank", "alpha", "method", "targets"} & found.recipe.model_fields_set


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("stage: ppo\nlora_rank: 8", "stage: found 'ppo', which needs a reward model"),
        ("stage: pt\nfinetuning_type: full", "lorafold does not pretrain"),
        ("stage: sft\nfinetuning_type: oft", "finetuning_type: found 'oft'"),
        ("stage: sft\nlora_rank: many", "lora_rank: found 'many', expected a number"),
        ("stage: sft\nlora_rank: 0", "lora_rank: found 0 as recipe field rank"),
        ("stage: sft\nlora_dropout: 1.5", "lora_dropout: found 1.5 as recipe field dropout"),
        (f"{AXOLOTL}rl: gdpo", "rl: found 'gdpo'"),
        ("base_model: m\nadapter: lora\nlora_r: 8", "learning_rate, lora_alpha missing"),
        ("base_model: m\nadapter: ia4", "adapter: found 'ia4', expected lora or qlora"),
        (f"{AXOLOTL}plugins: [axolotl.integrations.kd.KDPlugin]", "distills a teacher model"),
        ("base_model: m\nlearning_rate: 1\nload_in_4bit: true", "trains the base's own weights"),
        ("a: 1\nb: 2", "the keys do not identify the tool (a, b)"),
        ("base_model: m\nstage: sft", "choose one with --kind: axolotl, llamafactory"),
        ("- a", "found a list, expected `name: value` lines"),
        ("a: [1", "not YAML at line 1"),
        ("a: 1\nb: {c: 1}\na: 2", "not YAML at line 3, column 1: found a twice"),
        ("", "found an empty file"),
    ],
)
def test_a_file_that_can_not_be_translated_is_one_line(tmp_path, text, part):
    with pytest.raises(LorafoldError) as caught:
        translated(tmp_path, text)
    assert part in str(caught.value)
    assert str(tmp_path / "theirs.yml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_and_a_missing_file(tmp_path):
    with pytest.raises(LorafoldError, match="expected axolotl, llamafactory, trl-sft"):
        translate(tmp_path, "trl")
    with pytest.raises(LorafoldError, match="No such file"):
        translate(tmp_path / "none.yml")
    with pytest.raises(LorafoldError, match="No such file"):
        translate(tmp_path)


def peft_configs():
    import peft

    return {
        "lora": peft.LoraConfig(
            r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["q_proj", "v_proj"],
            rank_pattern={"0.q_proj": 2}, modules_to_save=["lm_head"], task_type="CAUSAL_LM",
        ),
        "experts": peft.LoraConfig(
            target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
        ),
        "gaussian": peft.LoraConfig(target_modules="all-linear", init_lora_weights="gaussian"),
        "dora": peft.LoraConfig(r=6, use_dora=True, target_modules=".*q_proj", bias="all"),
        "rslora": peft.LoraConfig(r=6, use_rslora=True, target_modules=["q_proj"]),
        "dora-rslora": peft.LoraConfig(use_rslora=True, use_dora=True, target_modules=["q_proj"]),
        "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj"]),
        "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=["q_proj"], decompose_factor=4),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "vera": peft.VeraConfig(r=32, target_modules=["q_proj"]),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }  # fmt: skip


@pytest.mark.parametrize("name", peft_configs())
def test_pefts_own_files_become_the_spec_that_is_read_from_them(tmp_path, name):
    peft_configs()[name].save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    spec, selection, bias = read_config(config)
    found = translate(tmp_path)
    assert spec_of(found.recipe) == spec
    assert found.tool == "PEFT"
    if selection.target_modules:
        experts = selection.target_parameters
        targets = selection.target_modules
        assert found.recipe.targets == ((*targets, *experts) if experts else targets)
    assert (found.recipe.bias, found.recipe.modules_to_save) == (bias, selection.modules_to_save)
    counts = [[e.key for e in found.entries].count(key) for key in config]
    assert counts == [1] * len(config)
    write(found, tmp_path / "recipe.yaml")
    assert spec_of(load_recipe(tmp_path / "recipe.yaml")) == spec_of(found.recipe)


def peft_file(tmp_path: Path, **config) -> Translation:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"} | config))
    return translate(tmp_path)


def test_parameters_of_experts_are_targets(tmp_path):
    names = ["experts.gate_up_proj", "shared_expert.up_proj.weight"]
    own = ("experts.gate_up_proj", "shared_expert.up_proj")
    for modules in (None, []):
        found = peft_file(tmp_path, target_modules=modules, target_parameters=names)
        assert found.recipe.targets == own
    preset = peft_file(tmp_path, target_modules="all-linear", target_parameters=["down_proj"])
    assert preset.recipe.targets == "all-linear"
    assert "experts" in remark(preset, "target_parameters")
    bare = peft_file(tmp_path, target_modules=["q_proj"], target_parameters=["down_proj"])
    assert bare.recipe.targets == ("q_proj", "down_proj")
    assert "modules named down_proj" in remark(bare, "target_parameters")
    regex = peft_file(tmp_path, target_modules=".*q_proj", target_parameters=["down_proj"])
    assert (regex.recipe.targets, keys(regex, "left")) == (".*q_proj", {"target_parameters"})
    settings = {"lora_target_linear": False, "lora_target_modules": ["q_proj"]}
    theirs = axolotl_of(tmp_path, **settings, lora_target_parameters=names)
    assert theirs.recipe.targets == ("q_proj", *own)
    assert "lora_target_parameters" not in keys(theirs, "changed") | keys(theirs, "left")
    alone = axolotl_of(tmp_path, lora_target_linear=False, lora_target_parameters=names)
    assert alone.recipe.targets == own


def test_pefts_initializations_that_change_the_base_are_methods_of_their_own(tmp_path):
    found = peft_file(tmp_path, r=4, init_lora_weights="pissa_niter_2", target_modules=["q_proj"])
    assert (found.recipe.method, found.recipe.options) == ("pissa", {"niter": 2})
    assert peft_file(tmp_path, init_lora_weights="olora").recipe.method == "olora"
    eva = peft_file(tmp_path, init_lora_weights="eva")
    assert (eva.recipe.method, keys(eva, "changed")) == ("lora", {"init_lora_weights"})


def test_what_pefts_file_says_beside_the_method(tmp_path):
    found = peft_file(
        tmp_path,
        base_model_name_or_path="acme/tiny",
        task_type="SEQ_CLS",
        target_modules=None,
        layers_to_transform=[0, 1],
        corda_config={"a": 1},
        velvet=3,
    )
    assert found.recipe == Recipe(objective="classify", rank=8, alpha=8, dropout=0.0)
    assert keys(found, "left") == {
        "base_model_name_or_path", "layers_to_transform", "corda_config", "velvet",
    }  # fmt: skip
    assert remark(found, "velvet") == UNKNOWN_KEY
    assert "--model acme/tiny" in found.command()
    assert "defaults apply" in str(found)
    with pytest.raises(LorafoldError, match="task_type: found 'TOKEN_CLS'"):
        peft_file(tmp_path, task_type="TOKEN_CLS")
    with pytest.raises(LorafoldError, match="peft_type 'OFT' is not supported"):
        peft_file(tmp_path, peft_type="OFT")


LAUNCHED = """#!/bin/bash
set -e  # don't stop
export NAME="acme/tiny one"; LR=2e-4 RANK=16
OUT=$(mktemp -d)
KWARGS='{"enable_thinking": false}'
{env}{command}
swift infer --adapters out  # no training
trl dpo --model_name_or_path "$NAME"
"""
LF = "stage: sft\nlora_rank: 8\nlora_target: all\nlearning_rate: 1.0e-4\ncutoff_len: 512\n"


@pytest.mark.parametrize(
    ("env", "command", "tool", "fields", "flags"),
    [
        ("HF_HOME=/x ", """trl sft --model_name_or_path "$NAME" --use_peft --lora_r ${RANK} \\
            --lora_target_modules q_proj v_proj --learning_rate=$LR `# rate` 2>&1 | tee log""",
         "TRL's SFT", {"rank": 16, "lr": 2e-4, "targets": ("q_proj", "v_proj")},
         "--model 'acme/tiny one'"),
        ("CUDA_VISIBLE_DEVICES=0,1 accelerate launch --num_processes 2 ",
         "trl/scripts/grpo.py --reward_funcs a.b --use_peft --chat_template_kwargs \"$KWARGS\"",
         "TRL's GRPO", {"template_kwargs": {"enable_thinking": False}}, ""),
        ("NPROC_PER_NODE=2 ", "swift rlhf --model m --train_type lora --dataset 'acme/a#5' hf::b"
         " --beta 0.3 --output_dir $OUT", "ms-swift", {"objective": "dpo", "beta": 0.3},
         "--data DATA --data b"),
        ("", "axolotl train theirs.yml --lora-r 64", "axolotl", {"rank": 64}, "--model m"),
        ("FORCE_TORCHRUN=1 ", "llamafactory-cli train lf.yaml learning_rate=3e-5",
         "LLaMA-Factory", {"rank": 8, "lr": 3e-5, "max_length": 512}, ""),
        ("torchrun ", "src/train.py --stage dpo --lora_rank 4 --lora_target all --pref_beta 0.2",
         "LLaMA-Factory", {"objective": "dpo", "rank": 4, "beta": 0.2}, ""),
        ("python -m ", "mlx_lm.lora --model a/b --train --data rows --iters 6 --mask-prompt",
         "mlx-lm", {"steps": 6, "train_on": "last"}, "--data rows"),
        ("", "tune run --nproc_per_node 2 lora_finetune_distributed --config tune.yaml"
         " model.lora_rank=32 optimizer.lr=1e-5", "torchtune", {"rank": 32, "lr": 1e-5}, ""),
    ],
)  # fmt: skip
def test_a_command_line_of_a_shell_script(tmp_path, env, command, tool, fields, flags):
    axolotl_of(tmp_path)
    (tmp_path / "lf.yaml").write_text(LF)
    (tmp_path / "tune.yaml").write_text(
        "model: {_component_: a.lora_llama2_7b, lora_rank: 4, lora_attn_modules: [q_proj]}\n"
        "loss: {_component_: a.LinearCrossEntropyLoss}\noptimizer: {_component_: a.AdamW}\n"
    )
    script = LAUNCHED.replace("{env}", env).replace("{command}", command)
    for name, text in (("a.sh", script), ("b.sh", script.replace("\n", "\r\n"))):
        found = translated(tmp_path, text, name=name)
        assert found.tool == tool
        assert {name: getattr(found.recipe, name) for name in fields} == fields
        assert flags in found.command()
        assert ("launcher" in keys(found, "left")) == bool(env) or tool == "torchtune"
        assert "trl dpo" in next(e.value for e in found.left if e.key == "another_training")
        assert not [e.key for e in found.left if e.outcome.remark.startswith(UNKNOWN_KEY)]


def test_a_batch_with_a_computed_accumulation_is_not_read(tmp_path):
    command = "swift sft --model m --per_device_train_batch_size 2 --lora_rank 4"
    text = f'{command} --gradient_accumulation_steps $(expr 16 / 2) "$@"'
    found = translated(tmp_path, text, name="a.sh")
    assert "batch" not in found.written()
    assert found.command().endswith("--accumulate ACCUMULATE --batch BATCH")
    unread = [line for line in found.to_yaml().splitlines() if line.startswith("# NOT READ: ")]
    assert any("per_device_train_batch_size: 2 x gradient accumulation" in line for line in unread)
    assert "called with them" in remark(found, "script_arguments")
    assert (found.recipe.rank, translated(tmp_path, command, name="b.sh").recipe.batch) == (4, 16)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("echo hello\n", "found no command that trains, expected for example trl sft"),
        ("tune run lora_dpo --config llama2/7B_lora", "was not found; copy it with tune cp"),
        ("axolotl train none.yml", "reads none.yml, which was not found"),
        ("autotrain llm --train --model m", "found an AutoTrain configuration"),
        ("litgpt finetune_lora m", "found a LitGPT configuration"),
        ("NPROC_PER_NODE=2 megatron sft --model m", "expected swift sft, pt or rlhf"),
        ("swift rlhf --rlhf_type gkd --model m", "rlhf_type: found 'gkd', expected sft or dpo"),
        ("swift sft --tuner_type reft --model m", "tuner_type: found 'reft', expected lora or"),
        ("python train.py --x 1 --y 2 --z 3", "the keys do not identify the tool"),
        ("trl sft --config a b", "reads ['a', 'b'], which was not found"),
        ('{"cells": [1]}', "found no cells, expected a notebook"),
    ],
)
def test_a_shell_script_without_a_training_that_is_read_is_refused(tmp_path, text, part):
    with pytest.raises(LorafoldError) as caught:
        translated(tmp_path, text, name="a.ipynb" if text.startswith("{") else "a.sh")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_recipe_and_the_report_apart(tmp_path):
    (tmp_path / "theirs.yml").write_text(AXOLOTL)
    done = lorafold("recipe", "--from", str(tmp_path / "theirs.yml"))
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["rank"] == 32
    for part in [
        "lora_r: 32",
        "converted with a difference:",
        "not part of the recipe:",
        "off or not set: ",
        "lora_model_dir",
        "train with: lorafold train --config recipe.yaml",
    ]:
        assert part in done.stderr
    out = tmp_path / "recipe.yaml"
    done = lorafold("recipe", "--from", str(tmp_path / "theirs.yml"), "--out", str(out), "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["tool"], found["recipe"]["rank"], found["out"]) == ("axolotl", 32, str(out))
    assert load_recipe(out).rank == 32
    assert not done.stderr.strip()
    message = refused("recipe", "--from", str(tmp_path / "theirs.yml"), "--out", str(out))
    assert f"{out} exists; pass --overwrite" in message
    theirs = str(tmp_path / "theirs.yml")
    done = lorafold("recipe", "--from", theirs, "--out", str(out), "--overwrite")
    assert done.returncode == 0


def test_the_command_refuses_a_file_in_one_line(tmp_path):
    (tmp_path / "theirs.yml").write_text("a: 1\n")
    assert "choose one with --kind" in refused("recipe", "--from", str(tmp_path / "theirs.yml"))
    assert set(TOOLS) == {*RULES, "unsloth", "peft"}
