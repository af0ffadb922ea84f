"""One document of thousands of tokens: a training step of lorafold beside the same of PEFT.

    python benchmarks/long_context.py [--lengths 8192] [--checkpointing both] [--rounds 1]
        [--peers lorafold,peft]

The embedded model in bf16, LoRA of rank 16 with dropout 0.05 on every linear of the blocks, every
token labelled, with gradient checkpointing and without. Each side is a process of its own; a side
that runs out of memory is told. Seconds are medians of whole steps after one that warms up (the
only step, with --rounds 0), peak memory is all that the process was resident in. Writes
results/long_context.json. Linux only.
"""

import argparse
import statistics

from lib.results import keep
from lib.short import parsed
from lib.work import Work, same_work
from lib.worker import Case, Worker


def measured(peer: str, case: Case, rounds: int, work: dict[str, Work]) -> dict[str, object]:
    """Seconds of a step and peak memory of one side, which adds what it computed."""
    with Worker(peer, case) as worker:
        try:
            steps = [worker.step() for _ in range(1 + rounds)]
        except SystemExit:
            return {"seconds": "out of memory", "tokens/s": "", "peak GB": ""}
    work[peer] = steps[-1].work
    same_work(work)
    seconds = statistics.median(step.seconds for step in steps[min(1, rounds) :])
    return {
        "seconds": f"{seconds:.1f}",
        "tokens/s": f"{case.length / seconds:.0f}",
        "peak GB": f"{steps[-1].peak / 1e9:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="8192", help="tokens of the document")
    parser.add_argument("--checkpointing", choices=["on", "off", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=1, help="steps of each that count")
    parser.add_argument("--peers", default="lorafold,peft")
    asked = parsed(parser, lengths="64")
    ways = {"on": [True], "off": [False], "both": [True, False]}[asked.checkpointing]
    table = []
    for length in map(int, asked.lengths.split(",")):
        for recompute in ways:
            work: dict[str, Work] = {}
            for peer in asked.peers.split(","):
                case = Case(1, length, dropout=0.05, recompute=recompute)
                row = {
                    "tokens": length,
                    "checkpointing": "on" if recompute else "off",
                    "side": peer,
                    **measured(peer, case, asked.rounds, work),
                }
                print(row, flush=True)
                table.append(row)
    keep("long_context", table, dtypes="bf16")


if __name__ == "__main__":
    main()
