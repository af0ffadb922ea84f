"""mlx-lm's files, scripts and TRL's trainers as recipes, and what their runs then do."""

import dataclasses
import json
import warnings

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, get_scheduler
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
    SFTTrainer,
)
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.rloo import RLOOScriptArguments

from lorafold.config_import import unsloth
from lorafold.config_import.rules import UNKNOWN_KEY
from lorafold.config_import.translate import translate
from lorafold.config_import.trl import RULES
from lorafold.data.examples import encode
from lorafold.errors import LorafoldError
from lorafold.models.tokenizer import set_template
from lorafold.recipe.recipe import Recipe
from lorafold.training_step.param_groups import set_learning_rates
from translation_cases import (
    SCRIPT,
    axolotl_of,
    keys,
    llamafactory_of,
    mlx_of,
    remark,
    translated,
    trl_of,
    unsloth_of,
)

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}


def test_mlxs_defaults_and_its_lora(tmp_path):
    found = mlx_of(tmp_path)
    assert found.tool == "mlx-lm"
    assert found.recipe == Recipe(
        rank=8, alpha=160, dropout=0.0, targets="all-linear", objective="sft", storage="auto",
        lr=1e-5, lr_b=1e-5, schedule="constant", warmup=0.0, clip=0.0, optimizer="adamw",
        steps=600, batch=4, max_length=2048, packing=False, gradient_checkpointing=False,
        eval_every=200, save_every=100,
    )  # fmt: skip
    assert "the last 16 layers" in remark(found, "num_layers")
    assert "every token" in remark(found, "mask_prompt")
    own = mlx_of(tmp_path, lora_parameters=LORA | {"alpha": 16}, num_layers=-1, mask_prompt=True)
    assert (own.recipe.targets, own.recipe.alpha) == (("self_attn.q_proj",), 160)
    assert (own.recipe.dropout, own.recipe.train_on) == (0.1, "last")
    assert not keys(own, "changed")


def test_a_script_of_unsloth_is_read_as_literals(tmp_path):
    found = unsloth_of(tmp_path)
    assert found.tool == "Unsloth"
    assert found.recipe == Recipe(
        rank=32, alpha=64, dropout=0.0, targets=tuple(unsloth.LINEARS), objective="sft",
        storage="nf4", lr=2e-4, lr_b=2e-4, schedule="linear", warmup_steps=5, weight_decay=0.001,
        optimizer="adamw8bit", epochs=3, steps=60, batch=8, accumulate=2, max_length=1024,
        packing=False,
    )  # fmt: skip
    assert remark(found, "seed") == "not read because it is not a literal: pass --seed SEED"
    assert found.command().endswith("--seed SEED")  # which is no number, so that nobody forgets it
    [told] = [line for line in found.to_yaml().splitlines() if line.startswith("# NOT READ: ")]
    assert "seed: " in told
    assert told.endswith("pass --seed SEED")
    pairs = unsloth_of(tmp_path, SFT="DPO")
    assert "rows of {prompt, chosen, rejected}" in remark(pairs, "load_dataset.path")
    assert remark(found, "odd").startswith("unknown key")
    counts = [e.key for e in found.entries]
    assert len(counts) == len(set(counts))
    assert "--data acme/chats" in found.command()
    assert json.loads(json.dumps(found.as_json()))["tool"] == "Unsloth"


def test_embeddings_among_unsloths_targets_are_trained_as_a_whole(tmp_path):
    targets = 'r=32, target_modules=["q_proj", "embed_tokens", "lm_head"],'
    found = unsloth_of(tmp_path, **{"r=32,": targets})
    assert (found.recipe.targets, found.recipe.modules_to_save) == (
        ("q_proj",), ("embed_tokens", "lm_head"),
    )  # fmt: skip
    assert "as a whole" in remark(found, "get_peft_model.target_modules")


SECOND = "settings = DPOConfig(max_steps=9, beta=0.3)\nDPOTrainer(model, args=settings).train()\n"


@pytest.mark.parametrize("suffix", [".py", ".ipynb"])
def test_a_second_training_of_a_script_is_named_and_changes_nothing(tmp_path, suffix):
    script = f"%pip install unsloth\n{SCRIPT}{SECOND}"
    cells = [{"cell_type": "code", "source": script.splitlines(keepends=True)}]
    text = json.dumps({"cells": [{"cell_type": "markdown", "source": ["# x"]}, *cells]})
    (tmp_path / f"a{suffix}").write_text(text if suffix == ".ipynb" else f"{SCRIPT}{SECOND}")
    found = translate(tmp_path / f"a{suffix}")
    assert found.recipe == unsloth_of(tmp_path).recipe
    [second] = [e for e in found.left if e.key == "another_training"]
    assert second.value[0].startswith("DPOTrainer (line ")
    assert "a file of its own" in second.outcome.remark


