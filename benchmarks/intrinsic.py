"""The intrinsic dimension of telling the quickstart's intents apart, over sizes of one model.

    python benchmarks/intrinsic.py [--layers 2,4,8] [--steps 80] [--largest 65536]

The first blocks of the embedded model are a smaller model, in fp32: what they know of a text is
enough for a head that tells classes apart, while a language model without its last blocks is none.
Each learns from the same rows in the same order. The search is that of `lorafold lab intrinsic`:
the smallest power of 2 whose random subspace gets 90% of the way that full training gets in
held-out loss. One JSON object a size, then the table, which is also written to
results/intrinsic.json.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from lib.results import keep
from lib.short import parsed

import lorafold as lf
from lorafold.quickstart.run import RECIPE
from lorafold.quickstart.task import rows

HELD_OUT = 48  # rows
MODEL = "smollm2"


def cut(layers: int, path: Path) -> int:
    """Write the model of the first blocks; returns how many numbers its linears have."""
    model = lf.load_model(MODEL, "fp32")
    body = model.model
    del body.layers[layers:]
    model.config.num_hidden_layers = layers
    model.save_pretrained(path)
    lf.load_tokenizer(MODEL).save_pretrained(path)
    return sum(p.numel() for p in body.layers.parameters() if p.dim() == 2)


def labelled(given: list[dict]) -> list[dict]:
    """The same requests with the name of their intent as the label."""
    return [
        {
            "text": row["prompt"][-1]["content"],
            "label": json.loads(row["completion"][0]["content"])["intent"],
        }
        for row in given
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="2,4,8", help="blocks of the models")
    parser.add_argument("--steps", type=int, default=80, help="of every run")
    parser.add_argument("--largest", type=int, default=65536, help="dimension")
    asked = parsed(parser, layers="1", steps=2, largest=16)
    recipe = RECIPE.model_copy(
        update={"steps": asked.steps, "objective": "classify", "batch": 8, "lr": 2e-4}
    )
    train = labelled(rows("train", recipe.batch * asked.steps, seed=0))
    test = labelled(rows("test", HELD_OUT, seed=0))
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in map(int, asked.layers.split(",")):
            model = Path(folder) / f"{layers}-blocks"
            numbers = cut(layers, model)
            found = lf.intrinsic(
                Path(folder) / f"{layers}-found", model=model, data=train, eval_data=test,
                recipe=recipe, largest=asked.largest,
            )  # fmt: skip
            row = {
                "blocks": layers,
                "weights in linear layers": f"{numbers:,}",
                "loss before": found.base_loss,
                "after full training": found.full_loss,
                "dimension": found.dimension or f"more than {asked.largest}",
                "share of the gain at each dimension": " ".join(
                    f"{p.dimension}:{p.reached:.0%}" for p in found.points
                ),
            }
            print(json.dumps(row), flush=True)
            table.append(row)
    keep("intrinsic", table, dtypes="fp32")


if __name__ == "__main__":
    main()
