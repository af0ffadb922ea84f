"""Direct preference optimization: `lorafold train --objective dpo` beside TRL's DPOTrainer with
PEFT.

    python benchmarks/preferences.py [--rows 96] [--rounds 2] [--fidelity]

Pairs of a worked solution of a generated arithmetic problem (`reasoning-gym`) and the same solution
with wrong numbers, one epoch in batches of 8 pairs, LoRA of rank 16 on every linear, beta 0.1, on
the embedded model in bf16; TRL with its defaults but for gradient checkpointing, which makes it
slower. It turns dropout off, so lorafold has none here. The reference of both is the base: TRL
switches its adapter off in each step, lorafold computes it once, which counts as training here.
Tokens are those of prompt and completion, for both completions of a pair, whoever computes them.
The sides run in turn; figures are medians. The margin is what `lorafold eval` measures with either
adapter on 32 unseen pairs, in fp32.

With --fidelity both sides train at a learning rate of 5e-6, in bf16 and in fp32, on short pairs
(those of alignment.py, over the base): the margin in bf16 over that in fp32 is what is kept of an
update in the face of rounding.
Prints JSON lines and tables, which are also written to results/. Linux only.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
from pathlib import Path

import alignment
from lib.finished import COUNTED, finished, own_cache
from lib.problems import problems
from lib.results import keep
from lib.short import parsed
from lib.work import same_work

from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.quickstart.task import rows as task

TRL = """
import json, sys, torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from lib.work import none, of_trainer, stepping
from trl import DPOConfig, DPOTrainer

model, data, out, dtype, lr, epochs = sys.argv[1:]
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
    processing_class=AutoTokenizer.from_pretrained(model),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    args=DPOConfig(
        output_dir=out, per_device_train_batch_size=8, num_train_epochs=int(epochs),
        learning_rate=float(lr), logging_steps=4, report_to="none", bf16=dtype == "bfloat16",
        use_cpu=True, gradient_checkpointing=False, save_strategy="no",
    ),
    peft_config=LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
)
work = none()
of_trainer(trainer, work)
with stepping(work):
    metrics = trainer.train().metrics
