"""Estimated against the memory of whole processes: each setting is a run of `lorafold train` in a
process of its own, whose peak is compared with the estimate that the run prints.

    python benchmarks/memory_process.py [--only N ...] [--short]

Measured is the peak of the process's anonymous memory (RssAnon, sampled every few milliseconds from
the first import to the exit) and of the mapped files of the model, less the anonymous memory of a
process that has imported the same libraries. Linux only. `over` is the peak over the estimate.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.results import keep
from lib.short import parsed

WORDS = ["quick", "brown", "foxes", "jump", "over", "lazy", "dogs", "while", "seven", "watch"]
IMPORTS = """
import pyarrow, tokenizers, lorafold.cli.command_handlers, lorafold.api.train, lorafold.training.run
from lorafold.layers.bitsandbytes import import_bitsandbytes
from transformers.models.llama import modeling_llama
from transformers import AutoTokenizer, PreTrainedTokenizerFast
import_bitsandbytes()
print(open("/proc/self/status").read().split("RssAnon:")[1].split()[0], flush=True)
"""
STEPS = ["--steps", "2"]
BF16, NF4, INT8, FP32 = (["--storage", name] for name in ("bf16", "nf4", "int8", "fp32"))
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# what is trained on, and the options of `train`
GRID: list[tuple[str, list[str]]] = [
    ("rows", [*BF16, "--method", "rslora", "--rank", "256", "--batch", "4"]),
    ("rows", [*NF4, *(f"--targets={name}" for name in (*LINEARS, "lm_head")), "--batch", "4"]),
    ("rows", [*NF4, "--method", "dora", "--batch", "2"]),
    ("rows", [*FP32, "--method", "full", "--batch", "2"]),
    ("rows", [*BF16, "--method", "full", "--batch", "2", "--set", "gradient_checkpointing=true"]),
    ("rows", [*INT8, "--rank", "8", "--batch", "2"]),
    ("rows", [*FP32, "--method", "vera", "--batch", "2"]),
    ("rows", [*NF4, "--modules-to-save", "lm_head", "--batch", "2"]),
    ("rows", [*NF4, "--method", "lora", "--rank", "64", "--set", "optimizer=adamw8bit"]),
    ("long", [*BF16, "--method", "loha", "--batch", "1"]),
    ("classes", [*NF4, "--objective", "classify", "--batch", "4"]),
    ("pairs", [*BF16, "--objective", "dpo", "--batch", "2"]),
    ("rows", [*FP32, "--method", "ia3", "--batch", "1"]),
    ("rows", [*BF16, "--method", "prompt", "--batch", "2"]),
]


def rows(folder: Path) -> dict[str, Path]:
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    made: dict[str, Any] = {
        "rows": [{"prompt": f"{n} {text(20)}", "completion": f" {text(60)}"} for n in range(32)],
        "long": [{"text": f"{n} {text(500)}"} for n in range(8)],
        "classes": [{"text": f"{n} {text(40)}", "label": "ab"[n % 2]} for n in range(32)],
        "pairs": [
            {"prompt": f"{n} {text(20)}", "chosen": f" {text(40)}", "rejected": f" {text(40)}"}
            for n in range(32)
        ],
    }
    for name, found in made.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    return {name: folder / f"{name}.jsonl" for name in made}


def resident(pid: int) -> int:
    """The bytes of anonymous memory of a process; 0 once it has ended."""
    try:
        return 1024 * int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0])
    except (OSError, IndexError):
        return 0


def mapped(pid: int) -> int:
    """The resident bytes of mapped safetensors files."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_text()
    except OSError:
        return 0
    pages = r"safetensors\nSize:.*?Rss: +(\d+) kB.*?Anonymous: +(\d+) kB"  # written ones: anonymous
    return 1024 * sum(int(all_) - int(own) for all_, own in re.findall(pages, text, re.DOTALL))


def run(data: Path, options: list[str], out: Path) -> tuple[int, int, str]:
    """(bytes at the peak, of which mapped then, what the run printed)."""
    command = [sys.executable, "-m", "lorafold", "train", "--model", "smollm2", "--data", str(data)]
    log = out.with_suffix(".log")
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*command, "--out", str(out), *STEPS, *options], stdout=file, stderr=file
        ) as child,
    ):
        peak, files, now, count = 0, 0, 0, 0
        while child.poll() is None:
            if count % 100 == 0:  # the process waits for it
                now = mapped(child.pid)
            peak, files = max((peak, files), (resident(child.pid) + now, now))
            count += 1
            time.sleep(0.004)
    if child.returncode:
        sys.exit(f"{' '.join(options)}: {log.read_text()[-2000:]}")
    return peak, files, log.read_text()


def in_bytes(text: str) -> float:
    found = re.search(r"memory: ([\d.]+) (\w)B", text)
    assert found is not None, text
    return float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of settings, from 0")
    asked = parsed(parser, only=[5])
    done = subprocess.check_output([sys.executable, "-c", IMPORTS], text=True)
    libraries = 1024 * int(done)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        data = rows(Path(scratch))
        for n, (kind, options) in enumerate(GRID):
            if asked.only is not None and n not in asked.only:
                continue
            peak, files, text = run(data[kind], options, Path(scratch) / f"out{n}")
            peak, estimated = peak - libraries, in_bytes(text)
            found.append(
                {
                    "n": n,
                    "rows": kind,
                    "options": " ".join(options).replace("--", ""),
                    "estimated MB": f"{estimated / 1e6:.0f}",
                    "peak MB": f"{peak / 1e6:.0f}",
                    "of which mapped": f"{files / 1e6:.0f}",
                    "relative to the estimate": f"{peak / estimated:.2f}",
                }
            )
            print(json.dumps(found[-1]), flush=True)
    if asked.only is None or asked.short:
        over = [float(row["relative to the estimate"]) for row in found]
        summary = {"settings": len(over), "most": max(over), "least": min(over)}
        keep("memory_process", found, [summary], dtypes="see the rows")


if __name__ == "__main__":
    main()
