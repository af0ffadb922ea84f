"""A training step of lorafold beside the same of PEFT, which users install as it is: seconds, share of the floor, peak memory.

    python benchmarks/peers.py [--rounds 7] [--settings lora-dropout,nf4] [--batch 4] [--length 256]

The embedded model in bf16, rank 16 on every linear of the blocks, AdamW, every token labelled. The two take their steps in turn in one
process; figures are medians, ratios those of each turn. The floor is two passes of the linears and three of the head at the speed of a
large bf16 product, measured in the same process. Peak memory is that of a process that loads the model and takes three steps of one of
them, over what it holds with everything imported. One JSON object a line, then the table. Linux only.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from lib.child import watch
from rich.console import Console
from torch import Tensor

import lorafold as lf
from lorafold.bases import is_linear, layer_of
from lorafold.core.targets import match
from lorafold.io.allocator import keep_freed_blocks
from lorafold.io.models import Storage, load_model
from lorafold.train.data import Example
from lorafold.train.fused import fused
from lorafold.train.objectives import Sft


class Setting(NamedTuple):
    dropout: float = 0.0
    dora: bool = False
    quantization: str | None = None


SETTINGS = {
    "lora-dropout": Setting(dropout=0.05), "lora": Setting(), "dora": Setting(dora=True), "dora-dropout": Setting(dropout=0.05, dora=True),
    "nf4": Setting(quantization="nf4"), "nf4-dropout": Setting(dropout=0.05, quantization="nf4"),
}  # fmt: skip
CHILD = """
steps = MAKERS[sys.argv[1]](SETTINGS[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4]))
for _ in range(3):
    timed(steps)
"""


class Steps(NamedTuple):
    """A loss over fixed data, the optimizer of what it trains, and what must stay open until the last step."""

    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    open: object = None


def data(batch: int, length: int) -> Tensor:
    return torch.randint(1000, 40_000, (batch, length), generator=torch.Generator().manual_seed(0))


def ours(setting: Setting, batch: int, length: int) -> Steps:
    model = load_model("smollm2", Storage(torch.bfloat16, setting.quantization))
    keep_freed_blocks()
    spec = lf.LoRA(dropout=setting.dropout)
    adapter = lf.attach(model, lf.DoRA(spec) if setting.dora else spec)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    fast = fused(model)
    print(fast.__enter__(), file=sys.stderr)
    packing = Sft().loss(model, tokenizer, True, Console(quiet=True))
    loss = packing.__enter__()
    inputs = loss.collate([Example(tuple(row), tuple(row)) for row in data(batch, length).tolist()], torch.device("cpu"))
    loss.train()
    return Steps(lambda: loss(**inputs) / (batch * (length - 1)), torch.optim.AdamW(adapter.parameters(), lr=2e-4), (fast, packing))


def peft(setting: Setting, batch: int, length: int) -> Steps:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lorafold.io.models import resolve_model

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    packing = {"quantization_config": BitsAndBytesConfig(**four)} if setting.quantization else {}
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2").path, dtype=torch.bfloat16, **packing)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=setting.dropout, use_dora=setting.dora, target_modules="all-linear")
    tuned = get_peft_model(model, config).train()
    ids = data(batch, length)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    return Steps(lambda: tuned(input_ids=ids, labels=ids, use_cache=False).loss, torch.optim.AdamW(trained, lr=2e-4))


MAKERS = {"lorafold": ours, "peft": peft}


def timed(steps: Steps) -> tuple[float, float, float]:
    """Seconds of forward, backward and optimizer step."""
    at = [time.perf_counter()]
    loss = steps.loss()
    at.append(time.perf_counter())
    loss.backward()
    at.append(time.perf_counter())
    steps.optimizer.step()
    steps.optimizer.zero_grad()
    at.append(time.perf_counter())
    return at[1] - at[0], at[2] - at[1], at[3] - at[2]


def gemm_rate() -> float:
    """FLOP/s of a large product in bf16."""
    x, w = torch.randn(1024, 1536).bfloat16(), torch.randn(1536, 1536).bfloat16()
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        x @ w
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 1536 * 1536 / statistics.median(seconds)


def floor_flop(tokens: int) -> float:
    """2 passes of the linears and 3 products of the frozen head: logits, and the gradient of what enters it, with softmax in between."""
    model = load_model("smollm2", torch.bfloat16)
    linears = sum(torch.Size(layer_of(model.get_submodule(p)).shape).numel() for p in match(model, "all-linear", is_linear).paths)
    return 4.0 * tokens * (linears + model.get_output_embeddings().weight.numel())


def compare(name: str, batch: int, length: int, rounds: int, floor: float) -> dict:
    both = {peer: make(SETTINGS[name], batch, length) for peer, make in MAKERS.items()}
    times: dict[str, list[tuple[float, float, float]]] = {peer: [] for peer in both}
    rates = []
    for turn in range(rounds + 1):
        rates.append(gemm_rate())
        for peer, steps in both.items():
            found = timed(steps)
            if turn:
                times[peer].append(found)
    medians = {peer: [statistics.median(part) for part in zip(*t, strict=True)] for peer, t in times.items()}
    ratio = statistics.median(sum(p) / sum(o) for o, p in zip(times["lorafold"], times["peft"], strict=True))
    least = floor / statistics.median(rates)
    row: dict = {"setting": name, "over_peft": round(ratio, 2)}
    for peer, parts in medians.items():
        whole = statistics.median(map(sum, times[peer]))
        row[peer] = {
            "tokens_per_second": round(batch * length / whole, 1), "of_floor": round(least / whole, 3),
            "forward": round(parts[0], 3), "backward": round(parts[1], 3), "optimizer": round(parts[2], 3),
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which of them, separated by commas")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    asked = parser.parse_args()
    floor = floor_flop(asked.batch * asked.length)
    rows = []
    for name in asked.settings.split(","):
        shape = (str(asked.batch), str(asked.length))
        imports = f"sys.path.insert(0, {sys.path[0]!r})\nimport bitsandbytes, peft\nfrom peers import MAKERS, SETTINGS, timed"
        peaks = {peer: watch(imports, CHILD, peer, name, *shape).resident for peer in MAKERS}
        row = compare(name, asked.batch, asked.length, asked.rounds, floor)
        for peer, peak in peaks.items():
            row[peer]["peak_bytes"] = peak
        row["memory_over_peft"] = round(peaks["lorafold"] / peaks["peft"], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    print("\n| setting | tokens/s | PEFT | times as fast | of the floor | peak | PEFT's | ratio |\n|---|---|---|---|---|---|---|---|")
    for r in rows:
        a, b = r["lorafold"], r["peft"]
        print(f"| {r['setting']} | {a['tokens_per_second']:.0f} | {b['tokens_per_second']:.0f} | {r['over_peft']} | {a['of_floor']:.0%} | "
              f"{a['peak_bytes'] / 1e9:.2f} GB | {b['peak_bytes'] / 1e9:.2f} GB | {r['memory_over_peft']} |")  # fmt: skip


if __name__ == "__main__":
    main()
