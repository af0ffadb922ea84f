"""Fine-tuning on real chat data from the first to the last second, `lorafold train` beside TRL's
SFTTrainer with PEFT.

    python benchmarks/chat.py [--rows 128] [--rounds 2] [--storage bf16,nf4] [--system 400]

Worked solutions of generated arithmetic problems (`reasoning-gym`), one epoch in batches of 8 rows,
LoRA of rank 16 with dropout 0.05 on every linear, learning rate 2e-4, on the embedded model in
bf16; TRL with its defaults but for gradient checkpointing, which it would turn on and which makes
it slower, and with packing where every row begins with a system prompt of --system tokens, of
which a step of lorafold computes one. Seconds are those of the whole process, imports, loading,
tokenizing, logging and saving included, and of training alone as each reports it; tokens are the
real ones of the rows. Both take the same steps over the same rows; TRL labels one token more of
each, the newline that the template writes after a turn. The sides run in turn; figures are medians.
Prints JSON lines and a table, which is also written to results/chat.json. Linux only.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lib.finished import COUNTED, Finished, finished
from lib.problems import problems
from lib.results import keep
from lib.short import parsed
from lib.work import same_work

from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer

TRL = """
import json, sys, torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from lib.work import none, of_trainer, stepping
from trl import SFTConfig, SFTTrainer

model, data, out, packing = sys.argv[1:]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
    processing_class=AutoTokenizer.from_pretrained(model),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    args=SFTConfig(
        output_dir=out, per_device_train_batch_size=8, num_train_epochs=1, learning_rate=2e-4,
        logging_steps=4, report_to="none", bf16=True, use_cpu=True, gradient_checkpointing=False,
        packing=packing == "packing",
    ),
    peft_config=LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
)
work = none()
of_trainer(trainer, work)
with stepping(work):
    metrics = trainer.train().metrics
trainer.save_model(out)
print(json.dumps({"seconds": metrics["train_runtime"], "work": work}))
"""


def chat(n: int, system: str) -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    return [
        {
            "prompt": [*first, {"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": solution}],
        }
        for question, solution in problems(n, 0)
    ]


def rules(tokens: int, tokenizer: Any) -> str:
    """A system prompt of at least so many tokens."""
    found, number = "", 0
    while len(tokenizer(found)["input_ids"]) < tokens:
        number += 1
        found += f"Rule {number}: a sum of {number} and {number * 7} is written on its own line. "
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument(
        "--storage",
        default="bf16,nf4",
        help="what lorafold holds the base as, separated by commas; TRL holds it in bf16",
    )
    parser.add_argument("--system", type=int, default=0, help="tokens of a system prompt")
    asked = parsed(parser, rows=16, rounds=1, storage="bf16")
    model, tokenizer = str(resolve_model("smollm2").path), load_tokenizer("smollm2")
    rows = chat(asked.rows, rules(asked.system, tokenizer))
    tokens = sum(
        len(tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"])
        for row in rows
    )
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = [
            *(*COUNTED, "train", "--model", model, "--data", str(data), "--out", f"{scratch}/ours"),
            *("--overwrite", "--epochs", "1", "--batch", "8", "--lr", "2e-4", "--lr-b", "2e-4"),
            "--json",
        ]
        sides = {
            f"lorafold, {base}": [*own, "--storage", base] for base in asked.storage.split(",")
        }
        sides["TRL + PEFT"] = [
            *(sys.executable, "-c", TRL, model, str(data), f"{scratch}/trl"),
            "packing" if asked.system else "padded",
        ]
        found: dict[str, list[Finished]] = {side: [] for side in sides}
        work = {}
        for _ in range(asked.rounds):
            for side, command in sides.items():
                found[side].append(done := finished(command))
                work[side] = dict(done.said["work"])
                told = {k: done.said[k] for k in ("seconds", "work")}
                whole = {"whole_seconds": done.seconds, "peak_bytes": done.peak_bytes}
                print(json.dumps({"side": side} | told | whole), flush=True)
            work["TRL + PEFT"]["targets"] -= asked.rows  # the newlines
            same_work(work)
    slowest = statistics.median(r.seconds for r in found["TRL + PEFT"])
    table = []
    for side, runs in found.items():
        whole = statistics.median(r.seconds for r in runs)
        peak = statistics.median(r.peak_bytes for r in runs)
        training = statistics.median(r.said["seconds"] for r in runs)
        table.append(
            {
                "": side,
                "total seconds": f"{whole:.0f}",
                "training": f"{training:.0f}",
                "tokens/s without padding": f"{tokens / training:.0f}",
                "speed-up": f"{slowest / whole:.1f}",
                "peak GB": f"{peak / 1e9:.2f}",
            }
        )
    keep("chat_system" if asked.system else "chat", table, dtypes="see the rows")


if __name__ == "__main__":
    main()