def test_the_alignment_handbooks_mixtures(tmp_path):
    old = {"dataset_mixer": {"acme/a": 1.0, "acme/b": 0.5}, "preprocessing_num_workers": 2}
    found = trl_of(tmp_path, "trl-sft", **old)
    assert "--data acme/a --data acme/b" in found.command()
    assert "--data acme/b:0.5" in remark(found, "dataset_mixer")
    split = trl_of(tmp_path, "trl-sft", **old, dataset_splits=["train_sft", "test_sft"])
    assert "--data DATA" in split.command()
    assert "split train_sft: save" in remark(split, "dataset_mixer")
    new = {"datasets": [{"id": "acme/a", "config": "small"}, {"id": "acme/b"}], "seed": 0}
    found = trl_of(tmp_path, "trl-sft", dataset_mixture=new)
    assert "configuration small" in remark(found, "dataset_mixture")
    assert "--data DATA --data acme/b" in found.command()


@pytest.mark.parametrize(
    ("dataset", "flags", "said"),
    [
        ({"path": "acme/chats", "type": "chat_template"}, "--data acme/chats --out", ""),
        ({"path": "acme/chats", "type": "chat_template", "field_messages": "talk"},
         "--columns messages=talk", ""),
        ({"path": "acme/chats", "type": "chat_template", "field_messages": "talk",
          "message_property_mappings": {"role": "from", "content": "value"}},
         "--columns conversations=talk", ""),
        ({"path": "acme/chats", "type": "chat_template",
          "message_property_mappings": {"role": "who", "content": "what"}}, "",
         "the keys who and what"),
        ({"path": "acme/alpaca", "type": "alpaca"}, "--data acme/alpaca", "### Instruction"),
        ({"path": "acme/text", "type": "completion", "field": "body"}, "--columns text=body", ""),
        ({"path": "json", "data_files": "a.jsonl", "ds_type": "json"},
         "--data a.jsonl", "a.jsonl (no type)"),
        ({"path": "acme/a", "type": "chat_template.default", "field_messages": "asked",
          "field_chosen": "better", "roles": {"user": ["human"]}},
         "--columns chosen=better,prompt=asked", "roles: not supported"),
        ({"path": "acme/a", "type": "alpaca", "field_messages": "m"}, "", "messages: not"),
        ({"path": "acme/a", "type": "chat_template", "roles_to_train": ["gpt"]},
         "--data acme/a", "acme/a (chat_template)"),
        ({"path": "acme/a", "type": "chat_template", "roles_to_train": ["human"]}, "",
         "roles_to_train: not supported"),
        ({"path": "acme/a", "split": "train[:5%]"}, "--data DATA", "(split train[:5%]: save"),
        ({"path": "acme/a", "chat_template": "chatml", "shards": 4}, "", "shards: not supported"),
        ({"path": "acme/a", "type": {"field_instruction": "q", "field_output": "a"}},
         "--columns instruction=q,output=a", "instead of this prompt format"),
    ],
)  # fmt: skip
def test_axolotls_rows(tmp_path, dataset, flags, said):
    found = axolotl_of(tmp_path, datasets=[dataset], output_dir="out")
    assert flags in found.command()
    assert said in remark(found, "datasets")


