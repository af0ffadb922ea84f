"""How much of fp32's progress a bf16 base keeps at a small learning rate: held-out loss before and after, on real chat data.

    python benchmarks/bf16_progress.py [--nf4] [--peft]

Worked solutions of generated arithmetic problems (`reasoning-gym`, in the `bench` extra), loss on completions, 24 steps of 4 rows, every
learning rate 1e-5, no dropout. lorafold rounds a layer's output once; adding the low-rank product to an output that is rounded already
loses every update under half a unit. With --nf4 the same on a base packed as NF4, computed with in fp32 and in bf16. All runs are in one
loop: same rows, order, optimizer and loss. Prints one JSON object a line.
"""

import argparse
import json
from collections.abc import Callable

import torch
from reasoning_gym import create_dataset
from torch import nn

import lorafold as lf
from lorafold.evaluate import held_out_loss
from lorafold.io.models import Storage, load_model, load_tokenizer
from lorafold.train.data import Example, batches, encode
from lorafold.train.losses import Completions, labelled

STEPS, ROWS, LR = 24, 4, 1e-5
STORAGES = {
    "fp32": Storage(torch.float32), "bf16": Storage(torch.bfloat16),
    "nf4-in-fp32": Storage(torch.float32, "nf4"), "nf4-in-bf16": Storage(torch.bfloat16, "nf4"),
}  # fmt: skip


def chat(n: int, seed: int) -> list[Example]:
    data = create_dataset("gsm_symbolic", size=n, seed=seed)
    rows = [{"prompt": item["question"], "completion": item["metadata"]["answer_cot"]} for item in data]
    return encode(rows, load_tokenizer("smollm2"), 1024).examples


def ours(name: str) -> nn.Module:
    model = load_model("smollm2", STORAGES[name])
    lf.attach(model, lf.LoRA(dropout=0.0))
    return model


def peft_in_bf16() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_model("smollm2", torch.bfloat16), config).get_base_model()


def progress(make: Callable[[], nn.Module], rows: list[Example], held_out: list[Example]) -> tuple[float, float]:
    """Held-out loss before and after."""
    torch.manual_seed(0)
    model = make()
    objective = Completions(model, False, 0)
    before = held_out_loss(objective, held_out)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    model.train()
    for step in batches(len(rows), ROWS, STEPS, 0):
        chosen = [rows[i] for i in step]
        (objective(**objective.collate(chosen, torch.device("cpu"))) / sum(map(labelled, chosen))).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before, held_out_loss(objective, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nf4", action="store_true", help="also on a base packed as NF4, computed with in fp32 and in bf16")
    parser.add_argument("--peft", action="store_true", help="also PEFT's layers, in bf16")
    arguments = parser.parse_args()
    rows, held_out = chat(STEPS * ROWS, 0), chat(32, 1)
    runs: dict[str, Callable[[], nn.Module]] = {
        name: lambda name=name: ours(name) for name in STORAGES if arguments.nf4 or not name.startswith("nf4")
    }  # fmt: skip
    if arguments.peft:
        runs["peft-bf16"] = peft_in_bf16
    found: dict[str, float] = {}
    for name, make in runs.items():
        before, after = progress(make, rows, held_out)
        found[name] = before - after
        exact = "nf4-in-fp32" if name.startswith("nf4") else "fp32"
        row = {"run": name, "before": before, "after": after, "progress": found[name], f"of_{exact}": found[name] / found[exact]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
