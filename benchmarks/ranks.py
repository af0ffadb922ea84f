"""How much of its rank does an update use, and where does it lie? The quickstart's task at several
ranks and seeds, inspected.

    python benchmarks/ranks.py [--out ranks] [--steps 100] [--ranks 4 8 16 64]

LoRA on all linears of the embedded model, an fp32 base, the recipe's rates. What is there in OUT is
not done again, so a run that was stopped goes on. Effective ranks are means over 210 matrices;
`loss` is that of 60 held-out rows. phi is of the directions that two updates read, and write
(`lorafold.inspecting.spectra`), `chance` what unrelated ones come to.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from lib.results import keep
from lib.short import parsed

from lorafold.quickstart.task import rows

SEEDS = (0, 1)
SIZES = (
    ["--rank", "12"],
    ["--energy", "0.95"],
    ["--rank", "8"],
    ["--rank", "4"],
    ["--rank", "2"],
    ["--rank", "1"],
)


def lorafold(*arguments: str) -> dict:
    """The command's JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "lorafold", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def kept(file: Path, *arguments: str) -> dict:
    if not file.exists():
        file.write_text(json.dumps(lorafold(*arguments)))
    return json.loads(file.read_text())


def write(path: Path, split: str, n: int) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(split, n, 0)))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("ranks"))
    parser.add_argument(
        "--steps", type=int, default=100, help="of each adapter, 4 of 1000 rows each"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[4, 8, 16, 64], help="16 among them"
    )
    parser.add_argument("--rows", type=int, default=60, help="held out")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="to which one is resized")
    args = parsed(parser, steps=2, ranks=[16], rows=2, sizes=1)
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    data = write(out / "train.jsonl", "train", 1000)
    on = ("--data", write(out / "test.jsonl", "test", args.rows), "--storage", "fp32")
    adapters = {(rank, seed): out / f"r{rank}-s{seed}" for rank in args.ranks for seed in SEEDS}
    for (rank, seed), path in adapters.items():
        if not path.exists():
            lorafold(
                "train",
                "--data",
                data,
                "--out",
                str(path),
                "--storage",
                "fp32",
                "--seed",
                str(seed),
                "--set",
                f"rank={rank}",
                "--set",
                f"steps={args.steps}",
                "--set",
                "batch=4",
                "--set",
                "dropout=0",
                "--set",
                "max_length=256",
            )
    ranks = []
    for (rank, seed), path in adapters.items():
        whole = kept(out / f"{path.name}.json", "inspect", str(path))["whole"]
        loss = kept(
            out / f"{path.name}-loss.json", "eval", "--adapter", str(path), *on, "--no-completions"
        )["loss"]
        shown = {f"for {share}%": float(whole[f"effective_rank_{share}"]) for share in (90, 95, 99)}
        ranks.append(
            {
                "rank": rank,
                "seed": seed,
                **shown,
                "stable": whole["stable_rank"],
                "dW over W": f"{whole['relative_norm']:.2%}",
                "amplification": whole["amplification"],
                "loss": f"{loss:.4f}",
            }
        )
    pairs = [((rank, 0), (rank, 1)) for rank in args.ranks]
    pairs = [((8, 0), (64, 0))] * ({8, 64} <= {*args.ranks}) + pairs
    beside = [compared(adapters[a], adapters[b], out) for a, b in pairs]
    cuts = []
    for size in SIZES[: args.sizes]:
        to = out / f"resized{''.join(size)}"
        made = kept(
            to.with_suffix(".json"),
            "resize",
            str(adapters[16, 0]),
            *size,
            "--out",
            str(to),
            *on,
            "--overwrite",
        )
        cuts.append(
            {
                "rank 16 resized to": " ".join(size).strip("-"),
                "error": f"{made['error']:.1%}",
                "loss": f"{made['loss_after']:.4f}",
            }
        )
    keep("ranks", ranks, beside, cuts, dtypes="fp32")


def compared(a: Path, b: Path, out: Path) -> dict:
    sites = kept(out / f"{a.name}-{b.name}.json", "inspect", str(a), "--against", str(b))[
        "against"
    ]["sites"].values()

    def mean(name: str) -> float:
        return fmean(site[name] for site in sites)

    line = {"update": a.name, "compared with": b.name, "cosine": mean("cosine")}
    for side in ("read", "written"):
        line |= {
            f"phi {side}, first": mean(f"phi_{side}_first"),
            f"phi {side}, all": mean(f"phi_{side}_all"),
            f"chance {side}": mean(f"chance_{side}_all"),
        }
    return line


if __name__ == "__main__":
    main()
