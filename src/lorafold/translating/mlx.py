"""mlx-lm's YAML of `mlx_lm.lora`: the table of rules, one for a key, with its own defaults.

Read off mlx-lm as of August 2026. Values that need more than a conversion are read in
`mlx_readers`.
"""

from __future__ import annotations

from lorafold.translating import mlx_readers as readers
from lorafold.translating import trainer
from lorafold.translating.convert import boolean, integer, number
from lorafold.translating.no_counterpart import LOGGING, MEMORY, NAMES_OF_RUNS
from lorafold.translating.rules import Rule, all_without, left, option, taken, to, without

SIGNS = (
    "fine_tune_type lora_parameters num_layers lora_layers iters steps_per_eval steps_per_report"
    " adapter_path mask_prompt lr_schedule val_batches grad_checkpoint hf_dataset"
)

RULES: tuple[Rule, ...] = (
    Rule("fine_tune_type", readers.fine_tune_type, "lora"),
    Rule(f"{readers.BLOCK}.rank", readers.of_lora(to("rank", integer)), 8),
    Rule(f"{readers.BLOCK}.scale", readers.of_lora(readers.alpha), 20.0),
    Rule(f"{readers.BLOCK}.dropout", readers.of_lora(to("dropout", number)), 0.0),
    Rule(f"{readers.BLOCK}.keys", readers.of_lora(readers.keys), readers.ALL),
    Rule(f"{readers.BLOCK}.alpha", lambda value, settings: taken("scale decides")),
    Rule(readers.BLOCK, lambda value, settings: None),
    Rule("num_layers", readers.of_lora(readers.num_layers), 16),
    Rule("lora_layers", readers.of_lora(readers.num_layers)),
    Rule("model", readers.model, "Qwen/Qwen3-0.6b"),
    Rule("optimizer", readers.optimizer, "adam"),
    Rule("optimizer_config", lambda value, settings: taken("it is read with optimizer")),
    Rule("learning_rate", readers.learning_rate, 1e-5),
    Rule("lr_schedule", readers.lr_schedule, readers.CONSTANT),
    Rule("iters", readers.in_steps("steps"), 1000),
    Rule("batch_size", readers.batch, 4),
    Rule("grad_accumulation_steps", lambda value, settings: taken("batch has it"), 1),
    Rule("max_seq_length", to("max_length", integer), 2048),
    Rule("mask_prompt", readers.mask_prompt, False),
    Rule("grad_checkpoint", to("gradient_checkpointing", boolean), False),
    Rule("steps_per_eval", readers.in_steps("eval_every"), 200),
    Rule("save_every", readers.in_steps("save_every"), 100),
    Rule("seed", to("seed", integer)),
    Rule("report_to", trainer.trackers),
    Rule("train", lambda value, settings: (
        taken("lorafold train does it") if boolean(value)
        else left("the file does not train; lorafold train does"))),
    Rule("test", without("lorafold eval measures the rows of test.jsonl")),
    Rule("data", readers.data, "mlx-community/WikiSQL"),
    Rule("hf_dataset", readers.hf_dataset),
    *(Rule(key, lambda value, settings: taken("it is read with data"))
      for key in ("prompt_feature", "completion_feature", "chat_feature", "text_feature")),
    Rule("adapter_path", option("--out"), "adapters"),
    Rule("resume_adapter_file", without("lorafold does not read mlx-lm's adapters")),
    Rule("trust_remote_code", lambda value, settings: (
        left("pass --trust-remote-code", "--trust-remote-code")
        if boolean(value) else taken("it is off"))),
    Rule("config", without("it is the file itself")),
    *all_without(NAMES_OF_RUNS, "project_name"),
    *all_without(LOGGING, "steps_per_report val_batches test_batches"),
    *all_without(MEMORY, "clear_cache_threshold"),
)  # fmt: skip