def test_llamafactorys_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not found in data/dataset_info.json" in remark(
        llamafactory_of(tmp_path, dataset="chef"), "dataset"
    )
    chats = {
        "hf_hub_url": "acme/chats", "formatting": "sharegpt", "columns": {"messages": "talk"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    }  # fmt: skip
    info = {"chef": {"file_name": "chef.json"}, "chats": chats}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    found = llamafactory_of(tmp_path, dataset="chef,chats")
    assert "--data data/chef.json --data acme/chats --columns messages=talk" in found.command()
    info["chef"]["tags"] = {"role_tag": 1, "content_tag": None}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    assert "the keys 1 and None" in remark(llamafactory_of(tmp_path, dataset="chef"), "dataset")
    online = llamafactory_of(tmp_path, dataset="acme/a", dataset_dir="ONLINE")
    assert "--data acme/a" in online.command()


def test_axolotls_unfrozen_parameters_with_an_adapter(tmp_path):
    every = axolotl_of(tmp_path, unfrozen_parameters=[".+lora_"])
    assert remark(every, "unfrozen_parameters") == "the patterns match all weights of the adapter"
    some = axolotl_of(tmp_path, unfrozen_parameters=["model.layers.2[0-9]+.mlp"])
    assert "axolotl freezes adapter weights whose" in remark(some, "unfrozen_parameters")
    with pytest.raises(LorafoldError, match="full method trains the whole model"):
        axolotl_of(tmp_path, adapter=None, unfrozen_parameters=["^lm_head.weight$"])


TURNS = {
    "prompt": [{"role": "user", "content": "Book a table"}],
    "completion": [{"role": "assistant", "content": "for four"}],
}
STRINGS = {"prompt": "Book a table", "completion": " for four"}
IGNORED = -100  # what TRL has in place of a label


def labelled_by_trl(row, path, tmp_path):
    """The ids of a row and those that TRL's trainer labels."""
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(path),
        args=SFTConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    [batch] = trainer.get_train_dataloader()
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return ids, [token for token in labels if token != IGNORED]


def labelled_here(row, tokenizer):
    """The ids of a row and those that lorafold labels."""
    [example] = encode([row], tokenizer, 64).examples
    ids = list(example.ids)
    return ids, [i for i, label in zip(ids, example.labels, strict=True) if label >= 0]


def test_trl_labels_the_line_end_after_a_turn_besides(tmp_path, tiny_model_dir):
    path = tiny_model_dir("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    (ids, labels), (own_ids, own) = (
        labelled_by_trl(TURNS, path, tmp_path),
        labelled_here(TURNS, tokenizer),
    )
    assert ids[: len(own_ids)] == own_ids
    assert labels == own + tokenizer.encode("\n", add_special_tokens=False)
    assert "a newline" in str(trl_of(tmp_path, "trl-sft"))


def test_trl_joins_prompt_and_completion_as_template_none_does(tmp_path, tiny_model_dir):
    path = tiny_model_dir("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = labelled_by_trl(STRINGS, path, tmp_path)
    assert found != labelled_here(STRINGS, tokenizer)
    set_template(tokenizer, "none")
    assert found == labelled_here(STRINGS, tokenizer)
    assert "--chat-template none" in str(trl_of(tmp_path, "trl-sft"))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_rates_are_those_of_transformers_after_the_warm_up(tmp_path, kind, warmup_steps):
    steps = 12
    found = trl_of(
        tmp_path, "trl-sft", lr_scheduler_type=kind, warmup_steps=warmup_steps, max_steps=steps
    )
    recipe, peak = found.recipe, 1e-3
    optimizer, own = (
        torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "peak": peak}], lr=peak)
        for _ in range(2)
    )
    scheduler = get_scheduler(kind, optimizer, warmup_steps, steps)
    theirs, ours = [], []
    for step in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        set_learning_rates(own, recipe, step, steps)
        ours.append(own.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])
    if warmup_steps:
        assert theirs[0] == 0
        assert "from a learning rate of 0" in remark(found, "warmup_steps")
        assert all(a > b for a, b in zip(ours[:3], theirs, strict=False))
    else:
        assert not remark(found, "warmup_steps")


@pytest.mark.parametrize(
    ("settings", "warmup", "warmup_steps"),
    [
        ({"warmup_ratio": 0.1, "max_steps": 4}, 0.0, None),
        ({"warmup_ratio": 0.1, "max_steps": 29}, 0.03, 2),
        ({"warmup_ratio": 0.1, "max_steps": 15}, 0.03, 2),  # of one step axolotl makes two
        ({"warmup_steps": 1}, 0.03, 2),
        ({"max_steps": 60}, 0.03, 2),
        ({"max_steps": 200}, 0.03, 6),
        ({"max_steps": 10_000}, 0.03, 100),
        ({}, 0.03, None),
        ({"warmup_ratio": 0.2}, 0.2, None),
    ],
)
def test_the_warm_up_of_axolotl_in_its_own_steps(tmp_path, settings, warmup, warmup_steps):
    recipe = axolotl_of(tmp_path, **settings).recipe
    assert (recipe.warmup, recipe.warmup_steps) == (warmup, warmup_steps)


def test_the_cpu_goes_to_the_command(tmp_path):
    trl = trl_of(tmp_path, "trl-sft", use_cpu=True)
    for found in (trl, llamafactory_of(tmp_path, use_cpu=True)):
        assert "--device cpu" in found.command()
    assert "--device" not in trl_of(tmp_path, "trl-sft", use_cpu=False).command()


def test_a_system_text_of_the_file_is_to_be_written_to_the_rows(tmp_path):
    for found, key in (
        (axolotl_of(tmp_path, default_system_message="Be brief."), "default_system_message"),
        (llamafactory_of(tmp_path, default_system="Be brief."), "default_system"),
    ):
        assert "a column system" in remark(found, key)


