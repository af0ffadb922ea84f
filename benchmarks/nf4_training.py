"""Training on an NF4 base beside the same on bf16: bytes held, and seconds a step, forward and
backward. One JSON object a line.

    python benchmarks/nf4_training.py [--rounds 15]

The embedded model, LoRA of rank 16 on every linear of the blocks. Both models are in one process
and take their steps in turn; speeds are medians of what is measured in each turn, and of their
ratios. Shapes: the quickstart's batch, and rows packed to 1024 tokens. With `--rounds 0` bytes
alone. Both are also written to results/.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from lib.results import keep
from lib.short import parsed
from lib.work import Work, none, of_loss, same_work
from rich.console import Console

import lorafold as lf
from lorafold.core.targets import match
from lorafold.data.examples import Example, encode
from lorafold.layers import is_linear
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives.sft import Sft
from lorafold.quickstart.task import rows
from lorafold.runtime.memory import KEEP_FREED, malloc_policy
from lorafold.training_step.losses import CompletionLoss

BASES = {"bf16": Storage(torch.bfloat16), "nf4": Storage(torch.bfloat16, "nf4")}


def held(model: torch.nn.Module, inside: Sequence[str]) -> tuple[int, int]:
    """(bytes of the linears' matrices, of the whole model), constants of packed ones included."""
    matrices = everything = 0
    seen = set()
    for name, t in model.state_dict().items():
        if t.data_ptr() not in seen:
            seen.add(t.data_ptr())
            everything += t.nbytes
            matrices += t.nbytes if any(name.startswith(f"{path}.weight") for path in inside) else 0
    return matrices, everything


def batches(tokenizer: object) -> dict[str, list[Example]]:
    Sft().set_up(tokenizer)
    examples = encode(rows("train", 64, seed=0), tokenizer, 1024).examples
    long = []
    for example in examples:
        if sum(len(e.ids) for e in long) + len(example.ids) <= 1024:
            long.append(example)
    return {"4 rows": examples[:4], "1024 tokens": long}


def in_turn(
    losses: dict[str, CompletionLoss], examples: list[Example], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each forward and backward, by base; two turns warm up."""
    times: dict[str, list[float]] = {base: [] for base in losses}
    work: dict[str, Work] = {base: none() | {"steps": rounds + 2} for base in losses}
    hooks = [of_loss(loss, work[base]) for base, loss in losses.items()]
    for turn in range(rounds + 2):
        for base, loss in losses.items():
            work[base]["rows"] += len(examples)
            start = time.perf_counter()
            loss(**loss.collate(examples, torch.device("cpu"))).backward()
            if turn >= 2:
                times[base].append(time.perf_counter() - start)
    for hook in hooks:
        hook.remove()
    same_work(work)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each base and shape")
    rounds = parsed(parser, rounds=1).rounds
    tokenizer = load_tokenizer("smollm2")
    shapes = batches(tokenizer)
    models = {base: load_model("smollm2", storage).train() for base, storage in BASES.items()}
    inside = match(models["bf16"], "all-linear", is_linear).paths
    (matrices, everything), (packed, whole) = (held(model, inside) for model in models.values())
    sizes = {
        "linear layers": packed,
        "relative to bf16": packed / matrices,
        "whole model": whole,
        "model relative to bf16": whole / everything,
    }
    print(json.dumps(sizes))
    table = []
    for dropout in (0.05, 0.0) if rounds else ():
        adapters = [lf.attach(model, lf.LoRA(dropout=dropout)) for model in models.values()]
        with ExitStack() as stack:
            stack.enter_context(malloc_policy(KEEP_FREED))
            quiet = Console(quiet=True)
            losses = {
                b: stack.enter_context(Sft().loss(model, tokenizer, True, quiet))
                for b, model in models.items()
            }
            for shape, examples in shapes.items():
                times, tokens = in_turn(losses, examples, rounds), sum(len(e.ids) for e in examples)
                speeds = {
                    f"{base}_tokens_per_second": round(tokens / statistics.median(t), 1)
                    for base, t in times.items()
                }
                ratio = statistics.median(
                    b / n for b, n in zip(times["bf16"], times["nf4"], strict=True)
                )
                row = {
                    "shape": shape,
                    "tokens": tokens,
                    "dropout": dropout,
                    **speeds,
                    "nf4_over_bf16": round(ratio, 3),
                }
                print(json.dumps(row), flush=True)
                table.append(row)
        for adapter in adapters:
            adapter.detach()
    megabytes = {name: f"{n / 1e6:.0f} MB" if n > 2 else n for name, n in sizes.items()}
    keep("nf4_training", *filter(None, [[megabytes], table]), dtypes="NF4 and bf16")


if __name__ == "__main__":
    main()
