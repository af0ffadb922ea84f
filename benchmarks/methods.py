"""A training step of every method beside one of LoRA: their ratio and peak memory.

    python benchmarks/methods.py [--rounds 5] [--methods dora,vera] [--batch 4] [--length 256]

The embedded model in bf16, AdamW, every token labelled, each method with its own options and
targets, as `lorafold train` sets it up; the linear probe classifies, and so does the LoRA beside
it. Each is a process of its own that takes its steps in turn with LoRA's, and a step includes the
method's penalty and its work after the optimizer (step 21 of 100 and those after it). Ratios are
the medians of those of each turn, times medians. Peak memory is all that the process is resident
in. LoRA has a dropout of 0.05, the other methods none. Prints a table, which is also written to
results/methods.json. Linux only.
"""

import argparse
import statistics

from lib.results import keep
from lib.short import parsed
from lib.worker import Case, Step, Worker, in_turn

from lorafold.methods import METHODS, make_spec

WARM_UP = 1


def beside_lora(case: Case, rounds: int) -> tuple[list[Step], list[Step]]:
    """Steps of the case's method and of LoRA, the first ones left out."""
    with (
        Worker("lorafold", case) as ours,
        Worker("lorafold", case._replace(method="lora")) as beside,
    ):
        steps = in_turn({str(case.method): ours, "beside": beside}, WARM_UP, rounds)
    return steps[str(case.method)], steps["beside"]


def figures(case: Case, own: list[Step], lora: list[Step]) -> dict[str, object]:
    """The row of a method."""
    turns = list(zip(own, lora, strict=True))
    whole = statistics.median(step.seconds for step in own)
    beside = statistics.median(a.seconds / b.seconds for a, b in turns)
    return {
        "method": case.method,
        "step relative to LoRA": f"{beside:.2f}",
        "tokens/s": f"{case.batch * case.length / whole:.0f}",
        **{
            f"{part} (ms)": f"{1000 * statistics.median(getattr(step, part) for step in own):.0f}"
            for part in ("forward", "backward", "optimizer")
        },
        "peak GB": f"{own[-1].peak / 1e9:.2f}",
        "peak relative to LoRA": f"{own[-1].peak / lora[-1].peak:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that count")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="which of them, separated by commas"
    )
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    asked = parsed(parser, rounds=1, methods="dora,linear-probe", batch=1, length=16)
    table = []
    for method in asked.methods.split(","):
        objective = "classify" if make_spec(method).head_alone else "sft"
        case = Case(asked.batch, asked.length, method=method, objective=objective)
        row = figures(case, *beside_lora(case, asked.rounds))
        print(row, flush=True)
        table.append(row)
    keep("methods", table, dtypes="bf16")


if __name__ == "__main__":
    main()
