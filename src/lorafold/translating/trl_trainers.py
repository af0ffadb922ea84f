"""TRL's trainers, each with the rules of its own fields: SFT, DPO, KTO, CPO (SimPO), ORPO and the
reward trainer. Those of GRPO and RLOO stand in `policy_rules`, what all share in `trl`.

Read off TRL 1.16, of CPO and ORPO off its experimental part.
"""

from __future__ import annotations

from lorafold.translating import policies, policy_batches, trl
from lorafold.translating import trl_readers as readers
from lorafold.translating.convert import boolean, integer
from lorafold.translating.no_counterpart import MEMORY
from lorafold.translating.policy_rules import GRPO, RLOO
from lorafold.translating.preferences import beta, law_option, smoothing_of_dpo
from lorafold.translating.rules import Rule, all_without, refusing, taken, to, unless

# Where completions are drawn, a batch counts completions and no dropout is applied
DRAWING = (
    *readers.data_rules("grpo"),
    Rule("lora_dropout", trl.of_lora(policies.dropout), 0.05),
    Rule("learning_rate", trl.learning_rate, 1e-6),
    Rule("per_device_train_batch_size", policy_batches.batch, 8),
    Rule("gradient_accumulation_steps", policy_batches.accumulation, 1),
    Rule("max_prompt_length", policies.prompt_length),
    Rule("reward_model_name_or_path", refusing(
        "lorafold's rewards are functions, patterns, schemas and verifiers")),
)  # fmt: skip

GIVEN = (
    Rule("lora_dropout", trl.of_lora(readers.dropout), 0.05),
    Rule("per_device_train_batch_size", readers.batch, 8),
    Rule("gradient_accumulation_steps", to("accumulate", integer), 1),
    Rule("max_length", readers.max_length, 1024),
    Rule("max_prompt_length", readers.part_of_length),
    Rule("max_completion_length", readers.part_of_length),
    Rule("truncation_mode", readers.truncation_mode),
    *all_without(MEMORY, "pad_to_multiple_of"),
)  # fmt: skip

SFT = (
    Rule("loss_type", readers.sft_loss, "nll"),
    Rule("learning_rate", trl.learning_rate, 2e-5),
    Rule("packing", readers.packing, False),
    Rule("packing_strategy", readers.packing_strategy),
    Rule("eval_packing", lambda value, settings: taken("packing decides")),
    Rule("max_seq_length", readers.max_seq_length),
    Rule("completion_only_loss", readers.completion_only_loss),
    Rule("assistant_only_loss", readers.assistant_only_loss, False),
    Rule("dataset_text_field", readers.dataset_text_field),
    Rule("chat_template_path", readers.chat_template_path),
    *readers.data_rules(None),
    *GIVEN,
)

# Of preferences: dropout is off, and the reference is what lies beneath
COMPARING = (
    Rule("disable_dropout", lambda value, settings: (
        taken("there is none") if boolean(value) else taken("dropout is applied")), True),
    Rule("packing", lambda value, settings: (
        taken(packing=False)), False),
    *GIVEN,
)  # fmt: skip
REFERENCE = (
    Rule("sync_ref_model", policies.needs_reference(readers.STAYS)),
    *(Rule(key, lambda value, settings: taken("it is read with sync_ref_model"))
      for key in ("ref_model_mixup_alpha", "ref_model_sync_steps")),
)  # fmt: skip

DPO = (
    Rule("loss_type", readers.dpo_loss, ["sigmoid"]),
    Rule("loss_weights", lambda value, settings: taken("they are read with loss_type")),
    Rule("beta", beta(readers.objective_of_dpo), 0.1),
    Rule("learning_rate", trl.learning_rate, 1e-6),
    Rule("label_smoothing", smoothing_of_dpo),
    Rule("f_divergence_type", readers.only("reverse_kl", "lorafold's laws have its reverse KL")),
    Rule("f_alpha_divergence_coef", lambda value, settings: taken(
        "it is read with f_divergence_type")),
    Rule("ld_alpha", unless(1, "lorafold weighs the tokens of both completions alike")),
    Rule("use_weighting", refusing("lorafold weighs every pair alike")),
    Rule("discopop_tau", lambda value, settings: None),
    *readers.data_rules("dpo"),
    *REFERENCE,
    *COMPARING,
)  # fmt: skip

