"""What it gains to compute a prompt once for both completions of a pair.

    python benchmarks/shared_prompts.py [--rounds 5]

Forward and backward of DPO's loss, reference given, over two pairs of random tokens in one packed
sequence, LoRA of rank 16 on every linear of the embedded model in bf16: with the prompt shared, and
with a prompt of its own before each completion. Both are the same loss. The sides run in turn;
figures are medians. Prints a table, which is also written to results/shared_prompts.json.
"""

import argparse
import statistics
import time

import torch
from lib.results import keep
from lib.short import parsed
from lib.work import same_work, targets

import lorafold as lf
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.preference_examples import BranchedRow
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.preference_algorithms import Dpo
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes


def pair(prompt: int, completion: int, seed: int) -> BranchedRow:
    """A pair of random tokens."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1000, 40_000, (n,), generator=draw).tolist())

    last = ids(1)
    branches = [last + ids(completion) for _ in range(2)]
    of = tuple(Example(own, (NO_LOSS, *own[1:])) for own in branches)
    return BranchedRow(ids(prompt - 1), of, reference=(-100.0, -100.0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    asked = parsed(parser, rounds=1)
    model = lf.load_model("smollm2", storage="bf16")
    lf.attach(model, lf.LoRA(rank=16, alpha=32, dropout=0.05))
    table = []
    with fused(model), sharing_prefixes(model) as how:
        loss = Preferences(model, Dpo(), how, 0).train()
        for prompt, completion in [(64, 128), (128, 128), (128, 64), (256, 64), (512, 64)]:
            examples = [pair(prompt, completion, seed) for seed in range(2)]
            seconds: dict[bool, list[float]] = {True: [], False: []}
            tokens, work = {}, {}
            for _ in range(asked.rounds + 1):
                for shares in seconds:
                    how.shares = shares
                    inputs = loss.collate(examples, loss.device)
                    tokens[shares] = inputs["labels"].numel()
                    work["shared" if shares else "apart"] = {"targets": targets(**inputs)}
                    start = time.perf_counter()
                    loss(**inputs).backward()
                    seconds[shares].append(time.perf_counter() - start)
            same_work(work)
            medians = {shares: statistics.median(of[1:]) for shares, of in seconds.items()}
            table.append(
                {
                    "prompt": prompt,
                    "completions": f"2 x {completion}",
                    "tokens, separate": tokens[False],
                    "tokens, shared": tokens[True],
                    "seconds, separate": f"{medians[False]:.2f}",
                    "seconds, shared": f"{medians[True]:.2f}",
                    "speed-up": f"{medians[False] / medians[True]:.2f}",
                }
            )
            print(table[-1], flush=True)
    keep("shared_prompts", table, dtypes="bf16")


if __name__ == "__main__":
    main()
