"""How much of a model a policy needs: LoRA of rank 1 and 16, VeRA and all weights, equal rollouts.

    python benchmarks/policy_methods.py [--seeds 3] [--steps 16] [--held-out 200]

The task is `policy_task.py`'s lists. Each method has two rates, four times apart, and a run of a
quarter of the steps with each, with a seed that is not used again, judged on a quarter of the
held-out prompts. The rate that was better then is run whole, with the same seeds for all, which so
draw completions for the same prompts; `--all` runs both.
Prints JSON lines and a table, which is also written to results/.
"""

import argparse
import statistics
import tempfile
from types import SimpleNamespace

from lib.results import keep
from lib.short import parsed
from lib.work import same_work
from policy_task import lists, trained

from lorafold.evaluation.intervals import wilson

METHODS = {  # name: options, its own rates in supervised training, multiples of them
    "lora, rank 1": (["--method", "lora", "--rank", "1"], {"lr": 2e-4, "lr-b": 3e-3}, (2, 8)),
    "lora, rank 16": (["--method", "lora", "--rank", "16"], {"lr": 2e-4, "lr-b": 3e-3}, (0.5, 2)),
    "vera": (["--method", "vera"], {"lr": 2e-2}, (1, 4)),
    "full": (["--method", "full"], {"lr": 2e-5}, (1, 4)),
}


def run(scratch: str, name: str, times: float, seed: int, steps: int, held_out: int) -> dict:
    """One run of a method with a multiple of its own rates."""
    (_, method, *options), rates, _ = METHODS[name]
    options = options + [
        part for rate, own in rates.items() for part in (f"--{rate}", str(times * own))
    ]
    own = {"task": "lists", "updates": 1, "storage": "fp32", "eval_every": None}
    asked = SimpleNamespace(**own, steps=steps, method=method, options=options)
    print(f"{name}, {times} of its rates, seed {seed}, {steps} steps", flush=True)
    return trained(scratch, seed, *lists(scratch, held_out), asked)


def row(name: str, times: float, quarter: dict, found: list[dict], held_out: int) -> dict:
    """What the runs of a method with a rate came to."""
    right = [one["right"][-1] for one in found]
    low, high = wilson(round(sum(right) * held_out), len(found) * held_out)
    return {
        "method": name,
        "trained parameters": f"{found[0]['parameters']:,}",
        "learning rate": f"{times:g} times its own",
        "reward after a quarter": statistics.mean(quarter["interval"][-1]),
        "correct": f"{statistics.mean(right):.1%} ({low:.1%} to {high:.1%})",
        "correct by seed": ", ".join(f"{share:.1%}" for share in right),
        "reward": statistics.mean(statistics.mean(one["interval"][-1]) for one in found),
        "entropy": statistics.mean(one["entropy"] for one in found),
        "minutes": statistics.mean(one["seconds"] for one in found) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--all", action="store_true", help="run both rates whole")
    asked = parsed(parser, seeds=1, steps=4, held_out=16, methods=["vera"])
    whole = asked.steps, asked.held_out
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        work = {}
        for name in asked.methods:
            multiples = METHODS[name][-1]
            quarters = {
                times: run(scratch, name, times, asked.seeds, *(n // 4 for n in whole))
                for times in multiples
            }
            best = max(quarters, key=lambda n: statistics.mean(quarters[n]["interval"][-1]))
            for times in multiples if asked.all else [best]:
                found = [run(scratch, name, times, seed, *whole) for seed in range(asked.seeds)]
                for seed, one in enumerate(found):
                    work[f"{name}, {times:g} of its rates, seed {seed}"] = one["work"]
                same_work(work)
                table.append(row(name, times, quarters[times], found, asked.held_out))
    keep("policy_methods", table, dtypes="fp32")


if __name__ == "__main__":
    main()
