"""One configuration, run by its own tool in this process, and what it did as a JSON object.

    PYTHON recipe_child.py TOOL FILE RECORD

It runs in that tool's environment and imports nothing of lorafold. Of a tool that trains through
transformers' Trainer the optimizer and the trainer's log are watched, of mlx-lm its callback. The
record has, of each optimizer step, the `losses` as the tool reports them, the `rates` and the
labelled `tokens` (none of preferences), and the number of `parameters` that train.

An Unsloth script is run as it stands. Unsloth itself needs a GPU: the functions that it imports are
stood in for by those of transformers and PEFT that Unsloth replaces, under the same arguments.
"""

import importlib
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def watch_optimizer(found: Record) -> None:
    """Note the rate of each step and how many parameters there are."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        found["rates"].append(groups[0]["lr"])
        found["parameters"] = sum(p.numel() for g in groups for p in g["params"])

    register_optimizer_step_pre_hook(before)


def watch_trainer(found: Record) -> None:
    """Note the losses that transformers' Trainer logs, and the labelled tokens of each step."""
    from transformers import Trainer

    log, batches = Trainer.log, Trainer.get_batch_samples

    def logged(self: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found["losses"] += [float(logs["loss"])] if "loss" in logs else []
        return log(self, logs, *args, **kwargs)

    def taken(self: Any, *args: Any, **kwargs: Any) -> Any:
        got = batches(self, *args, **kwargs)
        labels = [one["labels"] for one in got[0] if "labels" in one]
        if labels:
            found["tokens"].append(sum(int((of[..., 1:] != -100).sum()) for of in labels))
        return got

    Trainer.log, Trainer.get_batch_samples = logged, taken


def run_trl(script: str, file: str) -> None:
    module = importlib.import_module(f"trl.scripts.{script}")
    sys.argv = [script, "--config", file]
    module.main(*module.make_parser().parse_args_and_config(fail_with_unknown_args=False))


def run_llamafactory(file: str) -> None:
    import yaml
    from llamafactory.train.tuner import run_exp

    run_exp(args=yaml.safe_load(Path(file).read_text()))


def run_axolotl(file: str) -> None:
    from axolotl.cli.train import do_cli

    do_cli(file)


def run_mlx(file: str, found: Record) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import lora
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Noted(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            found["losses"].append(train_info["train_loss"])
            found["rates"].append(train_info["learning_rate"])
            found["tokens"].append(train_info["trained_tokens"] - sum(found["tokens"]))

    def counted(model: Any) -> None:
        trained = tree_flatten(model.trainable_parameters())
        found["parameters"] = sum(tensor.size for _, tensor in trained)
        mx.eval(model.parameters())

    lora.get_reporting_callbacks = lambda *args, **kwargs: Noted()
    lora.print_trainable_parameters = counted
    sys.argv = ["mlx_lm.lora", "--config", file]
    lora.main()


class FastLanguageModel:
    """What Unsloth's class of this name makes, by transformers and PEFT."""

    @staticmethod
    def from_pretrained(model_name: str, **others: Any) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(
        model: Any, random_state: int, use_gradient_checkpointing: str, **config: Any
    ) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        set_seed(random_state)
        config["loftq_config"] = config["loftq_config"] or {}
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))


def train_on_responses_only(trainer: Any, instruction_part: str, response_part: str) -> Any:
    """Label what follows a response part, up to the next instruction part."""
    from transformers import DataCollatorForSeq2Seq

    tokenizer = trainer.processing_class
    begin = tokenizer.encode(response_part, add_special_tokens=False)
    end = tokenizer.encode(instruction_part, add_special_tokens=False)

    def labelled(row: dict) -> dict:
        ids, labels, on, at = list(row["input_ids"]), [], False, 0
        while at < len(ids):
            if ids[at : at + len(begin)] == begin:
                labels, on, at = labels + [-100] * len(begin), True, at + len(begin)
                continue
            on = on and ids[at : at + len(end)] != end
            labels.append(ids[at] if on else -100)
            at += 1
        return {"labels": labels}

    trainer.train_dataset = trainer.train_dataset.map(labelled)
    trainer.data_collator = DataCollatorForSeq2Seq(tokenizer)
    return trainer


def run_unsloth(file: str) -> None:
    module, templates = types.ModuleType("unsloth"), types.ModuleType("unsloth.chat_templates")
    module.FastLanguageModel = FastLanguageModel  # type: ignore[attr-defined]
    templates.train_on_responses_only = train_on_responses_only  # type: ignore[attr-defined]
    sys.modules |= {"unsloth": module, "unsloth.chat_templates": templates}
    runpy.run_path(file, run_name="__main__")


def main() -> None:
    tool, file, record = sys.argv[1:]
    found: Record = {"losses": [], "rates": [], "tokens": [], "parameters": 0}
    if tool == "mlx-lm":
        run_mlx(file, found)
    else:
        watch_optimizer(found)
        watch_trainer(found)
        runs = {
            "trl-sft": lambda: run_trl("sft", file),
            "trl-dpo": lambda: run_trl("dpo", file),
            "unsloth": lambda: run_unsloth(file),
            "llamafactory": lambda: run_llamafactory(file),
            "axolotl": lambda: run_axolotl(file),
        }
        runs[tool]()
    Path(record).write_text(json.dumps(found))


if __name__ == "__main__":  # workers of axolotl import this file again
    main()