def test_what_mlx_weighs_in_another_way_is_told(tmp_path):
    text = "model: m\ntrain: true\nfine_tune_type: lora\niters: 8\n"
    assert "one token of padding" in str(translated(tmp_path, text))
    assert "equally" not in remark(translated(tmp_path, text), "batch_size")
    several = translated(tmp_path, f"{text}grad_accumulation_steps: 2\n")
    assert "mlx-lm weights micro-batches equally" in remark(several, "batch_size")


def test_the_larger_steps_of_mlx_are_told_with_the_rate_that_comes_near(tmp_path):
    m = v = larger = 0.0
    for _ in range(8):  # of a gradient of 1, Adam's corrected step is the rate
        m, v = 0.9 * m + 0.1, 0.999 * v + 0.001
        larger += m / v**0.5 / 8
    text = "model: m\ntrain: true\niters: 8\nlearning_rate: 1e-4\n"
    told = remark(translated(tmp_path, text), "optimizer")
    assert f"{larger:.1f} times as large" in told
    assert f"--lr {larger * 1e-4:.2g} --lr-b" in told
    corrected = f"{text}optimizer_config: {{adam: {{bias_correction: true}}}}\n"
    assert not remark(translated(tmp_path, corrected), "optimizer")


@pytest.mark.parametrize("betas", [[0.9, 1.0], [0.9], 0.9])
def test_betas_of_mlx_that_are_none_are_refused(tmp_path, betas):
    text = f"model: m\niters: 8\noptimizer_config: {{adam: {{betas: {betas}}}}}\n"
    with pytest.raises(LorafoldError, match="expected two numbers, at least 0 and below 1"):
        translated(tmp_path, text)


def test_axolotl_packs_without_a_named_attention_as_one_text(tmp_path):
    open_rows = axolotl_of(tmp_path, sample_packing=True, flash_attention=False)
    assert open_rows.recipe.packing
    assert "axolotl's packed rows attend to each other" in remark(open_rows, "sample_packing")
    for named in ({"flash_attention": True}, {"attn_implementation": "sdpa"}):
        found = axolotl_of(tmp_path, sample_packing=True, **named)
        assert found.recipe.packing
        assert not remark(found, "sample_packing")


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
    assert all(not e.outcome.remark.startswith(UNKNOWN_KEY) for e in told.entries)
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
        (LEAST | {"beta": 0.1}, ["TRL's DPO, TRL's KTO", "--kind: trl-dpo, trl-kto"]),
        (LEAST | {"learning_rate": 1e-5}, ["TRL's SFT, TRL's DPO", "trl-reward"]),
        (LEAST | {"packing": True, "a": 1, "b": 2, "c": 3}, ["TRL's SFT does not have a, b, c"]),
        ({"reward_funcs": ["a.b"]}, ["TRL's GRPO, TRL's RLOO match equally", "trl-grpo, trl-rloo"]),
        ({"compute_environment": "LOCAL_MACHINE", "fsdp_config": {}}, ["accelerate", "torchrun"]),
        ({"zero_optimization": {}, "train_batch_size": 8}, ["a DeepSpeed", "--strategy fsdp"]),
        ({"model": "m", "model_class": "llm", "peft_config": {}}, ["a LLaMA-Factory v1", "stage"]),
        ({"model_type": "llama", "architectures": []}, ["a model configuration"]),
        ({"task": "llm-sft", "base_model": "m", "project_name": "p", "params": {"lr": 1}},
         ["an AutoTrain configuration", "lr as --lr and --lr-b"]),
        ({"checkpoint_dir": "c", "out_dir": "o", "lora_r": 8, "lora_query": True},
         ["a LitGPT configuration", "lora_r as --rank"]),
        ({"base_model": "m", "model_type": "x", "a": 1, "b": 2}, ["axolotl does not have a, b"]),
    ],
)
def test_a_file_that_fits_no_tool_well_is_refused_with_what_is_unknown(tmp_path, config, parts):
    with pytest.raises(LorafoldError) as caught:
        translated(tmp_path, yaml.safe_dump(config))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 330


def test_where_rows_lie(tmp_path):
    found = trl_of(tmp_path, "trl-sft", dataset_name="acme/a", dataset_config="small")
    assert "configuration small: save" in remark(found, "dataset_name")
    assert "--data DATA" in found.command()
    mixed = trl_of(tmp_path, "trl-sft", datasets=[{"path": "acme/a"}, {"path": "acme/b"}])
    assert "--data acme/a --data acme/b" in mixed.command()
    text = trl_of(tmp_path, "trl-sft", dataset_text_field="story")
    assert "--columns text=story" in text.command()
