"""How long the completions of an evaluation take: 200 unseen rows of the quickstart on the embedded
model, without an adapter and with the quickstart's own.

    python benchmarks/evaluation.py [--adapter adapter] [--rounds 3] [--storage bf16,fp32]

Seconds are those of the completions alone, without the loss, and of 16 tokens for a single prompt;
`cpu_s` is processor time, which with `--threads 1` is steadier on a machine that others use, and
`tokens` counts the completions. The sides run in turn in one process after a short round that warms
up, and figures are medians. Without `--adapter` the quickstart's is trained first. `--texts FILE`
writes all completions as JSON, by side, so that two versions of the code can be compared. Prints
JSON lines and a table, which `--keep` writes to results/evaluation.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lib.results import keep, markdown
from lib.short import parsed
from rich.console import Console

import lorafold as lf
from lorafold.data.formats import CONVERSATIONS
from lorafold.data.prompts import references
from lorafold.data.row_store import Rows
from lorafold.evaluation.loss_and_exact_match import EXTRA_TOKENS
from lorafold.generation import complete, stream
from lorafold.models.loading import load_model
from lorafold.models.quantizations import choose_storage
from lorafold.models.tokenizer import load_tokenizer
from lorafold.quickstart.run import MODEL, RECIPE, TEST_ROWS
from lorafold.quickstart.task import rows
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train


def trained(out: Path, steps: int) -> Path:
    """The quickstart's adapter."""
    recipe = RECIPE.model_copy(update={"steps": steps})
    data = rows("train", recipe.batch * steps, seed=0)
    train(RunRequest(Base(MODEL, device="cpu"), out, recipe, data, "rows"), Console(quiet=True))
    return out


def completed(model: Any, tokenizer: Any, found: Any) -> tuple[dict[str, float], list[str]]:
    """The figures of one round, and the completions."""
    longest = max(len(tokenizer(r.text, add_special_tokens=False).input_ids) for r in found)
    start, cpu = time.perf_counter(), time.process_time()
    texts = complete(model, tokenizer, [r.prompt for r in found], longest + EXTRA_TOKENS)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    "".join(stream(model, tokenizer, found[0].prompt, 16))
    one = time.perf_counter() - start
    tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    return {"seconds": seconds, "cpu_s": cpu, "tokens": tokens, "one_prompt_s": one}, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--storage", default="bf16,fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--rows", type=int, default=TEST_ROWS, help="unseen ones")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="of the adapter's training")
    parser.add_argument("--keep", action="store_true", help="write results/evaluation.json")
    a = parsed(parser, rounds=1, storage="bf16", rows=8, steps=2)
    torch.set_num_threads(a.threads)
    tokenizer = load_tokenizer(MODEL)
    found = references(Rows.of(rows("test", a.rows, seed=0)).extract(CONVERSATIONS), tokenizer)
    figures: dict[str, list[dict[str, float]]] = defaultdict(list)
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = a.adapter or trained(Path(folder) / "adapter", a.steps)
        sides = {}
        for base in a.storage.split(","):
            for name in ("no adapter", "one adapter"):
                model = load_model(MODEL, choose_storage(base, "cpu"))
                if name == "one adapter":
                    lf.load(model, path)
                sides[f"{base}, {name}"] = model
                completed(model, tokenizer, found[:4])
        for _ in range(a.rounds):
            for side, model in sides.items():
                row, texts[side] = completed(model, tokenizer, found)
                figures[side].append(row)
                print(json.dumps({"side": side, **row}), flush=True)
    table = [
        {"side": side} | {key: statistics.median(r[key] for r in rows_) for key in rows_[0]}
        for side, rows_ in figures.items()
    ]
    if a.texts:
        a.texts.write_text(json.dumps(texts))
    keep("evaluation", table, dtypes=a.storage) if a.keep else print(markdown(table))


if __name__ == "__main__":
    main()
