"""Training of a policy: `lorafold train --objective grpo` beside TRL's GRPOTrainer with PEFT.

    python benchmarks/policy.py [--steps 3] [--rounds 3] [--prompts 8] [--notes 0]

Each step has 8 prompts, 8 completions of each and at most 64 tokens of one; a prompt has about 38
tokens, and 13 more for each line of notes before it. LoRA of rank 16 on every
linear, on the embedded model. TRL has its defaults, micro-batches of 8 completions among
them, and generates by transformers. It is timed without gradient checkpointing, which makes it
slower, and with it (its default), which takes less memory. The reward asks for a long answer, so
that both sides draw about as many tokens, which are counted: within 5% of each other, or no ratio
is printed, as where steps or completions differ. The sides run in turn; figures are
medians, seconds those of training alone.
Prints JSON lines and a table, which is also written to results/. Linux only.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from lib.finished import COUNTED, finished, own_cache
from lib.results import keep
from lib.short import parsed
from lib.work import same_work

from lorafold.models.sources import resolve_model

GROUP, LONGEST = 8, 64
SIDES = ("lorafold", "TRL + PEFT", "TRL + PEFT, gradient checkpointing")
FIGURES = ("seconds", "tokens", "peak_bytes")
STORAGE = {"bfloat16": "bf16", "float32": "fp32"}
TRL = """
import json, sys, torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from lib.work import none, of_trainer, stepping
from trl import GRPOConfig, GRPOTrainer

model, data, out, dtype, steps, prompts, recompute = sys.argv[1:]

def longer(prompts, completions, **kwargs):
    return [len(set(c[0]["content"].split())) for c in completions]

trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
    processing_class=AutoTokenizer.from_pretrained(model),
    reward_funcs=longer,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    args=GRPOConfig(
        output_dir=out, per_device_train_batch_size=8, gradient_accumulation_steps=int(prompts),
        max_completion_length=64, max_steps=int(steps), learning_rate=1e-6, logging_steps=1,
        report_to="none", bf16=dtype == "bfloat16", use_cpu=True, save_strategy="no",
        gradient_checkpointing=recompute == "yes",
    ),
    peft_config=LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
)
work = none()
of_trainer(trainer, work)
with stepping(work):
    metrics = trainer.train().metrics
print(json.dumps({"seconds": metrics["train_runtime"], "work": work}))
"""
REWARD = """
def longer(completion):
    return len(set(completion.split()))
"""
THINGS = ("river", "clock", "winter", "harbour", "mirror", "garden", "letter", "train")


class Bench:
    """Both sides on the same prompts."""

    def __init__(self, scratch: str, asked: argparse.Namespace) -> None:
        self.scratch, self.dtype, self.steps = scratch, asked.dtype, asked.steps
        self.prompts = asked.prompts
        self.model = str(resolve_model("smollm2").path)
        self.data, self.reward = f"{scratch}/prompts.jsonl", f"{scratch}/reward.py"
        notes = "".join(f"Note {n}: the house has {n} doors.\n" for n in range(asked.notes))
        texts = [f"{notes}Write a long story about a {thing}." for thing in THINGS]
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
        Path(self.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(self.reward).write_text(REWARD)

    def command(self, side: str) -> list[str]:
        """What trains a side."""
        out, steps = f"{self.scratch}/out", str(self.steps)
        if side != "lorafold":
            recompute = "yes" if "checkpointing" in side else "no"
            return [sys.executable, "-c", TRL, self.model, self.data, out, self.dtype, steps,
                    str(self.prompts), recompute]  # fmt: skip
        return [
            *(*COUNTED, "train", "--model", self.model, "--objective"),
            *("grpo", "--data", self.data, "--reward", f"{self.reward}:longer", "--out", out),
            *("--overwrite", "--json", "--storage", STORAGE[self.dtype], "--steps", steps),
            *("--batch", str(self.prompts), "--objective-options", f"group={GROUP}"),
            *("--objective-options", f"max_new_tokens={LONGEST}", "--lr", "1e-6", "--lr-b", "1e-6"),
        ]

    def timed(self, side: str) -> dict:
        """Seconds a step, tokens a completion and peak bytes of a side."""
        done = finished(self.command(side), LORAFOLD_CACHE=own_cache(Path(self.scratch, "cache")))
        work = done.said["work"]
        one = {
            "side": side, "dtype": self.dtype, "seconds": done.said["seconds"] / self.steps,
            "tokens": work["targets"] / work["rows"], "peak_bytes": done.peak_bytes,
            "whole_seconds": done.seconds, "work": work,
        }  # fmt: skip
        print(json.dumps(one), flush=True)
        return one


def alike(runs: dict[str, dict]) -> None:
    """End the program unless all took as many steps and completions, and about as many tokens."""
    first = runs[SIDES[0]]["tokens"]
    same_work(
        {
            side: {k: one["work"][k] for k in ("steps", "rows")}
            | {"tokens": first if abs(one["tokens"] / first - 1) < 0.05 else one["tokens"]}
            for side, one in runs.items()
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--dtype", choices=sorted(STORAGE), default="float32")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--notes", type=int, default=0, help="lines before each prompt")
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    asked = parsed(parser, steps=1, rounds=1, prompts=2)
    found: dict[str, list[dict]] = {side: [] for side in asked.sides}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(scratch, asked)
        for _ in range(asked.rounds):
            for side, runs in found.items():
                runs.append(bench.timed(side))
    alike({side: runs[-1] for side, runs in found.items()})
    first = {k: statistics.median(one[k] for one in found[SIDES[0]]) for k in FIGURES}
    rows = []
    for side, runs in found.items():
        own = {k: statistics.median(one[k] for one in runs) for k in FIGURES}
        rows.append(
            {
                "": side,
                "seconds per step": f"{own['seconds']:.2f}",
                "time relative to lorafold": f"{own['seconds'] / first['seconds']:.2f}",
                "tokens per completion": f"{own['tokens']:.1f}",
                "peak GB": f"{own['peak_bytes'] / 1e9:.2f}",
                "lorafold's memory of it": f"{first['peak_bytes'] / own['peak_bytes']:.2f}",
            }
        )
    keep("policy_long_prompts" if asked.notes else "policy", rows, dtypes=STORAGE[asked.dtype])


if __name__ == "__main__":
    main()
