"""How much of a model a policy needs: LoRA of rank 1 and 16, VeRA and all weights, equal rollouts.

    python benchmarks/policy_methods.py [--seeds 3] [--steps 16] [--held-out 200]

The task is `policy_task.py`'s lists. Each method has two rates, four times apart; a quarter of the
steps with a seed that is not used again, judged on a quarter of the held-out prompts, says which of
them it gets. Then each method trains with the same seeds, and so draws completions for the same
prompts: differences to rank 16 are paired by seed, with Student's 95% interval.
Prints JSON lines and a table, which is also written to results/.
"""

import argparse
import statistics
import tempfile
from types import SimpleNamespace

from lib.results import keep
from policy_task import lists, trained

from lorafold.evaluation.intervals import mean_interval

METHODS = {  # name: options, its own rates in supervised training, multiples of them
    "lora, rank 1": (["--method", "lora", "--rank", "1"], {"lr": 2e-4, "lr-b": 3e-3}, (2, 8)),
    "lora, rank 16": (["--method", "lora", "--rank", "16"], {"lr": 2e-4, "lr-b": 3e-3}, (0.5, 2)),
    "vera": (["--method", "vera"], {"lr": 2e-2}, (1, 4)),
    "full": (["--method", "full"], {"lr": 2e-5}, (1, 4)),
}
BESIDE = "lora, rank 16"


def run(scratch: str, name: str, times: float, seed: int, steps: int, held_out: int) -> dict:
    """One run of a method with a multiple of its own rates."""
    (_, method, *options), rates, _ = METHODS[name]
    options = options + [
        part for rate, own in rates.items() for part in (f"--{rate}", str(times * own))
    ]
    asked = SimpleNamespace(updates=1, steps=steps, method=method, options=options)
    print(f"{name}, {times} of its rates, seed {seed}, {steps} steps", flush=True)
    return trained(scratch, seed, *lists(scratch, held_out), asked)


def within(differences: list[float]) -> str:
    """The mean of some differences in points, with its interval."""
    low, high = mean_interval(differences)
    return f"{50 * (low + high):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=200)
    asked = parser.parse_args()
    chosen, tried, shares, runs = {}, {}, {}, {}
    whole = asked.steps, asked.held_out
    quarter = tuple(n // 4 for n in whole)
    with tempfile.TemporaryDirectory() as scratch:
        for name, (*_, multiples) in METHODS.items():
            tried[name] = {
                times: run(scratch, name, times, asked.seeds, *quarter)["interval"][-1]
                for times in multiples
            }
            chosen[name] = max(tried[name], key=lambda times: sum(tried[name][times]))
        for seed in range(asked.seeds):
            for name, times in chosen.items():
                runs.setdefault(name, []).append(run(scratch, name, times, seed, *whole))
    for name, found in runs.items():
        shares[name] = [one["right"][-1] for one in found]
    keep(
        "policy_methods",
        [
            {
                "method": name,
                "trained numbers": f"{found[0]['parameters']:,}",
                "rates": f"{chosen[name]:g} of its own",
                "reward after a quarter, of both": ", ".join(
                    f"{sum(interval) / 2:.2f}" for interval in tried[name].values()
                ),
                "right before": f"{statistics.mean(one['right'][0] for one in found):.1%}",
                "right after, by seed": ", ".join(f"{share:.1%}" for share in shares[name]),
                f"points over {BESIDE}": ""
                if name == BESIDE
                else within([a - b for a, b in zip(shares[name], shares[BESIDE], strict=True)]),
                "entropy": f"{statistics.mean(one['entropy'] for one in found):.2f}",
                "minutes": f"{statistics.mean(one['seconds'] for one in found) / 60:.1f}",
            }
            for name, found in runs.items()
        ],
    )


if __name__ == "__main__":
    main()