trainer.save_model(out)
print(json.dumps({"seconds": metrics["train_runtime"], "work": work}))
"""


def pairs(n: int, seed: int) -> list[dict]:
    """Worked solutions, and the same with every number but those of the question changed."""
    rng = random.Random(seed)
    rows = []
    for question, right in problems(n, seed):
        wrong = re.sub(r"\d+", lambda m: str(int(m[0]) + rng.randint(1, 9)), right)
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": wrong}],
            }
        )
    return rows


def run(command: list[str], cache: str) -> dict:
    """Seconds and peak bytes of a process, and what it says of itself in its last line."""
    done = finished(command, LORAFOLD_CACHE=own_cache(Path(cache)))
    reference = re.search(r"computed in ([\d.]+) s", done.told)
    return {
        "seconds": done.said.get("seconds", 0.0) + (float(reference[1]) if reference else 0.0),
        "whole_seconds": done.seconds,
        "peak_bytes": done.peak_bytes,
        "margin": done.said.get("reward_margin"),
        "accuracy": done.said.get("reward_accuracy"),
        "work": done.said.get("work"),
    }


class Bench:
    """The rows of a benchmark, and both sides on them."""

    def __init__(self, rows: list[dict], test: list[dict], scratch: str) -> None:
        self.model, self.scratch = str(resolve_model("smollm2").path), scratch
        self.data, self.test = f"{scratch}/rows.jsonl", f"{scratch}/test.jsonl"
        self.rows = rows
        for path, of in ((self.data, rows), (self.test, test)):
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in of))

    @property
    def tokens(self) -> int:
        """The tokens of all documents of an epoch."""
        tokenizer = load_tokenizer("smollm2")
        return sum(
            len(tokenizer.apply_chat_template(row["prompt"] + row[name])["input_ids"])
            for row in self.rows
            for name in ("chosen", "rejected")
        )

    def train(self, side: str, dtype: str, lr: str, epochs: int) -> dict:
        """Train one side, and measure its adapter."""
        out = f"{self.scratch}/{side}"
        own = [
            *(*COUNTED, "train", "--model", self.model, "--objective"),
            *("dpo", "--data", self.data, "--out", out, "--overwrite", "--json"),
            *("--storage", {"bfloat16": "bf16", "float32": "fp32"}[dtype], "--epochs", str(epochs)),
            *("--lr", lr, "--lr-b", lr, "--schedule", "linear", "--warmup", "0"),
            *("--dropout", "0", "--batch", "8"),
        ]
        trl = [sys.executable, "-c", TRL, self.model, self.data, out, dtype, lr, str(epochs)]
        with tempfile.TemporaryDirectory(dir=self.scratch) as cache:
            found = run(own if side == "lorafold" else trl, cache)
            measured = run(
                [
                    *(sys.executable, "-m", "lorafold", "eval", "--model", self.model, "--data"),
                    *(self.test, "--adapter", out, "--storage", "fp32"),
                    *("--no-completions", "--json"),
                ],
                cache,
            )
        found |= {name: measured[name] for name in ("margin", "accuracy")}
        if side != "lorafold":
            found["work"]["targets"] -= found["work"]["rows"]  # the newline after each completion
        about = {"side": side, "dtype": dtype, "lr": lr, "epochs": epochs}
        print(json.dumps({**about, **found}), flush=True)
        return found


def speed(bench: Bench, rounds: int) -> None:
    found: dict[str, list[dict]] = {"lorafold": [], "TRL + PEFT": []}
    for _ in range(rounds):
        for side, runs in found.items():
            runs.append(bench.train(side, "bfloat16", "1e-4", 1))
    same_work({side: runs[-1]["work"] for side, runs in found.items()})

    def median(side: str, key: str) -> float:
        return statistics.median(one[key] for one in found[side])

    trl = median("TRL + PEFT", "peak_bytes")
    table = [
        {
            "": side,
            "tokens/s": f"{bench.tokens / median(side, 'seconds'):.0f}",
            "speed-up": f"{median('TRL + PEFT', 'seconds') / median(side, 'seconds'):.2f}",
            "total seconds": f"{median(side, 'whole_seconds'):.0f}",
            "peak GB": f"{median(side, 'peak_bytes') / 1e9:.2f}",
            "of TRL's memory": f"{median(side, 'peak_bytes') / trl:.2f}",
            "held-out margin": f"{median(side, 'margin'):.3f}",
            "accuracy": f"{median(side, 'accuracy'):.1%}",
        }
        for side in found
    ]
    keep("preferences", table, dtypes="bf16")


def fidelity(bench: Bench) -> None:
    table = []
    for side in ("lorafold", "TRL + PEFT"):
        runs = {d: bench.train(side, d, "5e-6", 1) for d in ("float32", "bfloat16")}
        same_work({f"{side} in {dtype}": run["work"] for dtype, run in runs.items()})
        margins = {dtype: run["margin"] for dtype, run in runs.items()}
        kept = margins["bfloat16"] / margins["float32"]
        shown = {dtype: f"{margin:.4f}" for dtype, margin in margins.items()}
        table.append({"": side, **shown, "bf16 relative to fp32": f"{kept:.1%}"})
    keep("preferences_bf16", table, dtypes="fp32 and bf16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--fidelity", action="store_true", help="bf16 beside fp32, at lr 5e-6")
    asked = parsed(parser, rows=8, rounds=1)
    with tempfile.TemporaryDirectory() as scratch:
        if asked.fidelity:
            rows, test = task("train", asked.rows, 0), task("test", 64, 0)
            fidelity(Bench(alignment.pairs(rows), alignment.pairs(test), scratch))
        else:
            speed(Bench(pairs(asked.rows, 0), pairs(32, 1), scratch), asked.rounds)


if __name__ == "__main__":
    main()
