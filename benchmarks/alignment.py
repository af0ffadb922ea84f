"""A preference that is learned over a skill: SFT, then DPO over it on the same frozen base.

    python benchmarks/alignment.py [--out aligned] [--steps 200] [--pairs 320] [--seed 0]

The skill is the quickstart's: a request becomes one JSON object. Supervised training sees its keys
in either order, at random, so that the adapter prefers none. The preference is which order goes
with which request: as it is spoken for bookings, reminders and messages, reversed for all else. So
only a policy that reads the request can have it right, and length tells nothing. Measured on 200
unseen rows before and after: the share of pairs whose chosen order the model finds more likely,
the share of greedy completions in the chosen order, and the skill, which is the share of greedy
completions with every value right in whatever order. The files of the supervised adapter are
compared byte by byte. DPO alone goes on to push pairs apart that are told apart already, which
costs the skill; a supervised term holds the chosen completions (`sft_weight`), and both are
measured. What was trained stays in --out, and is not trained again. Prints a table, which is also
written to results/alignment.json.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

from lib.results import keep
from lib.short import parsed
from rich.console import Console

import lorafold as lf
from lorafold.quickstart.task import rows

SPOKEN = ("book", "remind", "message")


def orders(row: dict) -> tuple[str, str]:
    """The completion with the order of keys that is chosen for it, and with the other."""
    said = row["completion"][0]["content"]
    values = json.loads(said)
    other = dict(reversed(values.items()))
    texts = [json.dumps(v, separators=(",", ":"), ensure_ascii=False) for v in (values, other)]
    return (texts[0], texts[1]) if values["intent"] in SPOKEN else (texts[1], texts[0])


def turn(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pairs(of: list[dict]) -> list[dict]:
    """The rows as preferences."""
    return [
        {"prompt": row["prompt"], "chosen": turn(chosen), "rejected": turn(rejected)}
        for row, (chosen, rejected) in zip(of, map(orders, of), strict=True)
    ]


def either(of: list[dict], seed: int) -> list[dict]:
    """The rows with completions in either order, at random."""
    rng = random.Random(seed)
    return [{"prompt": row["prompt"], "completion": turn(rng.choice(orders(row)))} for row in of]


def digest(directory: Path) -> str:
    """The SHA-256 over every file of a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def same(text: str, wanted: str) -> bool:
    """Whether a completion is an object with the wanted values, in whatever order."""
    try:
        found: bool = json.loads(text) == json.loads(wanted)
    except ValueError:
        return False
    return found


def measured(name: str, stack: list[Path], test: list[dict]) -> dict:
    """The figures of a stack on the unseen rows, as a row of the table."""
    found = lf.evaluate("smollm2", pairs(test), adapters=stack, console=Console(stderr=True))
    preference = found.preference
    skill = sum(same(answer.answer, answer.reference) for answer in found.rows) / len(test)
    low, high = preference.preference_accuracy_interval
    row = {
        "": name,
        "preference accuracy": f"{preference.preference_accuracy:.1%} ({low:.1%} to {high:.1%})",
        "greedy in the chosen style": f"{found.exact_match:.1%}",
        "skill": f"{skill:.1%}",
        "reward margin": f"{preference.reward_margin:.2f}",
        "chosen": f"{preference.chosen_change:+.2f}",
        "rejected": f"{preference.rejected_change:+.2f}",
        "KL": f"{preference.kl:.4f}",
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of supervised training")
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--unseen", type=int, default=200, help="rows that are measured")
    parser.add_argument("--sft-weights", type=float, nargs="+", default=[1.0, 0.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("aligned"))
    asked = parsed(parser, steps=2, pairs=8, sft_weights=[1.0], unseen=8)
    test = rows("test", asked.unseen, 0)
    sft = asked.out / "sft"
    common = {"dropout": 0.0, "storage": "bf16", "max_length": 256, "seed": asked.seed}
    learn(
        lf.Recipe(steps=asked.steps, batch=4, **common),
        either(rows("train", 4 * asked.steps, asked.seed), asked.seed),
        sft,
    )
    table, before = [measured("SFT", [sft], test)], digest(sft)
    preferred = pairs(rows("train", asked.pairs, asked.seed + 1))
    for weight in asked.sft_weights:
        options = {"sft_weight": weight}
        rates = {"lr": 1e-5, "lr_b": 1e-4}
        recipe = lf.Recipe(
            objective="dpo", epochs=1, batch=8, objective_options=options, **rates, **common
        )
        dpo = asked.out / f"dpo-{weight:g}"
        learn(recipe, preferred, dpo, over=sft)
        table.append(measured(f"SFT + DPO, sft_weight {weight:g}", [sft, dpo], test))
    keep(
        "alignment",
        table,
        [{"bytes of the SFT adapter changed": digest(sft) != before}],
        dtypes="bf16",
    )


def learn(recipe: lf.Recipe, data: list[dict], out: Path, **over: Path) -> None:
    """Train an adapter, unless it is there."""
    if not out.exists():
        lf.train(recipe, data=data, out=out, console=Console(stderr=True), resume=True, **over)


if __name__ == "__main__":
    main()
