"""A training step on a mixture of experts beside the same of PEFT with its `target_parameters`:
seconds and peak memory.

    python benchmarks/experts.py [--rounds 5] [--batch 4] [--length 256] [--rank 16]

Random models of about 180M parameters in bf16, rank 16 on every linear of the blocks and every
expert, AdamW, every token labelled, no dropout (which PEFT refuses on experts). Each side is a
process of its own and the two take their steps in turn; figures are medians, ratios those of each
turn. Peak memory is all that the process is resident in. lorafold also on NF4, in which PEFT can't
hold experts. Prints a table, which is also written to results/experts.json. Linux only.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from lib.results import keep
from lib.short import parsed
from lib.worker import Case, Step, Worker, in_turn

from lib.mixtures import random

WARM_UP = 1
MODELS = ("mixtral", "qwen3-moe")


def figures(name: str, ours: list[Step], peft: list[Step], tokens: int) -> dict:
    """The row of a table."""
    turns = zip(ours, peft, strict=True)
    medians = [statistics.median(step.seconds for step in side) for side in (ours, peft)]
    return {
        "model": name,
        "tokens/s": f"{tokens / medians[0]:.0f}",
        "PEFT": f"{tokens / medians[1]:.0f}",
        "speed-up": f"{statistics.median(b.seconds / a.seconds for a, b in turns):.2f}",
        "peak GB": f"{ours[-1].peak / 1e9:.2f}",
        "PEFT's peak": f"{peft[-1].peak / 1e9:.2f}",
        "memory relative to PEFT": f"{ours[-1].peak / peft[-1].peak:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that count")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--blocks", type=int, default=12, help="of the models")
    asked = parsed(parser, rounds=1, batch=1, length=16, rank=2, blocks=1, models=["qwen3-moe"])
    table = []
    with TemporaryDirectory() as folder:
        for name in asked.models:
            path = Path(folder, name)
            random(name, path, asked.blocks)
            case = Case(asked.batch, asked.length, asked.rank, model=str(path))
            four = case._replace(quantization="nf4")
            for title, of_ours in ((name, case), (f"{name}, experts in NF4", four)):
                with Worker("lorafold", of_ours) as ours, Worker("peft", case) as peft:
                    both = {"lorafold": ours, "peft": peft}
                    sides = in_turn(both, WARM_UP, asked.rounds)
                row = figures(title, sides["lorafold"], sides["peft"], asked.batch * asked.length)
                print(row, flush=True)
                table.append(row)
    keep("experts", table, dtypes="bf16, experts in bf16 or NF4")


if __name__ == "__main__":
    main()
