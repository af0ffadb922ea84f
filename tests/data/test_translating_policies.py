"""GRPO of axolotl and TRL, and TRL's RLOO, as recipes: every field of theirs has an outcome, their
defaults are written, and they train.
"""


import pytest

from lorafold.api.train import train
from lorafold.config_import import axolotl_objectives, grpo
from lorafold.config_import.rules import NOT_KNOWN
from lorafold.config_import.run import write
from lorafold.errors import LorafoldError
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe
from translation_cases import grpo_of, keys, remark, translated, trl_of

pytestmark = pytest.mark.usefixtures("unestimated")

AXOLOTL = """
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
TRL = """
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

def test_an_axolotl_file_field_by_field(tmp_path):
    found = translated(tmp_path, AXOLOTL)
    assert found.tool == "axolotl"
    assert found.recipe == Recipe(
        rank=32, alpha=64, dropout=0.0, targets="all-linear", objective="grpo", beta=0.001,
        objective_options={
            "average": "longest", "clip": 0.2, "clip_high": 0.28, "group": 4, "scale": "none",
            "max_new_tokens": 256, "truncated": "masked",
            "rewards": ["rewards.py:accuracy", "0.5*lib/more.py:form"],
        },
        storage="bf16", lr=5e-6, lr_b=5e-6, optimizer="adamw", epochs=1, batch=4, accumulate=4,
        max_length=768 + 256,
    )  # fmt: skip
    assert found.recipe.packing
    assert keys(found, "changed") == {
        "lora_dropout", "sequence_len", "trl.beta", "trl.temperature", "trl.reward_funcs",
        "trl.mask_truncated_completions",
    }  # fmt: skip
    assert keys(found, "left") == {
        "base_model", "datasets", "output_dir", "vllm", "trl.use_vllm", "trl.vllm_server_timeout",
        "trl.async_prefetch", "trl.oddity",
    }  # fmt: skip
    assert remark(found, "trl.oddity").startswith(NOT_KNOWN)
    assert remark(found, "trl.use_vllm") == grpo.OWN_DRAWS
    assert "rows of prompt, and of what the rewards read" in remark(found, "datasets")
    assert "lists of messages" in remark(found, "trl.reward_funcs")
    write(found, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == found.recipe


def test_a_file_of_trl_field_by_field(tmp_path):
    found = translated(tmp_path, TRL)
    assert found.tool == "TRL's GRPO"
    assert found.recipe == Recipe(
        rank=8, alpha=32, dropout=0.0, targets=("q_proj", "v_proj"), objective="gspo",
        objective_options={
            "average": "per-sequence", "clip": 3e-4, "clip_high": 4e-4, "group": 8,
            "scale": "group", "max_new_tokens": 1024, "truncated": "counted",
            "rewards": ["0.2*rewards.py:score"],
        },
        storage="nf4", lr=1e-5, lr_b=1e-5, schedule="linear", warmup=0.0, optimizer="adamw",
        epochs=3, steps=100, batch=4, accumulate=4, max_length=1536, gradient_checkpointing=True,
    )  # fmt: skip
    assert keys(found, "left") == {"model_name_or_path", "dataset_name", "output_dir", "use_vllm"}
    assert "no file of yours has accuracy_reward" in remark(found, "reward_funcs")
    assert found.command().endswith(
        "--model acme/tiny-qwen --data acme/sums --out out --reward 2*FILE.py:FUNCTION"
    )
    assert "whole groups" in remark(found, "gradient_accumulation_steps")
    write(found, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == found.recipe


def test_axolotls_block_has_trls_keys_and_its_own():
    blocks = {rule.key for rule in axolotl_objectives.OF_BLOCK}
    assert {"num_generations", "rollout_func", "use_liger_loss", "vllm_lora_sync"} <= blocks


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
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
)  # fmt: skip
def test_settings_of_trl(tmp_path, settings, fields):
    recipe = trl_of(tmp_path, **settings).recipe
    assert {name: getattr(recipe, name) for name in fields} == fields


def test_rloo_and_a_file_of_no_model(tmp_path):
    found = trl_of(tmp_path, "trl-rloo", normalize_advantages=True)
    assert (found.recipe.objective, found.recipe.beta) == ("rloo", 0.05)
    assert found.recipe.objective_options["group"] == 2
    assert found.recipe.objective_options["scale"] == "batch"
    assert found.recipe.batch == 4
    assert "off its reward" in remark(found, "beta")
    assert translated(tmp_path, "num_generations: 4\nreward_clip_range:").tool == "TRL's RLOO"
    alone = translated(tmp_path, "num_generations: 4\nloss_type: grpo")
    assert alone.recipe.method == "lora"
    assert "names no model" in remark(alone, "use_peft")
    assert "--reward FILE.py:FUNCTION" in alone.command()


def test_where_axolotls_beta_stands(tmp_path):
    assert grpo_of(tmp_path).recipe.beta is None
    assert grpo_of(tmp_path, {"rl_beta": 0.2}).recipe.beta == 0.2
    assert grpo_of(tmp_path, {"rl_beta": 0.2}, beta=0.0).recipe.beta is None
    assert grpo_of(tmp_path, {"rl_beta": 0.2}, beta=0.3).recipe.beta == 0.3
    found = grpo_of(tmp_path, max_completion_length=None)
    assert "no limit" in remark(found, "trl.max_completion_length")
    assert found.recipe.max_length == 512 + found.recipe.objective_options["max_new_tokens"]
    batched = grpo_of(tmp_path, {"batch_size": 32, "micro_batch_size": 8}).recipe
    assert (batched.batch, batched.accumulate) == (4, 4)


DRAWN_OTHERWISE = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.1,
                   "repetition_penalty": 1.1, "steps_per_generation": 4, "delta": 1.5,
                   "off_policy_mask_threshold": 0.5}  # fmt: skip


