"""Tokens a second and peak memory against sequence length and rank, beside PEFT: a table and a
figure.

    python benchmarks/scaling.py [--rounds 3] [--lengths 256,512,1024,2048,4096] [--ranks
    4,16,64,256]

The embedded model in bf16, LoRA with dropout 0.05 on every linear of the blocks, one row of each
length (rank 16), four rows of 256 tokens with each rank. The two sides take their steps in turn
(see lib/worker.py); figures are medians. Writes results/scaling.json and results/scaling.svg. Linux
only.
"""

import argparse
import json
import os

from lib.results import HERE, keep
from lib.short import is_short, parsed
from lib.worker import Case
from peers import compare, figures, floor_flop


def draw(rows: list[dict], axes: dict[str, str]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(
        2, len(axes), figsize=(9, 6), layout="constrained", squeeze=False
    )
    for column, (axis, label) in enumerate(axes.items()):
        chosen = [row for row in rows if row["axis"] == axis]
        for line, (name, unit, scale) in enumerate(
            (("tokens_per_second", "tokens/s", 1), ("peak_bytes", "peak memory, GB", 1e9))
        ):
            plot = plots[line][column]
            ours = [row["lorafold"] for row in chosen]
            peft = [row[row["peft"]] for row in chosen]
            for values, title in ((ours, "lorafold"), (peft, "PEFT")):
                plot.plot(
                    [row[axis] for row in chosen],
                    [value[name] / scale for value in values],
                    marker="o",
                    label=title,
                )
            plot.set(xscale="log", xlabel=label, ylabel=unit, ylim=(0, None))
            plot.set_xticks([row[axis] for row in chosen], [str(row[axis]) for row in chosen])
            plot.minorticks_off()
            plot.grid(alpha=0.3)
            plot.legend(frameon=False)
    figure.savefig(os.devnull if is_short() else HERE / "scaling.svg", format="svg")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="steps of each that count")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096", help="tokens of the one row")
    parser.add_argument("--ranks", default="4,16,64,256")
    asked = parsed(parser, rounds=1, lengths="16", ranks="4")
    cases = [("length", Case(1, int(n), dropout=0.05)) for n in asked.lengths.split(",")]
    cases += [("rank", Case(rank=int(r), dropout=0.05)) for r in asked.ranks.split(",")]
    rows = []
    for axis, case in cases:
        row = compare(case, asked.rounds, floor_flop(case.batch * case.length))
        rows.append(
            {"axis": axis, "length": case.length, "rank": case.rank, "rows": case.batch, **row}
        )
        print(json.dumps(rows[-1]), flush=True)
    keep(
        "scaling",
        [
            {
                "rows × tokens": f"{row['rows']} x {row['length']}",
                "rank": row["rank"],
                **figures(row),
            }
            for row in rows
        ],
        dtypes="bf16",
    )
    draw(rows, {"length": "tokens of one row, rank 16", "rank": "rank, 4 x 256 tokens"})


if __name__ == "__main__":
    main()
