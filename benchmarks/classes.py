"""Does a classifier learn with the default rates, and does it at another rate of B?

    python benchmarks/classes.py [--steps 400] [--seeds 0 1] [--rates 3e-3] [--storage bf16]
        [--threads 1] [--rows 1600] [--data FILE] [--out classes]

1,600 sentences of two classes (about 25 tokens) that no single word decides: who has a thing after
a sentence such as "The neighbours said that Anna did not lend the lamp to Ben"? The first runs have
the recipe's rates, those of `--rates` another one for B. A row has the accuracy on the unseen
sentences (300, or what FILE has beyond --rows), and the loss of the last 50 steps beside that of
guessing. Runs that are there in OUT are not made again.
"""

import argparse
import json
import random
import tempfile
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lib.results import markdown
from lib.short import parsed

import lorafold as lf

GIVEN, TAKEN = (
    ["give", "sell", "lend", "hand", "send", "pass"],
    ["take", "buy", "borrow", "get", "steal", "accept"],
)
PEOPLE = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Irene",
    "Jack",
    "Karen",
    "Leo",
    "Maria",
    "Noah",
]
THINGS = [
    "lamp",
    "guitar",
    "bicycle",
    "novel",
    "phone",
    "printer",
    "jacket",
    "camera",
    "ladder",
    "carpet",
    "mirror",
]
PLACES = (
    "in the old town",
    "near the station",
    "by the harbour",
    "at my sister's wedding",
    "during the holidays",
    "after a long drive",
    "on a rainy Monday",
)
HELD_OUT = 300


def holder(draw: random.Random) -> dict[str, str]:
    """Who has the thing at the end, the first or the second of two people."""
    one, other = draw.sample(PEOPLE, 2)
    given, refused = draw.random() < 0.5, draw.random() < 0.5
    did = draw.choice(["did not", "never did"] if refused else ["did indeed", "really did"])
    verb, thing = draw.choice(GIVEN if given else TAKEN), draw.choice(THINGS)
    deed = f"{one} {did} {verb} the {thing} {'to' if given else 'from'} {other}"
    text = f"The neighbours said that {deed} {draw.choice(PLACES)}, and we believe them."
    return {"text": text, "label": "second" if given != refused else "first"}


def rows(n: int) -> list[dict[str, str]]:
    """n rows whose texts differ."""
    draw = random.Random(0)
    found: dict[str, dict[str, str]] = {}
    while len(found) < n:
        row = holder(draw)
        found[row["text"]] = row
    return [*found.values()]


def measured(rate: float | None, seed: int, asked: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The figures of a run."""
    given = rows(asked.rows + HELD_OUT)
    if asked.data is not None:
        given = [json.loads(line) for line in asked.data.read_text().splitlines()]
    of = sha256(json.dumps(given).encode()).hexdigest()[:8]
    names = (rate or "default", seed, asked.steps, asked.storage, asked.threads, asked.rows, of)
    file = out / f"{'-'.join(map(str, names))}.json"
    if not file.exists():
        fields = {"steps": asked.steps, "lr_b": rate, "seed": seed, "storage": asked.storage}
        trained = lf.train(
            lf.Recipe(objective="classify", **fields),
            data=given[: asked.rows],
            out=out / "adapter",
            overwrite=True,
        )
        found = lf.evaluate("smollm2", given[asked.rows :], adapters=out / "adapter")
        file.write_text(json.dumps({"accuracy": found.exact_match, **trained.guessing}))
    return {"B": rate or "the recipe's", "seed": seed, **json.loads(file.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-3])
    parser.add_argument("--storage", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1600, help="of which the classes are learned")
    parser.add_argument("--data", type=Path, help="other rows (JSON lines of text and label)")
    parser.add_argument("--out", type=Path, help="where finished runs are kept")
    asked = parsed(parser, steps=2, seeds=[0], rows=16)
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as scratch:
        out = asked.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        found = []
        for rate, seed in product((None, *asked.rates), asked.seeds):
            found.append(measured(rate, seed, asked, out))
            print(json.dumps(found[-1]), flush=True)
    print(markdown(found))


if __name__ == "__main__":
    main()
