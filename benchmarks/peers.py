"""A training step of lorafold beside the same of PEFT, as their users run them: seconds, share of
the floor, peak memory.

    python benchmarks/peers.py [--rounds 9] [--settings lora-dropout,nf4] [--batch 4] [--length 256]
    [--rank 16] [--shape qwen3] [--device cuda]

The embedded model, or one of lib/shapes.py, rank 16 on every linear of the blocks, AdamW, every
token labelled. PEFT runs in bf16 and in fp32, and is compared in whichever is faster. Each is a
process of its own and they take their steps in turn; figures are medians, ratios those of each
turn. The floor is two passes of the linears and two products of the
head at the speed of a large product, in bf16 or fp32, whichever the machine is faster with,
measured after each of lorafold's steps. Peak memory is all that the process is resident in, on a
GPU all that its tensors take there. One JSON object a line, then the table, which is also written
to results/peers.json. Linux only.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from lib.results import keep
from lib.shapes import SHAPES
from lib.short import parsed
from lib.worker import Case, Worker, in_turn

from lorafold.core.targets import match
from lorafold.layers import is_linear, layer_of
from lorafold.models.loading import load_model

SETTINGS = {
    "lora-dropout": {"dropout": 0.05},
    "lora": {},
    "dora-dropout": {"dropout": 0.05, "dora": True},
    "dora": {"dora": True},
    "nf4-dropout": {"dropout": 0.05, "quantization": "nf4"},
    "nf4": {"quantization": "nf4"},
}
DTYPES = ("bfloat16", "float32")  # of PEFT
WARM_UP = 2
PARTS = ("forward", "backward", "optimizer")


def floor_flop(tokens: int, model_name: str = "smollm2") -> float:
    """2 passes of the linears; of the frozen head, logits and the gradient of what enters it."""
    model = load_model(model_name, torch.bfloat16)
    linears = sum(
        torch.Size(layer_of(model.get_submodule(p)).shape).numel()
        for p in match(model, "all-linear", is_linear).paths
    )
    return 4.0 * tokens * (linears + model.get_output_embeddings().weight.numel())


def compare(case: Case, rounds: int, flop: float) -> dict:
    """Figures of lorafold and of PEFT in each dtype, and lorafold's ratios to PEFT in the faster
    one: times as fast, and share of its peak.
    """
    sides = {"lorafold": ("lorafold", case)}
    sides |= {dtype: ("peft", case._replace(peft_dtype=dtype)) for dtype in DTYPES}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(*side)) for name, side in sides.items()}
        steps = in_turn(workers, WARM_UP, rounds)
    rate = statistics.median(step.gemm for step in steps["lorafold"])
    row: dict = {"gemm_gflops": round(rate / 1e9)}
    for name, taken in steps.items():
        whole = statistics.median(step.seconds for step in taken)
        row[name] = {
            "tokens_per_second": round(case.batch * case.length / whole, 1),
            "of_floor": round(flop / rate / whole, 3),
            **{
                part: round(statistics.median(getattr(step, part) for step in taken), 3)
                for part in PARTS
            },
            "peak_bytes": taken[-1].peak,
        }
    best = max(DTYPES, key=lambda dtype: row[dtype]["tokens_per_second"])
    turns = zip(steps["lorafold"], steps[best], strict=True)
    row["peft"] = best
    row["over_peft"] = statistics.median(b.seconds / a.seconds for a, b in turns)
    row["memory_over_peft"] = row["lorafold"]["peak_bytes"] / row[best]["peak_bytes"]
    return row


def figures(row: dict) -> dict[str, object]:
    """The columns that people read."""
    ours, peft = row["lorafold"], row[row["peft"]]
    return {
        "tokens/s": f"{ours['tokens_per_second']:.0f}",
        **{f"PEFT {dtype}": f"{row[dtype]['tokens_per_second']:.0f}" for dtype in DTYPES},
        "speed-up": f"{row['over_peft']:.2f}",
        "matmul share": f"{ours['of_floor']:.0%}",
        "PEFT's matmul share": f"{peft['of_floor']:.0%}",
        "peak GB": f"{ours['peak_bytes'] / 1e9:.2f}",
        "PEFT's peak": f"{peft['peak_bytes'] / 1e9:.2f}",
        "memory relative to PEFT": f"{row['memory_over_peft']:.2f}",
    }


def means(rows: dict[str, dict]) -> list[dict[str, object]]:
    """Geometric means over the settings, with dropout and without."""
    table = []
    for name, dropout in ("with dropout", True), ("without dropout", False), ("all", None):
        some = [row for n, row in rows.items() if dropout in (None, n.endswith("-dropout"))]
        if some:
            columns = {"speed-up": "over_peft", "memory relative to PEFT": "memory_over_peft"}
            figures = {
                head: f"{statistics.geometric_mean(row[key] for row in some):.2f}"
                for head, key in columns.items()
            }
            table.append({"settings": name, **figures})
    return table


def split(side: dict) -> str:
    return " + ".join(f"{1000 * side[part]:.0f}" for part in PARTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--settings", default=",".join(SETTINGS), help="which of them, separated by commas"
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that count")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shape", choices=SHAPES, help="of a random model, else the embedded one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-keep", action="store_true", help="leave results/ as it is")
    asked = parsed(parser, settings="dora-dropout,nf4", rounds=1, batch=1, length=16)
    table, rows = [], {}
    with tempfile.TemporaryDirectory() as model:
        if asked.shape:
            SHAPES[asked.shape](Path(model))
        named = model if asked.shape else "smollm2"
        shape = Case(asked.batch, asked.length, asked.rank, model=named, device=asked.device)
        flop = floor_flop(asked.batch * asked.length, shape.model)
        for name in asked.settings.split(","):
            row = rows[name] = compare(shape._replace(**SETTINGS[name]), asked.rounds, flop)
            print(json.dumps({"setting": name, **row}), flush=True)
            table.append(
                {
                    "setting": name,
                    **figures(row),
                    "step (ms)": split(row["lorafold"]),
                    "PEFT's step": split(row[row["peft"]]),
                }
            )
    if not asked.no_keep:
        name = f"peers_{asked.shape}" if asked.shape else "peers"
        dtypes = "bf16 or NF4; PEFT in bf16 and fp32, compared in the faster one"
        keep(name, table, means(rows), dtypes=dtypes)


if __name__ == "__main__":
    main()
