"""A training step of lorafold beside the same of PEFT, as their users run them: seconds, share of
the floor, peak memory.

    python benchmarks/peers.py [--rounds 9] [--settings lora-dropout,nf4] [--batch 4] [--length 256]
    [--rank 16] [--shape qwen3] [--device cuda]

The embedded model, or one of lib/shapes.py, rank 16 on every linear of the blocks, AdamW, every
token labelled. Each side is a process of its own and the two take their steps in turn; figures are
medians, ratios those of each turn. The floor is two passes of the linears and two products of the
head at the speed of a large product, in bf16 or fp32, whichever the machine is faster with,
measured after each of lorafold's steps. Peak memory is all that the process is resident in, on a
GPU all that its tensors take there. One JSON object a line, then the table, which is also written
to results/peers.json. Linux only.
"""

import argparse
import json
import statistics
import tempfile
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
    """Figures of both sides, and their ratios: times as fast, and lorafold's share of the other's
    peak.
    """
    with Worker("lorafold", case) as ours, Worker("peft", case) as peft:
        steps = in_turn({"lorafold": ours, "peft": peft}, WARM_UP, rounds)
    rate = statistics.median(step.gemm for step in steps["lorafold"])
    row: dict = {
        "over_peft": round(
            statistics.median(
                b.seconds / a.seconds for a, b in zip(steps["lorafold"], steps["peft"], strict=True)
            ),
            2,
        ),
        "memory_over_peft": round(steps["lorafold"][-1].peak / steps["peft"][-1].peak, 2),
        "gemm_gflops": round(rate / 1e9),
    }
    for peer, taken in steps.items():
        whole = statistics.median(step.seconds for step in taken)
        row[peer] = {
            "tokens_per_second": round(case.batch * case.length / whole, 1),
            "of_floor": round(flop / rate / whole, 3),
            **{
                part: round(statistics.median(getattr(step, part) for step in taken), 3)
                for part in PARTS
            },
            "peak_bytes": taken[-1].peak,
        }
    return row


def figures(row: dict) -> dict[str, object]:
    """The columns that people read."""
    ours, peft = row["lorafold"], row["peft"]
    return {
        "tokens/s": f"{ours['tokens_per_second']:.0f}",
        "PEFT": f"{peft['tokens_per_second']:.0f}",
        "speed-up": row["over_peft"],
        "matmul share": f"{ours['of_floor']:.0%}",
        "PEFT's matmul share": f"{peft['of_floor']:.0%}",
        "peak GB": f"{ours['peak_bytes'] / 1e9:.2f}",
        "PEFT's peak": f"{peft['peak_bytes'] / 1e9:.2f}",
        "memory relative to PEFT": row["memory_over_peft"],
    }


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
    table = []
    with tempfile.TemporaryDirectory() as model:
        if asked.shape:
            SHAPES[asked.shape](Path(model))
        named = model if asked.shape else "smollm2"
        shape = Case(asked.batch, asked.length, asked.rank, model=named, device=asked.device)
        flop = floor_flop(asked.batch * asked.length, shape.model)
        for name in asked.settings.split(","):
            row = compare(shape._replace(**SETTINGS[name]), asked.rounds, flop)
            print(json.dumps({"setting": name, **row}), flush=True)
            table.append(
                {
                    "setting": name,
                    **figures(row),
                    "step (ms)": split(row["lorafold"]),
                    "PEFT's step": split(row["peft"]),
                }
            )
    if not asked.no_keep:
        keep(f"peers_{asked.shape}" if asked.shape else "peers", table, dtypes="bf16 or NF4")


if __name__ == "__main__":
    main()
