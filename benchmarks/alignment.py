"""A preference that is learned over a skill: SFT, then DPO over it on the same frozen base.

    python benchmarks/alignment.py [--steps 200] [--pairs 480] [--epochs 2] [--seed 0]

The skill is the quickstart's: a request becomes one JSON object. Supervised training sees its keys
in either order, at random, so that the adapter prefers none. The preference is which order goes
with which request: as it is spoken for bookings, reminders and messages, reversed for all else. So
only a policy that reads the request can have it right, and length tells nothing. Measured on 200
unseen rows before and after: the share of pairs whose chosen order the model finds more likely,
the share of greedy completions in the chosen order, and the skill, which is the share of greedy
completions with every value right in whatever order. The files of the supervised adapter are
compared byte by byte. Prints a table, which is also written to
results/alignment.md.
"""

import argparse
import hashlib
import json
import random
import tempfile
from pathlib import Path

from lib.results import keep
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
    return [
        {"prompt": row["prompt"], "completion": turn(rng.choice(orders(row)))} for row in of
    ]


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
        "greedy in chosen order": f"{found.exact_match:.1%}",
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
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--epochs", type=int, default=2, help="of preference training")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    console = Console(stderr=True)
    test = rows("test", 200, 0)
    common = {"dropout": 0.0, "base": "bf16", "max_length": 256, "seed": asked.seed}
    with tempfile.TemporaryDirectory() as scratch:
        sft, dpo = Path(scratch) / "sft", Path(scratch) / "dpo"
        skilled = lf.train(
            lf.Recipe(steps=asked.steps, batch=4, **common),
            data=either(rows("train", 4 * asked.steps, asked.seed), asked.seed),
            out=sft,
            console=console,
        )
        table, before = [measured("SFT", [sft], test)], digest(sft)
        preferred = lf.train(
            lf.Recipe(objective="dpo", epochs=asked.epochs, batch=8, **common),
            data=pairs(rows("train", asked.pairs, asked.seed + 1)),
            over=sft,
            out=dpo,
            console=console,
        )
        table.append(measured("SFT + DPO", [sft, dpo], test))
        moved = digest(sft) != before
    seconds = f"{skilled.seconds:.0f} and {preferred.seconds:.0f}"
    about = [{"seconds of training": seconds, "the SFT adapter's bytes moved": moved}]
    keep("alignment", table, about)


if __name__ == "__main__":
    main()
