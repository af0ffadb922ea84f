"""How much of fp32's progress a bf16 base keeps at a small learning rate: held-out loss before and after, on real chat data.

    python benchmarks/bf16_progress.py [--peft]

Worked solutions of generated arithmetic problems (`reasoning-gym`, in the `bench` extra), loss on completions, 24 steps of 4 rows, every
learning rate 1e-5, no dropout. lorafold rounds a layer's output once; adding the low-rank product to an output that is rounded already
loses every update under half a unit. Prints one JSON object a line.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from reasoning_gym import create_dataset
from rich.console import Console

import lorafold as lf
from lorafold.evaluate import held_out_loss
from lorafold.io.models import load_model, load_tokenizer
from lorafold.train.data import batches, encode
from lorafold.train.losses import Completions, labelled
from lorafold.train.recipe import Recipe
from lorafold.train.run import Request, train

STEPS, ROWS, LR = 24, 4, 1e-5


def chat(n: int, seed: int) -> list[dict]:
    data = create_dataset("gsm_symbolic", size=n, seed=seed)
    return [{"prompt": item["question"], "completion": item["metadata"]["answer_cot"]} for item in data]


def ours(base: str, rows: list[dict], held_out: list[dict]) -> tuple[float, float]:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[base]
    model, tokenizer = load_model("smollm2", dtype), load_tokenizer("smollm2")
    examples = encode(held_out, tokenizer, 1024).examples
    before = held_out_loss(Completions(model, False, 0), examples)
    recipe = Recipe(steps=STEPS, batch=ROWS, lr=LR, lr_b=LR, dropout=0.0, schedule="constant", warmup=0.0, base=base, save_every=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        train(Request("smollm2", out, recipe, rows, "gsm_symbolic"), Console(stderr=True, quiet=True))
        lf.load(model, out)
    return before, held_out_loss(Completions(model, False, 0), examples)


def peft_in_bf16(rows: list[dict], held_out: list[dict]) -> tuple[float, float]:
    """PEFT's layers in the same loop: same rows, order, optimizer and loss."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model("smollm2", torch.bfloat16), load_tokenizer("smollm2")
    examples = encode(held_out, tokenizer, 1024).examples
    before = held_out_loss(Completions(model, False, 0), examples)
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    objective, data = Completions(tuned.get_base_model(), False, 0), encode(rows, tokenizer, 1024).examples
    for step in batches(len(data), ROWS, STEPS, 0):
        chosen = [data[i] for i in step]
        (objective(**objective.collate(chosen, torch.device("cpu"))) / sum(map(labelled, chosen))).backward()
        torch.nn.utils.clip_grad_norm_([p for p in tuned.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before, held_out_loss(objective, examples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peft", action="store_true", help="also run PEFT's layers in the same loop, in bf16")
    arguments = parser.parse_args()
    rows, held_out = chat(STEPS * ROWS, 0), chat(32, 1)
    runs = {"fp32": lambda: ours("fp32", rows, held_out), "bf16": lambda: ours("bf16", rows, held_out)}
    if arguments.peft:
        runs["peft-bf16"] = lambda: peft_in_bf16(rows, held_out)
    progress: dict[str, float] = {}
    for name, run in runs.items():
        before, after = run()
        progress[name] = before - after
        share = progress[name] / progress["fp32"]
        print(json.dumps({"run": name, "before": before, "after": after, "progress": progress[name], "of_fp32": share}), flush=True)
