"""How many operations torch dispatches in a training step, and how many of these copy, by part.

    python benchmarks/operations.py [--batch 4] [--length 256]

The embedded model in bf16, LoRA of rank 16 with dropout 0.05 on every linear of the blocks, set up
as `lorafold train` does, after two steps that warm up. An operation is what Python or autograd
calls (aten::mm, lorafold::rms_norm), not what it calls in turn; a copy is any aten::copy_. A part
is the autograd function that they are called in. Milliseconds are the part's own, of one step under
the profiler. Prints a table, which is also written to results/operations.json.
"""

import argparse
from collections import Counter
from contextlib import ExitStack

from lib.results import keep
from lib.short import parsed
from lib.worker import Case, lorafold
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

PARTS = {
    "_LowRankLinear": "low-rank linears",
    "_DocumentAttention": "attention",
    "_RMSNorm": "norms",
    "_Gated": "gated activation",
    "_Rotary": "rotary embedding",
    "_LinearCrossEntropy": "head and loss",
    "Optimizer": "optimizer",
}


def ancestors(event: FunctionEvent) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


def part_of(names: list[str]) -> str:
    for name in names:
        for start, part in PARTS.items():
            if name.startswith(start):
                return part
    return "the rest"


def is_operation(name: str) -> bool:
    return name.startswith(("aten::", "lorafold::"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    asked = parsed(parser, batch=1, length=16)
    with ExitStack() as stack:
        training = lorafold(Case(asked.batch, asked.length, dropout=0.05), stack)

        def step() -> None:
            training.loss().backward()
            training.optimizer.step()
            training.optimizer.zero_grad()

        step()
        step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
    calls, copies, times = Counter(), Counter(), Counter()
    for event in found.events():
        names = ancestors(event)
        part = part_of([event.name, *names])
        times[part] += event.self_cpu_time_total / 1000
        copies[part] += event.name == "aten::copy_"
        calls[part] += is_operation(event.name) and not any(map(is_operation, names))
    counted = [(part, calls[part], copies[part], times[part]) for part in calls]
    counted.append(("all", calls.total(), copies.total(), times.total()))
    keep(
        "operations",
        [
            {"part": part, "operations": operations, "copies": copied, "ms": f"{ms:.0f}"}
            for part, operations, copied, ms in counted
        ],
        dtypes="bf16",
    )


if __name__ == "__main__":
    main()
