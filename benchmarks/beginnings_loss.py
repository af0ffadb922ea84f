"""What rows learn that are computed once where they begin alike, beside the same rows apart.

    python benchmarks/beginnings_loss.py [--steps 100] [--seeds 3] [--dropout 0 0.05]

The quickstart's task, each row behind one system prompt of some 100 tokens; SmolLM2 in bf16, LoRA
of rank 16 on all linears, batches of 4. Held-out loss of 100 unseen rows, both ways by seed. Prints
a table, which is also written to results/.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from lib.finished import COUNTED, finished
from lib.results import keep
from lib.short import parsed
from lib.work import same_work

from lorafold.quickstart.task import rows

SYSTEM = " ".join(
    f"Rule {n}: a request of kind {n} becomes one object of JSON with its fields in order."
    for n in range(1, 7)
)
LORAFOLD = [sys.executable, "-m", "lorafold"]


def written(scratch: str, name: str, found: list[dict]) -> str:
    """A file of rows behind the system prompt."""
    path, first = Path(scratch, f"{name}.jsonl"), {"role": "system", "content": SYSTEM}
    said = (row | {"prompt": [first, *row["prompt"]]} for row in found)
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    asked = parsed(parser, steps=1, seeds=1, dropout=[0.05])
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        data = written(scratch, "train", rows("train", 4 * asked.steps, 0))
        test = written(scratch, "test", rows("test", 100, 1))
        for dropout in asked.dropout:
            for seed in range(asked.seeds):
                row, work = {"dropout": dropout, "seed": seed}, {}
                for name, packing in (("shared", "auto"), ("separate", "on")):
                    out = f"{scratch}/{name}"
                    own = ("--model", "smollm2", "--storage", "bf16", "--json")
                    work[name] = finished([
                        *(*COUNTED, "train", *own, "--data", data, "--out", out, "--overwrite"),
                        *("--steps", str(asked.steps), "--batch", "4", "--packing", packing),
                        *("--dropout", str(dropout), "--seed", str(seed)),
                    ]).said["work"]  # fmt: skip
                    said = finished([
                        *(*LORAFOLD, "eval", *own, "--data", test, "--adapter", out),
                        "--no-completions",
                    ]).said  # fmt: skip
                    row[f"loss, {name}"], row["interval"] = said["loss"], said["loss_interval"]
                same_work(work)
                low, high = row.pop("interval")
                row |= {"95% interval, separate": f"{low:.4f} to {high:.4f}"}
                print(json.dumps(row), flush=True)
                table.append(row)
    for dropout in asked.dropout:
        some = [row for row in table if row["dropout"] == dropout]
        gaps = [row["loss, shared"] - row["loss, separate"] for row in some]
        print(f"dropout {dropout:g}: shared less separate {statistics.mean(gaps):+.4f} on average")
    keep("beginnings_loss", table, dtypes="bf16")


if __name__ == "__main__":
    main()
