"""In how many steps does LoRA+ reach the held-out loss that plain LoRA ends with?

    python benchmarks/lora_plus.py [--steps 100] [--rates 2e-4 5e-4 1e-3]

The quickstart's task on SmolLM2-135M, r = 16 on all linear layers. Plain LoRA has one rate for A
and B: each of `--rates` in turn, so that it is not judged by a rate that suits it badly. LoRA+ has
the recipe's two, 2e-4 and 3e-3. Every run has the same rows, in the same order.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from lib.results import markdown
from lib.short import parsed
from lib.work import Work, same_work, watched
from rich.console import Console

from lorafold.quickstart.run import RECIPE
from lorafold.quickstart.task import rows
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train

HELD_OUT, EVERY = 40, 5  # rows, steps


def held_out(rate: float | None, steps: int) -> tuple[dict[int, float], Work]:
    """The held-out loss by step of LoRA+ (None), or of plain LoRA with one rate, and its work."""
    recipe = RECIPE.model_copy(
        update={"steps": steps, "eval_every": EVERY, "lr": rate, "lr_b": rate}
    )
    train_rows, test_rows = (
        rows("train", recipe.batch * steps, seed=0),
        rows("test", HELD_OUT, seed=0),
    )
    with tempfile.TemporaryDirectory() as folder, watched() as work:
        out = Path(folder) / "adapter"
        train(
            RunRequest(
                Base(), out, recipe, train_rows, "the quickstart's task", eval_rows=test_rows
            ),
            Console(quiet=True),
        )
        evals = json.loads((out / "lorafold.json").read_text())["evals"]
    return {int(step): loss for step, loss in evals.items()}, work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    asked = parsed(parser, steps=5, rates=[2e-4])
    plus, work = held_out(None, asked.steps)
    along = " ".join(f"{step}:{loss:.4f}" for step, loss in plus.items())
    print(f"LoRA+ 2e-4 and 3e-3: held-out loss {along}", flush=True)
    table = []
    for rate in asked.rates:
        plain, own = held_out(rate, asked.steps)
        same_work({"LoRA+": work, f"plain LoRA at {rate:g}": own})
        final = plain[asked.steps]
        reached = next((step for step, loss in plus.items() if loss <= final), None)
        steps = f"{asked.steps}: {final:.4f}"
        table.append(
            {
                "LoRA with one rate": f"{rate:g}",
                "ends after": steps,
                "LoRA+ is there": reached or "not",
            }
        )
        print(json.dumps(table[-1]), flush=True)
    print(markdown(table))


if __name__ == "__main__":
    main()
