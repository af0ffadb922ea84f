"""What the number of epochs does with few rows: one epoch, three, and auto, with held-out rows.

    python benchmarks/few_rows.py [--rows 20 100 1000] [--runs auto]

Rows of the quickstart's task, defaults otherwise. `auto` has held-out rows to end by (a tenth of
the training rows, --eval-fraction 0.1) or none. Each adapter is measured on the same 100 test rows,
which no run sees.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from lib.finished import finished
from lib.results import keep
from lib.short import parsed

from lorafold.quickstart.task import rows

RUNS = {
    "1 epoch": ["--epochs", "1"],
    "3 epochs": ["--epochs", "3"],
    "auto": ["--epochs", "auto"],
    "auto, a tenth held out": ["--epochs", "auto", "--eval-fraction", "0.1"],
}
LORAFOLD = [sys.executable, "-m", "lorafold"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 100, 1000])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    asked, table = parsed(parser, rows=[4], runs=["1 epoch", "auto, a tenth held out"]), []
    with tempfile.TemporaryDirectory() as scratch:
        test = written(Path(scratch, "test.jsonl"), "test", 100)
        before = measured([], test)
        for n in asked.rows:
            data = written(Path(scratch, f"{n}.jsonl"), "train", n)
            for name in asked.runs:
                out = f"{scratch}/out"
                done = finished(
                    [*LORAFOLD, "train", "--model", "smollm2", "--data", data, "--out", out,
                     "--overwrite", "--json", *RUNS[name]]
                )  # fmt: skip
                found = {
                    "rows": n, "run": name, "steps": done.said["steps"], "base": before,
                    "test loss": measured(["--adapter", out], test), "seconds": done.seconds,
                }  # fmt: skip
                print(json.dumps(found), flush=True)
                table.append(found)
    keep("few_rows", table, dtypes="the default")


def written(path: Path, split: str, n: int) -> str:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(split, n, 0)))
    return str(path)


def measured(adapter: list[str], test: str) -> float:
    """The loss on the test rows."""
    asked = ["eval", "--model", "smollm2", "--data", test, *adapter, "--json"]
    return finished([*LORAFOLD, *asked]).said["loss"]


if __name__ == "__main__":
    main()
