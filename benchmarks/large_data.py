"""A million rows to the first step: seconds and memory of `lorafold train`, a second time, and of
TRL's SFTTrainer with PEFT, beside the time that tokenizing alone takes.

    python benchmarks/large_data.py [--rows 1000000] [--without-trl]

Generated rows of prompt and completion, about 200 tokens each, on the embedded model; every side
trains three steps of four rows. Tokenizing alone is the tokenizer on the finished texts, in one
process a core, each with its share. Memory is the anonymous memory of the process and its children
(shared pages are divided among them), at its peak, less that of the same command on 1,000 rows.
TRL maps its data set with one process a core. Prints JSON lines and a table, which is also written
to results/large_data.json. Linux only; it takes 4 GB of the disk for a while.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import psutil
from lib.finished import COUNTED, own_cache, paths
from lib.results import keep
from lib.short import parsed
from lib.work import same_work

from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runtime.processor import usable_cores

FEW = 1000
PEOPLE = ("a clerk", "the night nurse", "an old sailor", "my neighbour", "the auditor", "the pilot")
DEEDS = ("ordered", "repaired", "returned", "measured", "counted", "stored", "borrowed", "sold")
THINGS = ("wooden chairs", "copper pipes", "glass bottles", "apples", "letters", "winter coats")
PLACES = ("in the harbour", "near the station", "at the gate", "under the bridge", "in Uppsala")
TRL = """
import json, sys, time
start = time.time()
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from lib.work import none, of_trainer, stepping
from trl import SFTConfig, SFTTrainer

class First(TrainerCallback):
    def on_step_end(self, args, state, control, **rest):
        print("step", state.global_step, flush=True)

model, data, out, cores = sys.argv[1:]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
    processing_class=AutoTokenizer.from_pretrained(model),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    args=SFTConfig(
        output_dir=out, per_device_train_batch_size=4, max_steps=3, dataset_num_proc=int(cores),
        report_to="none", bf16=True, use_cpu=True, gradient_checkpointing=False, save_strategy="no",
        disable_tqdm=True,
    ),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[First()],
)
work = none()
of_trainer(trainer, work)
with stepping(work):
    trainer.train()
print(json.dumps({"work": work, "data": {"rows": len(trainer.train_dataset)}}))
"""


def write_rows(path: Path, n: int) -> Path:
    """Write n rows of messages, which both sides read."""
    rng = random.Random(0)

    def sentence() -> str:
        return (
            f"On day {rng.randrange(1, 366)} {rng.choice(PEOPLE)} {rng.choice(DEEDS)}"
            f" {rng.randrange(2, 9000)} {rng.choice(THINGS)} {rng.choice(PLACES)}, which took"
            f" {rng.randrange(2, 90)} minutes."
        )

    def text(low: int, high: int) -> str:
        return " ".join(sentence() for _ in range(rng.randrange(low, high)))

    with path.open("w") as file:
        for _ in range(n):
            asked, answered = f"{text(2, 5)} What happened next, and why?", text(2, 5)
            pair = {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": answered}],
            }
            file.write(json.dumps(pair) + "\n")
    return path


def share_of(path: str, part: int, parts: int) -> tuple[float, int]:
    """(seconds, tokens) of tokenizing every `parts`-th thousand of the rows, alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, seconds, tokens = load_tokenizer("smollm2"), 0.0, 0
    with open(path) as file:
        for number, lines in enumerate(iter(lambda: [file.readline() for _ in range(1000)], None)):
            lines = [line for line in lines if line]
            if not lines:
                return seconds, tokens
            if number % parts != part:
                continue
            rows = [json.loads(line) for line in lines]
            texts = [
                tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
                for row in rows
            ]
            start = time.perf_counter()
            ids = tokenizer(texts, add_special_tokens=False).input_ids
            seconds += time.perf_counter() - start
            tokens += sum(map(len, ids))
    raise AssertionError


def tokenizing(path: Path) -> dict:
    """Seconds of tokenizing alone, with one process a core."""
    cores = usable_cores()
    with get_context("spawn").Pool(cores) as pool:
        found = pool.starmap(share_of, [(str(path), i, cores) for i in range(cores)])
    return {"seconds": max(s for s, _ in found), "tokens": sum(n for _, n in found)}


def anonymous(process: psutil.Process) -> int:
    """Bytes of anonymous memory of a process and its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
    return total


def run(command: list[str], environment: dict[str, str]) -> dict:
    """Seconds to the first step, and the peak of memory, of a command that tells its steps."""
    start, peak, first = time.perf_counter(), 0, 0.0
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": paths()} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, anonymous(psutil.Process(process.pid)))
            except psutil.Error:
                return
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not first and line.startswith("step 1"):
            first = time.perf_counter() - start
    watcher.join()
    if process.wait() or not first:
        raise SystemExit("".join(lines[-20:]))
    said = json.loads([line for line in lines if line.startswith("{")][-1])
    work = {name: said["work"][name] for name in ("steps", "rows")}  # of random rows
    return {"seconds": first, "bytes": peak, "work": work | {"of": said["data"]["rows"]}}


def main() -> None:
    """Measure every side, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--once", action="store_true", help="neither few rows nor a second run")
    asked = parsed(parser, rows=1000, once=True)
    model, cores = str(resolve_model("smollm2").path), str(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        many, few = write_rows(root / "many.jsonl", asked.rows), write_rows(root / "few.jsonl", FEW)
        own = {"LORAFOLD_CACHE": own_cache(root / "cache"), "HF_HUB_OFFLINE": "1"}
        theirs = {"HF_DATASETS_CACHE": str(root / "datasets"), "HF_HUB_OFFLINE": "1"}

        def lorafold(data: Path) -> list[str]:
            options = ["--steps", "3", "--batch", "4", "--model", model, "--overwrite"]
            out = ["--out", str(root / "adapter")]
            return [*COUNTED, "train", "--data", str(data), *out, *options, "--json"]

        def trl(data: Path) -> list[str]:
            return [sys.executable, "-c", TRL, model, str(data), str(root / "trl"), cores]

        programs = [("lorafold", lorafold, own), ("TRL", trl, theirs)]
        runs = [("", few), (", first", many), (", second", many)]
        sides = [
            (name + run, command(data), environment)
            for name, command, environment in programs[: 1 if asked.without_trl else 2]
            for run, data in (runs[1:2] if asked.once else runs)
        ]
        pure = tokenizing(many)
        print(json.dumps({"side": "tokenizing alone", **pure}), flush=True)
        found: dict[str, dict] = {}
        for name, command, environment in sides:
            found[name] = run(command, environment)
            print(json.dumps({"side": name, **found[name]}), flush=True)
    for last in ["first"] if asked.once else ["first", "second"]:
        same_work({n: side["work"] for n, side in found.items() if n.endswith(f", {last}")})
    alone = {"side": "tokenizing alone", "seconds": pure["seconds"], "relative to tokenizing": 1.0}
    table: list[dict] = [alone | {"tokens per row": pure["tokens"] / asked.rows}]
    for name, side in found.items():
        if "," in name:
            over = (side["bytes"] - found.get(name.partition(",")[0], side)["bytes"]) / 1e9
            ratio = side["seconds"] / pure["seconds"]
            figures = {
                "seconds": side["seconds"],
                "relative to tokenizing": ratio,
                "GB above 1,000 rows": over,
            }
            table.append({"side": f"{name} step", **figures})
    keep("large_data", table, dtypes="lorafold's default, TRL in bf16")


if __name__ == "__main__":
    main()
