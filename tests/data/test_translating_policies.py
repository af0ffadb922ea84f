"""GRPO, RLOO and preferences of axolotl and TRL as recipes: fields, losses, references."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, RewardConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from lorafold.config_import import axolotl_objectives
from lorafold.objectives.algorithm_options import policy_options, preference_algorithm
from lorafold.training_step.preference_algorithms import Scored
from lorafold.training_step.preference_loss import Preferences
from policy_losses import LONGEST, check_loss_of_trl
from preference_cases import PAIRS, adapted, asked, check_gradients, examples_of, trainer_of
from translation_cases import axolotl_of, grpo_of, keys, llamafactory_of, remark, translated, trl_of

pytestmark = pytest.mark.usefixtures("unestimated")


def test_axolotls_block_has_trls_keys_and_its_own():
    blocks = {rule.key for rule in axolotl_objectives.BLOCK_RULES}
    assert {"num_generations", "rollout_func", "use_liger_loss", "vllm_lora_sync"} <= blocks


def test_rloo_and_a_file_of_no_model(tmp_path):
    found = trl_of(tmp_path, "trl-rloo", normalize_advantages=True)
    assert (found.recipe.objective, found.recipe.beta) == ("rloo", 0.05)
    assert found.recipe.objective_options["group"] == 2
    assert found.recipe.objective_options["scale"] == "batch"
    assert found.recipe.batch == 4
    assert "from its reward" in remark(found, "beta")
    assert translated(tmp_path, "num_generations: 4\nreward_clip_range:").tool == "TRL's RLOO"
    alone = translated(tmp_path, "num_generations: 4\nloss_type: grpo")
    assert alone.recipe.method == "lora"
    assert "sets no model" in remark(alone, "use_peft")
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


DRAWN_OTHERWISE = {"top_p": 0.9, "top_k": 50, "min_p": 0.1,
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
    assert "by its importance ratio" in remark(plain, "beta")
    assert remark(trl_of(tmp_path, beta=0.1), "beta") == ""
    assert trl_of(tmp_path, sync_ref_model=True).recipe.beta is None  # there is no reference
    assert trl_of(tmp_path, temperature=0.9).recipe.objective_options["temperature"] == 0.9
    several = trl_of(tmp_path, num_iterations=4)
    assert several.recipe.objective_options["updates"] == 4
    assert "divide all steps by 4" in remark(several, "num_iterations")


LOSSES = [
    {},
    {"loss_type": "grpo", "beta": 0.04},
    {"loss_type": "bnpo", "epsilon": 0.1},
    {"loss_type": "dr_grpo", "scale_rewards": False, "epsilon_high": 0.28},
    {"loss_type": "cispo", "epsilon_high": 1.1, "scale_rewards": "batch"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4},
    {"importance_sampling_level": "sequence"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "luspo", "beta": 0.1},
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_losses_of_translated_recipes_are_those_of_trl(
    settings, tmp_path, tiny_model_dir, monkeypatch
):
    recipe = trl_of(tmp_path, max_completion_length=LONGEST, **settings).recipe
    law, _ = policy_options(recipe.objective, recipe.beta, recipe.objective_options)
    check_loss_of_trl(law, settings, tiny_model_dir("llama"), tmp_path, monkeypatch)


def scored():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[5.0, 9.0], [12.0, 3.0], [7.0, 7.0]])
    logps = -tokens * torch.rand(3, 2, generator=draw, dtype=torch.double) * 2
    reference = -tokens * torch.rand(3, 2, generator=draw, dtype=torch.double) * 2
    return Scored(logps, reference, tokens.double())


def llamafactory_loss(kind, found, beta, smoothing, gamma, ftx):
    """The documented losses of LLaMA-Factory, by row."""
    means = found.logps / found.tokens
    d = (found.logps - found.reference)[:, 0] - (found.logps - found.reference)[:, 1]
    if kind == "sigmoid":
        loss = -(1 - smoothing) * logsigmoid(beta * d) - smoothing * logsigmoid(-beta * d)
    elif kind == "hinge":
        loss = (1 - beta * d).relu()
    elif kind == "ipo":
        ratio = means - found.reference / found.tokens
        loss = (ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta)) ** 2
    elif kind == "orpo":
        odds = means - torch.log1p(-means.exp())
        loss = -means[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])
    else:
        loss = -logsigmoid(beta * (means[:, 0] - means[:, 1] - gamma / beta))
    return loss - ftx * means[:, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pref_beta": 0.4, "dpo_label_smoothing": 0.2, "pref_ftx": 0.7},
        {"pref_loss": "hinge", "pref_beta": 0.05},
        {"pref_loss": "ipo"},
        {"pref_loss": "orpo", "pref_beta": 0.3},
        {"pref_loss": "simpo"},
        {"pref_loss": "simpo", "pref_beta": 1.5, "simpo_gamma": 0.9, "pref_ftx": 0.1},
    ],
)
def test_llamafactorys_losses_are_ours(tmp_path, settings):
    recipe = llamafactory_of(tmp_path, stage="dpo", **settings).recipe
    law = preference_algorithm(recipe.objective, recipe.beta, recipe.objective_options)
    expected = llamafactory_loss(
        settings.get("pref_loss", "sigmoid"),
        scored(),
        settings.get("pref_beta", 0.1),
        settings.get("dpo_label_smoothing", 0.0),
        settings.get("simpo_gamma", 0.5),
        settings.get("pref_ftx", 0.0),
    )
    torch.testing.assert_close(law.loss(scored()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"adapter_name_or_path": "a"}, "--init-adapter a"),
        ({"adapter_name_or_path": "a,b"}, "--over a --init-adapter b"),
        ({"adapter_name_or_path": "a", "create_new_adapter": True}, "--over a"),
        ({"adapter_name_or_path": ["a", "b"], "create_new_adapter": True}, "--over a --over b"),
        # a quantized base goes on with the adapter, whatever the file says
        ({"adapter_name_or_path": "a", "create_new_adapter": True, "quantization_bit": 4},
         "--init-adapter a"),
    ],
)  # fmt: skip
def test_llamafactorys_adapters_go_below_or_go_on(tmp_path, settings, flags):
    for stage in ("sft", "dpo"):
        found = llamafactory_of(tmp_path, stage=stage, lora_rank=4, **settings)
        assert found.command().endswith(f"--out OUT {flags}")
        goes_on = "--init-adapter" in flags
        assert (found.recipe.rank is None) == goes_on


@pytest.mark.parametrize(
    ("settings", "objective", "beta", "options"),
    [
        ({"rl": "dpo"}, "dpo", 0.1, {}),
        ({"rl": "dpo", "dpo_loss_type": ["hinge"], "dpo_beta": 0.3}, "hinge", 0.3, {}),
        ({"rl": "dpo", "dpo_loss_type": ["ipo"], "trl": {"beta": 0.4}}, "ipo", 0.4, {}),
        ({"rl": "dpo", "dpo_loss_type": ["sigmoid", "sft"]}, "dpo", 0.1, {"sft_weight": 1.0}),
        ({"rl": "dpo", "dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1, 0.2]},
         "dpo", 0.1, {"sft_weight": 0.2}),
        ({"rl": "ipo", "rl_beta": 0.2}, "ipo", 0.2, {}),
        ({"rl": "orpo", "orpo_alpha": 0.25}, "orpo", 0.25, {}),
        ({"rl": "orpo", "orpo_alpha": 0.25, "rl_beta": 0.5}, "orpo", 0.5, {}),
        ({"rl": "simpo", "simpo_gamma": 0.5}, "simpo", 0.1, {"gamma": 0.5, "sft_weight": 1.0}),
        ({"rl": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0, "rl_beta": 2}, "simpo", 2.0, {}),
        ({"rl": "kto", "kto_undesirable_weight": 0.5}, "kto", 0.1, {"undesirable_weight": 0.5}),
        ({"reward_model": True}, "reward", None, {}),
        ({"reward_model": True, "center_rewards_coefficient": 0.01, "num_labels": 1},
         "reward", None, {"centre": 0.01}),
        ({"reward_model": False, "rl": None, "rl_beta": 0.5, "cpo_alpha": 3}, "sft", None, {}),
    ],
)  # fmt: skip
def test_axolotl_settings(tmp_path, settings, objective, beta, options):
    found = axolotl_of(tmp_path, lora_dropout=0.1, **settings)
    recipe = found.recipe
    assert (recipe.objective, recipe.beta, recipe.objective_options) == (objective, beta, options)
    assert recipe.dropout == (0.1 if objective == "sft" else 0.0)
    assert (recipe.lr, recipe.lr_b) == (1e-4, 1e-4)


def test_what_trl_computes_otherwise_is_told(tmp_path):
    told = axolotl_of(tmp_path, rl="orpo")
    assert keys(told, "changed") == {"rl"}
    assert "trains on the prompts" in remark(told, "rl")
    told = axolotl_of(tmp_path, rl="simpo", simpo_gamma=0.5)
    assert "micro-batch" in remark(told, "cpo_alpha")
    told = axolotl_of(tmp_path, rl="dpo", dpo_label_smoothing=0.1)
    assert keys(told, "left") == {"base_model", "dpo_label_smoothing"}
    assert "--objective-options label_smoothing=0.1" in remark(told, "dpo_label_smoothing")


def test_the_losses_of_axolotls_trainer_are_ours(tmp_path, tiny_model_dir):
    """Of one row, so that TRL's mean over the tokens of a batch is the mean over the row's."""
    path = tiny_model_dir("llama")
    model, tokenizer = (
        kind.from_pretrained(path) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    adapter = adapted(model)
    adapter.save(tmp_path / "adapter")
    for settings in (
        {"dpo_label_smoothing": 0.3},
        {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.2], "rl_beta": 0.4},
    ):
        recipe = axolotl_of(tmp_path, rl="dpo", **settings).recipe
        config = DPOConfig(
            output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, beta=recipe.beta,
            loss_type=settings.get("dpo_loss_type", ["sigmoid"]),
            loss_weights=settings.get("dpo_loss_weights"),
            label_smoothing=settings.get("dpo_label_smoothing", 0.0),
        )  # fmt: skip
        trainer = trainer_of(DPOTrainer, config, PAIRS[:1], path, tmp_path / "adapter")
        [example] = examples_of(PAIRS[:1], tokenizer)
        prompt, (chosen, rejected) = asked(example)
        batch = trainer.data_collator(
            [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}]
        )
        law = preference_algorithm(recipe.objective, recipe.beta, recipe.objective_options)
        loss = Preferences(model, law, None, tokenizer.pad_token_id)
        expected = trainer.compute_loss(trainer.model, batch)
        own = loss(**loss.collate([example], loss.device))
        check_gradients(trainer, expected, adapter, own)
        for parameter in adapter.parameters():
            parameter.grad = None


def test_trl_turns_the_dropout_of_lora_off(tmp_path, tiny_model_dir):
    path = tiny_model_dir("llama")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"),
    )
    found = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert found
    assert not any(found)


def test_trls_defaults_are_those_that_a_translation_writes():
    defaults = [c.__dataclass_fields__ for c in (DPOConfig, KTOConfig, CPOConfig, ORPOConfig)]
    assert [fields["beta"].default for fields in defaults] == [0.1] * 4
    defaults.append(RewardConfig.__dataclass_fields__)
    assert all(fields["disable_dropout"].default for fields in defaults)
    assert CPOConfig.__dataclass_fields__["cpo_alpha"].default == 1.0
    assert DPOConfig.__dataclass_fields__["loss_type"].default_factory() == ["sigmoid"]


def test_axolotl_does_not_load_an_adapter_before_dpo(tmp_path):
    for rl in ("dpo", "ipo", "kto"):
        found = axolotl_of(tmp_path, rl=rl, lora_model_dir="old")
        assert found.command().endswith("--model m --data DATA --out OUT")
        assert "--over" in remark(found, "lora_model_dir")
        assert found.recipe.rank == 8
    for settings in ({"rl": "orpo"}, {"reward_model": True}):
        found = axolotl_of(tmp_path, lora_model_dir="old", **settings)
        assert "--init-adapter old" in found.command()
        assert found.recipe.rank is None