def test_what_means_something_else_here_is_told(tmp_path):
    assert keys(trl_of(tmp_path, **DRAWN_OTHERWISE), "changed") - {"reward_funcs"} == set(
        DRAWN_OTHERWISE
    )
    same = {"temperature": 1.0, "top_p": 1, "top_k": -1, "min_p": 0, "num_iterations": 1,
            "top_entropy_quantile": 1.0, "entropy_coef": 0}  # fmt: skip
    assert keys(trl_of(tmp_path, **same), "changed") == {"reward_funcs"}
    plain = trl_of(tmp_path, beta=0.1, use_bias_correction_kl=False)
    assert "by its ratio" in remark(plain, "beta")
    assert remark(trl_of(tmp_path, beta=0.1), "beta") == ""
    assert trl_of(tmp_path, sync_ref_model=True).recipe.beta is None  # there is no reference
    several = trl_of(tmp_path, num_iterations=4)
    assert several.recipe.objective_options["updates"] == 4
    assert "steps count draws here" in remark(several, "num_iterations")


REFUSED = [
    ({"num_iterations": 2, "delta": 2}, "delta: found 2 with num_iterations"),
    ({"loss_type": "sapo"}, "loss_type: found 'sapo', but lorafold has no such law"),
    ({"loss_type": "ppo"}, "loss_type: found 'ppo', expected dapo or bnpo"),
    ({"loss_type": "cispo"}, "'cispo' and 0.2 as epsilon_high, to which TRL bounds the ratio"),
    ({"loss_type": "cispo", "epsilon_high": 5, "importance_sampling_level": "sequence"},
     "importance_sampling_level: found 'sequence'"),
    ({"scale_rewards": "std"}, "scale_rewards: found 'std', expected group or batch or none"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "lorafold sums rewards before"),
    ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model: found True, but lorafold's reference"),
    ({"num_generations": 1}, "num_generations: found 1, expected 2 or more"),
    ({"reward_weights": [1, 2]}, "found 1 functions and 2 reward_weights"),
    ({"reward_funcs": ["acme/judge"]}, "reward_funcs: found 'acme/judge', a model that scores"),
    ({"epsilon": 2}, "epsilon"),
    ({"top_entropy_quantile": 0.2}, "top_entropy_quantile: found 0.2"),
    ({"entropy_coef": 0.1}, "entropy_coef: found 0.1"),
]


@pytest.mark.parametrize(("settings", "part"), REFUSED)
def test_what_is_asked_for_and_we_have_not_is_refused(tmp_path, settings, part):
    for made in (trl_of, grpo_of):
        with pytest.raises(LorafoldError) as caught:
            made(tmp_path, **settings)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(LorafoldError, match="rollout_func: found 'play'"):
        grpo_of(tmp_path, rollout_func="play")


@pytest.mark.parametrize("tool", [trl_of, grpo_of])
def test_a_translated_policy_trains(tool, tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(
        "def score(completions, **row):\n    return [len(text) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    where = {"max_steps": 2, "bf16": False, "learning_rate": 1e-3}
    whole = {"per_device_train_batch_size": 4, **where} if tool is trl_of else {
        "outside": {"micro_batch_size": 4, "float32": True, **where}}  # fmt: skip
    found = tool(tmp_path, num_generations=2, max_completion_length=4, **whole)
    write(found, tmp_path / "recipe.yaml")
    rows = [{"prompt": f"Name {n} trees."} for n in range(4)]
    recipe, model = load_recipe(tmp_path / "recipe.yaml"), tiny_model_dir("llama")
    result = train(recipe, data=rows, out=tmp_path / "a", model=model, device="cpu")
    assert result.steps == 2
