"""Fine-tuning on real chat data from the first to the last second, `lorafold train` beside TRL's
SFTTrainer with PEFT.

    python benchmarks/chat.py [--rows 128] [--rounds 2] [--storage bf16,nf4] [--system 400]

Worked solutions of generated arithmetic problems (`reasoning-gym`), one epoch in batches of 8 rows,
LoRA of rank 16 with dropout 0.05 on every linear, learning rate 2e-4, on the embedded model in
bf16; TRL with its defaults but for gradient checkpointing, which it would turn on and which makes
it slower, and with packing where every row begins with a system prompt of --system tokens, of
which a step of lorafold computes one. Seconds are those of the whole process, imports, loading,
tokenizing, logging and saving included, and of training alone as each reports it; tokens are the
real ones of the rows. The sides run in turn; figures are medians. Prints JSON lines and a table,
which is also written to results/chat.md. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.results import keep
from reasoning_gym import create_dataset

from lorafold.models.loading import load_tokenizer
from lorafold.models.sources import resolve_model

TRL = """
import json, sys, torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
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
metrics = trainer.train().metrics
trainer.save_model(out)
print(json.dumps({"seconds": metrics["train_runtime"], "loss": metrics["train_loss"]}))
"""


def chat(n: int, system: str) -> list[dict]:
    data = create_dataset("gsm_symbolic", size=n, seed=0)
    first = [{"role": "system", "content": system}] if system else []
    return [
        {
            "prompt": [*first, {"role": "user", "content": item["question"]}],
            "completion": [{"role": "assistant", "content": item["metadata"]["answer_cot"]}],
        }
        for item in data
    ]


def rules(tokens: int, tokenizer: Any) -> str:
    """A system prompt of at least so many tokens."""
    found, number = "", 0
    while len(tokenizer(found)["input_ids"]) < tokens:
        number += 1
        found += f"Rule {number}: a sum of {number} and {number * 7} is written on its own line. "
    return found


def run(command: list[str]) -> dict:
    """Seconds and peak bytes of a process, and what it says of itself in its last line."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}: exit code {child.returncode}")
    found = json.loads(said.strip().splitlines()[-1])
    return {
        **found,
        "whole_seconds": time.perf_counter() - start,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


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
    asked = parser.parse_args()
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
            sys.executable,
            "-m",
            "lorafold",
            "train",
            "--model",
            model,
            "--data",
            str(data),
            "--out",
            f"{scratch}/ours",
            "--overwrite",
        ]
        sides = {
            f"lorafold, {base}": [*own, "--storage", base, "--set", "lr_b=2e-4", "--json"]
            for base in asked.storage.split(",")
        }
        sides["TRL + PEFT"] = [
            *(sys.executable, "-c", TRL, model, str(data), f"{scratch}/trl"),
            "packing" if asked.system else "padded",
        ]
        found: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(asked.rounds):
            for side, command in sides.items():
                found[side].append(run(command))
                print(
                    json.dumps(
                        {
                            "side": side,
                            **{k: v for k, v in found[side][-1].items() if k != "losses"},
                        }
                    ),
                    flush=True,
                )
    slowest = statistics.median(r["whole_seconds"] for r in found["TRL + PEFT"])
    table = []
    for side, runs in found.items():
        whole, peak = (
            statistics.median(r[k] for r in runs) for k in ("whole_seconds", "peak_bytes")
        )
        training = statistics.median(r["seconds"] for r in runs)
        table.append(
            {
                "": side,
                "seconds in all": f"{whole:.0f}",
                "training": f"{training:.0f}",
                "real tokens/s": f"{tokens / training:.0f}",
                "times as fast": f"{slowest / whole:.1f}",
                "peak GB": f"{peak / 1e9:.2f}",
            }
        )
    keep("chat", table)


if __name__ == "__main__":
    main()
