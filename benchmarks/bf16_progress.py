"""How much of fp32's progress a bf16 base keeps at small learning rates: held-out loss before and
after, on real data.

    python benchmarks/bf16_progress.py [--task gsm] [--rates 1e-5] [--seeds 1] [--steps 24] [--nf4]
    [--peft] [--dora] [--full] [--nearest]

gsm: worked solutions of generated arithmetic problems (`reasoning-gym`, in the `bench` extra).
quickstart: requests that become JSON, held out with words of their own. Loss on completions, 4 rows
a step, one rate for all, constant, no dropout. lorafold rounds a layer's output once; adding the
low-rank product to an output that is rounded already loses every update under half a unit. In bf16
it trains as `lorafold train` does, fused and packed; fp32 and PEFT train padded, with transformers'
own forward. --seeds: of the adapter's init and the order of the rows, in bf16; the others run with
seed 0. With --nf4 the same on a base packed as NF4, computed with in fp32 and in bf16.

With --full every weight is trained, in fp32 and in bf16, by the optimizer that `lorafold train`
takes: in bf16 it rounds updates stochastically, and --seeds are those of the rounding. --nearest:
also torch's AdamW on bf16 weights.

All runs are in one loop with one optimizer, and every held-out loss is measured by the model's
plain padded forward: in the dtype trained in, and (`in_fp32`) with base and adapter computed in
fp32, which leaves only what training lost. One JSON object a line, then a table.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import NamedTuple

import torch
from lib.problems import problems
from lib.results import keep
from lib.short import parsed
from lib.work import Work, none, of_loss, same_work, stepping
from rich.console import Console
from torch import nn

import lorafold as lf
from lorafold.core.spec import Spec
from lorafold.data.batches import Batches, num_targets
from lorafold.data.examples import Example, encode
from lorafold.evaluation import held_out_loss
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives.sft import Sft
from lorafold.quickstart.task import rows as quickstart_rows
from lorafold.recipe.recipe import Recipe
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.losses import CompletionLoss
from lorafold.training_step.optimizers import make_optimizer

ROWS, HELD_OUT = 4, 32
STORAGES = {
    "fp32": Storage(torch.float32), "bf16": Storage(torch.bfloat16),
    "nf4-in-fp32": Storage(torch.float32, "nf4"), "nf4-in-bf16": Storage(torch.bfloat16, "nf4"),
    "bf16-nearest": Storage(torch.bfloat16),
}  # fmt: skip


class Losses(NamedTuple):
    """Held-out, as trained and computed in fp32; the latter None on a packed base."""

    own: float
    in_fp32: float | None

    def less(self, other: "Losses") -> "Losses":
        return Losses(
            self.own - other.own,
            None if self.in_fp32 is None or other.in_fp32 is None else self.in_fp32 - other.in_fp32,
        )


def gsm(n: int, held_out: bool) -> list[Example]:
    rows = [{"prompt": q, "completion": a} for q, a in problems(n, int(held_out))]
    return encode(rows, load_tokenizer("smollm2"), 1024).examples


def quickstart(n: int, held_out: bool) -> list[Example]:
    tokenizer = load_tokenizer("smollm2")
    Sft().set_up(tokenizer)
    return encode(
        quickstart_rows("test" if held_out else "train", n, seed=0), tokenizer, 1024
    ).examples


TASKS = {"gsm": gsm, "quickstart": quickstart}


def ours(name: str, spec: Spec) -> nn.Module:
    model = load_model("smollm2", STORAGES[name])
    lf.attach(model, spec)
    return model


def peft_in_bf16(dora: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=16, lora_alpha=32, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(load_model("smollm2", torch.bfloat16), config).get_base_model()


def make(name: str, seed: int, spec: Spec) -> nn.Module:
    torch.manual_seed(seed)
    return peft_in_bf16(isinstance(spec, lf.DoRA)) if name == "peft-bf16" else ours(name, spec)


def measured(name: str, model: nn.Module, held_out: list[Example]) -> Losses:
    """The model is fp32 afterwards, if it can be."""
    own = held_out_loss(CompletionLoss(model, False, 0), held_out)
    if name == "fp32" or name.startswith("nf4"):
        return Losses(own, own if name == "fp32" else None)
    return Losses(own, held_out_loss(CompletionLoss(model.float(), False, 0), held_out))


def train(
    name: str, model: nn.Module, rows: list[Example], steps: int, lr: float, order: int, seed: int
) -> Work:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        if name == "bf16-nearest"
        else make_optimizer("adamw", [{"params": trained, "lr": lr}], Recipe(seed=seed))
    )
    work = none()
    with ExitStack() as stack:
        stack.enter_context(stepping(work))
        fast = name in ("bf16", "bf16-nearest", "nf4-in-bf16")
        if fast:
            stack.enter_context(fused(model))
        tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
        objective = stack.enter_context(Sft().loss(model, tokenizer, fast, Console(quiet=True)))
        assert objective.packed == fast
        model.train()
        of_loss(objective, work)
        for step in Batches(len(rows), ROWS, steps, order):
            chosen = [rows[i] for i in step]
            work["rows"] += len(chosen)
            (
                objective(**objective.collate(chosen, torch.device("cpu")))
                / sum(map(num_targets, chosen))
            ).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return work


def span(values: list[float], form: str) -> str:
    return f"{values[0]:{form}}" + (
        f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="gsm", help="the rows")
    parser.add_argument("--rates", default="1e-5", help="learning rates, separated by commas")
    parser.add_argument("--seeds", type=int, default=1, help="of the run in bf16")
    parser.add_argument("--steps", type=int, default=24, help=f"of {ROWS} rows each")
    parser.add_argument(
        "--nf4",
        action="store_true",
        help="also on a base packed as NF4, computed with in fp32 and in bf16",
    )
    parser.add_argument("--peft", action="store_true", help="also PEFT's layers, in bf16")
    parser.add_argument("--dora", action="store_true", help="DoRA on both sides, in place of LoRA")
    parser.add_argument("--full", action="store_true", help="full fine-tuning, in place of LoRA")
    parser.add_argument(
        "--nearest", action="store_true", help="with --full, also torch's AdamW in bf16"
    )
    asked = parsed(parser, task="quickstart", steps=2, nf4=True, peft=True)
    lora = lf.LoRA(dropout=0.0)
    spec = lf.Full() if asked.full else lf.DoRA(lora) if asked.dora else lora
    rows, held_out = TASKS[asked.task](asked.steps * ROWS, False), TASKS[asked.task](HELD_OUT, True)
    names = ["fp32", "bf16"] + ["nf4-in-fp32", "nf4-in-bf16"] * asked.nf4
    names += ["bf16-nearest"] * asked.nearest + ["peft-bf16"] * asked.peft
    runs = [(name, 0) for name in names]
    runs += [("bf16", seed) for seed in range(1, asked.seeds)]
    # an untrained adapter is none
    before: Callable[[str], Losses] = cache(
        lambda name: measured(name, make(name, 0, spec), held_out)
    )
    found: dict[tuple[str, str], list[Losses]] = {}
    work: dict[str, Work] = {}
    for rate in asked.rates.split(","):
        for name, seed in runs:
            model = make(name, seed, spec)
            order = 0 if asked.full else seed
            work[name] = train(name, model, rows, asked.steps, float(rate), order, seed)
            same_work(work)  # of one epoch, in whatever order
            after = measured(name, model, held_out)
            gained = before(name).less(after)
            exact = "nf4-in-fp32" if name.startswith("nf4") else "fp32"
            found.setdefault((rate, name), []).append(gained)
            whole = found[rate, exact][0].own
            row = {
                "task": asked.task,
                "rate": float(rate),
                "run": name,
                "seed": seed,
                "before": before(name).own,
                "after": after.own,
                "progress": gained.own,
                f"of_{exact}": gained.own / whole,
                "progress_in_fp32": gained.in_fp32,
                f"in_fp32_of_{exact}": None if gained.in_fp32 is None else gained.in_fp32 / whole,
            }
            print(json.dumps(row), flush=True)
    table = []
    for (rate, name), gains in found.items():
        whole = found[rate, "nf4-in-fp32" if name.startswith("nf4") else "fp32"][0].own
        wide = [g.in_fp32 for g in gains if g.in_fp32 is not None]
        table.append(
            {
                "rate": rate,
                "run": name,
                "progress, nats": span([g.own for g in gains], ".5f"),
                "of fp32's": span([g.own / whole for g in gains], ".1%"),
                "computed in fp32": span(wide, ".5f") if wide else "",
                "then of fp32's": span([w / whole for w in wide], ".1%") if wide else "",
            }
        )
    keep(
        f"bf16_progress_{asked.task}" + "_dora" * asked.dora + "_full" * asked.full,
        table,
        dtypes="see the rows",
    )


if __name__ == "__main__":
    main()
