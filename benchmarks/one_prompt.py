"""What it costs to read one prompt for several completions.

    python benchmarks/one_prompt.py [--rounds 9]

Seconds from the first submission to the last first token, greedy, of a prompt of 256 random tokens:
of one completion, and of eight of the same prompt, under an adapter of rank 16 on every linear and
under none, the embedded model in bf16. The last column has eight prompts that differ. The sides run
in turn, and nothing is left of one for the next; figures are medians. Prints a table, which is also
written to results/one_prompt.json.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict

import torch
from lib.results import keep
from lib.short import parsed
from lib.work import same_work

import lorafold as lf
from lorafold.engine import Engine, Request

PROMPT, MANY = 256, 8


def prompt(seed: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1000, 40_000, (PROMPT,), generator=draw).tolist())


def seconds(engine: Engine, name: str | None, seeds: list[int]) -> tuple[float, dict[str, int]]:
    """How long all of the prompts of these seeds take to their first tokens, and their number."""
    start = time.perf_counter()
    asked = [Request(str(i), prompt(seed), 1, name) for i, seed in enumerate(seeds)]
    streams = [engine.submit(request) for request in asked]
    engine.run()
    taken = time.perf_counter() - start
    tokens = sum(len(stream.result().tokens) for stream in streams)
    return taken, {"prompts": len(streams), "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    asked = parsed(parser, rounds=1)
    model = lf.load_model("smollm2", storage="bf16")
    adapter = lf.attach(model, lf.LoRA(rank=16), name="it")
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.02)
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.save(f"{folder}/it")
        adapter.detach()
        with Engine(model, slots=MANY, prefix_reuse=False) as engine:
            engine.load("it", path)
            for round in range(asked.rounds + 1):
                for name in (None, "it"):
                    first = 100 * round
                    sides = ([first], [first] * MANY, [first + i for i in range(MANY)])
                    work = {}
                    for side, seeds in enumerate(sides):
                        took, work[side] = seconds(engine, name, seeds)
                        if round:
                            times[name or "none", side].append(took)
                    one = {k: MANY * n for k, n in work[0].items()}
                    same_work({f"one, {MANY} times": one, "of one": work[1], "apart": work[2]})
    table = []
    for name in ("none", "it"):
        one, eight, apart = (statistics.median(times[name, side]) for side in range(3))
        table.append(
            {
                "adapter": "none" if name == "none" else "LoRA of rank 16",
                "one completion": f"{one:.3f} s",
                "eight of one prompt": f"{eight:.3f} s",
                "relative to one": f"{eight / one:.2f}",
                "eight prompts": f"{apart:.3f} s",
            }
        )
    keep("one_prompt", table, dtypes="bf16")


if __name__ == "__main__":
    main()
