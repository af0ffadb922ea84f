"""Two tasks, an adapter each, and every way to make one adapter of both: which keep both tasks?

    python benchmarks/interference.py [--out interference] [--steps 80] [--rows 30]

Tasks with visibly different answers on the embedded model: a sentence becomes compact JSON (the
quickstart's task, under a system prompt), a request becomes SQL. What is there in OUT is not done
again, so a run that was stopped goes on. Cells are the loss in nats a labelled token and the share
of held-out answers that are exact.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from lib.results import keep
from lib.short import parsed

from lorafold.quickstart.task import rows

HOWS = (
    "linear",
    "task-arithmetic",
    "svd",
    "ties",
    "dare",
    "dare-ties",
    "magnitude",
    "lorahub",
    "mixture",
)
THINGS = ("users", "orders", "books", "films", "cars", "hotels", "songs", "flights")
VALUES = {
    "city": ("Paris", "Oslo", "Rome", "Lima"),
    "color": ("red", "blue", "green"),
    "genre": ("jazz", "crime", "drama"),
    "country": ("Spain", "Japan", "Chile"),
    "brand": ("Volvo", "Fiat", "Sony"),
    "status": ("open", "late", "paid"),
}
NUMBERS = ("price", "age", "year", "weight", "rating", "length")


def sql(draw: random.Random) -> dict:
    thing, column, number = draw.choice(THINGS), draw.choice(list(VALUES)), draw.choice(NUMBERS)
    value, bound, most, above = (
        draw.choice(VALUES[column]),
        draw.randrange(2, 2000),
        draw.randrange(2, 30),
        draw.random() < 0.5,
    )
    asked = draw.choice(
        (
            (
                f"Find {thing} whose {column} is {value} and whose {number} is"
                f" {'above' if above else 'below'} {bound}, at most {most}."
            ),
            (
                f"At most {most} {thing}: {column} {value}, {number} {'over' if above else 'under'}"
                f" {bound}."
            ),
            (
                f"Show me {most} {thing} with {column} {value} and a {number}"
                f" {'greater' if above else 'smaller'} than {bound}."
            ),
        )
    )
    answer = (
        f"SELECT * FROM {thing} WHERE {column} = '{value}' AND {number} {'>' if above else '<'}"
        f" {bound} LIMIT {most};"
    )
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def write(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def lorafold(*arguments: str) -> dict:
    """The command's JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "lorafold", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("interference"))
    parser.add_argument("--steps", type=int, default=80, help="of each adapter, 4 rows each")
    parser.add_argument(
        "--rows",
        type=int,
        default=30,
        help="held out of each task; as many teach LoRAHub and mixtures",
    )
    parser.add_argument("--hows", nargs="+", default=HOWS, choices=HOWS)
    args = parsed(parser, steps=2, rows=2, hows=["svd", "mixture"])
    out, n = args.out, args.rows
    out.mkdir(parents=True, exist_ok=True)
    data, common = {}, ["--set", "steps=20", "--set", "batch=8"]
    for seed, (task, of) in enumerate({"json": json_rows, "sql": sql_rows}.items()):
        training, held_out = of("train", 4 * args.steps), of("test", n)
        data[task], taught = (
            write(out / f"{task}.jsonl", held_out),
            write(out / f"{task}-taught.jsonl", training[:n]),
        )
        if not (out / f"adapter-{task}").exists():
            source = write(out / f"{task}-train.jsonl", training)
            lorafold(
                "train",
                "--data",
                str(source),
                "--out",
                str(out / f"adapter-{task}"),
                "--storage",
                "fp32",
                "--seed",
                str(seed),
                "--set",
                f"steps={args.steps}",
                "--set",
                "batch=4",
                "--set",
                "dropout=0.0",
                "--set",
                "max_length=256",
            )
        common += [
            "--adapter",
            str(out / f"adapter-{task}"),
            "--data",
            str(data[task]),
            "--examples",
            str(taught),
        ]
    found = {}
    for gates, hows in {"global": args.hows, "layer": ("mixture",), "token": ("mixture",)}.items():
        file = out / f"{gates}.json"
        if not file.exists():
            words = [word for how in hows for word in ("--how", how)]
            file.write_text(
                json.dumps(
                    lorafold(
                        "compose",
                        *common,
                        *words,
                        "--gates",
                        gates,
                        "--out",
                        str(out / gates),
                        "--overwrite",
                    )
                )
            )
        found[gates] = json.loads(file.read_text())
    keep("interference", *tables(found, data), dtypes="fp32")


def json_rows(split: str, n: int) -> list[dict]:
    return rows(split, n, 0)


def sql_rows(split: str, n: int) -> list[dict]:
    return [sql(random.Random(f"{split}/{i}")) for i in range(n)]


def tables(found: dict[str, dict], data: dict[str, Path]) -> tuple[list[dict], list[dict]]:
    def cells(gates: str, who: str) -> dict[str, str]:
        of = {
            task: found[gates]["interference"]["tasks"][file.name][who]
            for task, file in data.items()
        }
        return {
            task: f"{figures['loss']:.4f} / {figures['exact_match']:.0%}"
            for task, figures in of.items()
        }

    lines = [
        {"adapter": who, **cells("global", who)}
        for who in ("base", *(f"adapter-{task}" for task in data))
    ]
    for gates, result in found.items():
        for how, made in result["compositions"].items():
            name = f"{how}, {gates} gates" if how == "mixture" else how
            weights = ", ".join(f"{w:.2f}" for w in made["weights"] or ())
            lines.append(
                {
                    "adapter": name,
                    **cells(gates, how),
                    "weights": weights,
                    "truncation error": f"{made['truncation_error']:.1%}",
                }
            )
    overall = found["global"]["interference"]["geometry"][0]["overall"]
    return lines, [{name: value for name, value in overall.items() if isinstance(value, float)}]


if __name__ == "__main__":
    main()