KTO = (
    Rule("loss_type", readers.kto_loss, "kto"),
    Rule("beta", beta(lambda settings: "kto"), 0.1),
    Rule("learning_rate", trl.learning_rate, 1e-6),
    Rule("desirable_weight", law_option("desirable_weight", lambda settings: "kto"), 1.0),
    Rule("undesirable_weight", law_option("undesirable_weight", lambda settings: "kto"), 1.0),
    *readers.data_rules("kto"),
    *REFERENCE,
    *COMPARING,
)

CPO = (
    Rule("loss_type", readers.cpo_loss, "sigmoid"),
    Rule("beta", beta(lambda settings: "simpo"), 0.1),
    Rule("learning_rate", trl.learning_rate, 1e-6),
    Rule("simpo_gamma", law_option("gamma", lambda settings: "simpo"), 0.5),
    Rule("cpo_alpha", readers.cpo_alpha, 1.0),
    Rule("alpha", unless(0, "lorafold's rewards are log-probabilities, without AlphaPO's power")),
    Rule("label_smoothing", unless(0, "lorafold's simpo has no such option")),
    *readers.data_rules("simpo"),
    *COMPARING,
)

ORPO = (
    Rule("beta", readers.orpo_beta, 0.1),
    Rule("learning_rate", trl.learning_rate, 1e-6),
    *readers.data_rules("orpo"),
    *COMPARING,
)

REWARD = (
    Rule("center_rewards_coefficient", readers.centre, 0.0),
    Rule("learning_rate", trl.learning_rate, 1e-4),
    Rule("chat_template_path", readers.chat_template_path),
    *readers.data_rules("reward"),
    *COMPARING,
)

OF_POLICIES = (
    "reward_funcs reward_weights num_generations mask_truncated_completions steps_per_generation"
    " generation_batch_size use_vllm"
)
NAMES = {
    kind: f"TRL's {name}"
    for kind, name in [
        ("trl-sft", "SFT"),
        ("trl-dpo", "DPO"),
        ("trl-kto", "KTO"),
        ("trl-orpo", "ORPO"),
        ("trl-cpo", "CPO"),
        ("trl-reward", "reward trainer"),
        ("trl-grpo", "GRPO"),
        ("trl-rloo", "RLOO"),
    ]
}
SIGNS = {
    "trl-sft": "packing packing_strategy padding_free completion_only_loss assistant_only_loss"
    " dataset_text_field dataset_kwargs eval_packing loss_type=nll loss_type=dft"
    " loss_type=chunked_nll max_seq_length",
    "trl-dpo": " ".join(f"loss_type={name}" for name in readers.DPO_NAMES)
    + " loss_weights f_divergence_type use_weighting discopop_tau ld_alpha",
    "trl-kto": "desirable_weight undesirable_weight loss_type=kto loss_type=apo_zero_unpaired",
    "trl-orpo": "",
    "trl-cpo": "cpo_alpha simpo_gamma loss_type=simpo loss_type=alphapo",
    "trl-reward": "center_rewards_coefficient",
    "trl-grpo": f"{OF_POLICIES} num_iterations scale_rewards importance_sampling_level"
    " multi_objective_aggregation delta loss_type=dapo loss_type=bnpo loss_type=dr_grpo"
    " loss_type=grpo loss_type=luspo loss_type=cispo",
    "trl-rloo": f"{OF_POLICIES} normalize_advantages reward_clip_range",
}
RULES = {
    "trl-sft": (*SFT, *trl.COMMON),
    "trl-dpo": (*DPO, *trl.COMMON),
    "trl-kto": (*KTO, *trl.COMMON),
    "trl-orpo": (*ORPO, *trl.COMMON),
    "trl-cpo": (*CPO, *trl.COMMON),
    "trl-reward": (*REWARD, *trl.COMMON),
    "trl-grpo": (*GRPO, *DRAWING, *trl.COMMON),
    "trl-rloo": (*RLOO, *DRAWING, *trl.COMMON),
}
