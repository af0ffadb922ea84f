"""Several processes of one run beside one: memory of each, and tokens a second.

    python benchmarks/processes.py [--sides memory,speed] [--counts 1,2,4] [--layers 24]
    python benchmarks/processes.py --sides loading --counts 4

memory: a random Llama of --layers blocks in the proportions of one of 8 billion parameters (width
1,024, two tables of 16,384 tokens; 24 blocks: 342 million, in bf16 files) is trained with
`--strategy fsdp`, three steps of 4 rows of 32 tokens: all weights in fp32, and a LoRA of rank 16
over NF4. Peaks are of the memory that a process has of its own (RssAnon, sampled every 50 ms), less
that of a process which trains a model of one small block, which is what the libraries take.

loading: until that model is divided, the memory of all processes together, less that of loading the
small model: what is in no file (anonymous and shared, of smaps_rollup's Pss), over the bytes of the
files and over those of the weights as they are stored; and with the mapped pages of files, each
counted once.

speed: `--strategy ddp`, LoRA of rank 16 on the embedded model in bf16, two processes of one thread
beside one process of two, in turn; medians.

Prints JSON lines and tables, which are also written to results/processes_*.json. Linux only.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lib.finished import paths
from lib.results import keep
from lib.short import parsed
from lib.work import same_work
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafold.models.sources import resolve_model

WORDS = "the river turns north where old mills stand and children count boats under a red bridge"
BYTES = [*pre_tokenizers.ByteLevel.alphabet(), "<pad>", "<end>"]
VOCABULARY = 16384
RUNS = {"full, fp32": ("full", "fp32"), "LoRA r = 16, NF4": ("lora", "nf4")}
LOADED = "strategy fsdp"  # the line that follows loading


def model_of(directory: Path, layers: int, width: int) -> Path:
    """A random model in bf16, with a tokenizer of bytes."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({c: i for i, c in enumerate(BYTES)}, [])),
        bos_token=BYTES[-1], eos_token=BYTES[-1], pad_token=BYTES[-2],
    )  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width,
        intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, head_dim=max(width // 16, 8), tie_word_embeddings=False,
        max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def rows_of(file: Path, count: int, words: int) -> Path:
    draw, known = random.Random(0), WORDS.split()
    rows = [{"text": " ".join(draw.choices(known, k=words))} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Watched:
    """What the processes of a command take, while it runs."""

    def __init__(self, mark: str) -> None:
        self.mark, self.own = mark, dict[int, int]()
        self._until, self._pids = 0.0, list[Path]()
        self.stored = float("nan")  # bytes of the weights, as a run that divides them says
        self.together = self.mapped = 0  # bytes until the model is divided, and with those of files

    def _found(self) -> list[Path]:
        """The processes that compute, looked for once a second."""
        if time.monotonic() > self._until:
            self._until, self._pids = time.monotonic() + 1, []
            for at in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    command = (at / "cmdline").read_bytes()
                    if self.mark.encode() in command and b"distributed.run" not in command:
                        self._pids.append(at)
        return self._pids

    def look(self, loading: bool) -> None:
        together = mapped = 0
        for at in self._found():
            try:
                status = dict(
                    line.split(":", 1) for line in (at / "status").read_text().splitlines()
                )
                if loading:
                    text = (at / "smaps_rollup").read_text()
                    pss = dict(line.split(":", 1) for line in text.splitlines()[1:])
                    own, file = (
                        sum(int(pss[f"Pss_{kind}"].split()[0]) * 1024 for kind in kinds)
                        for kinds in (("Anon", "Shmem"), ("File",))
                    )
                    together, mapped = together + own, mapped + own + file
            except (OSError, ValueError, KeyError):
                continue
            bytes_own = int(status.get("RssAnon", "0 kB").split()[0]) * 1024
            pid = int(at.name)
            self.own[pid] = max(self.own.get(pid, 0), bytes_own)
        self.together, self.mapped = max(self.together, together), max(self.mapped, mapped)


def run(count: int, threads: int, *command: str) -> tuple[dict[str, Any], Watched]:
    """Run `lorafold train` in so many processes, and watch them."""
    with tempfile.TemporaryDirectory() as where:
        out = Path(where) / "out"
        launch = [sys.executable, "-m"]
        if count > 1:
            launch += ["torch.distributed.run", "--nproc_per_node", str(count), "-m"]
        asked = [*launch, "lib.work", "train", *command, "--out", str(out), "--json"]
        watched = Watched(str(out))
        own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths()}
        environment = os.environ | own
        with (Path(where) / "said").open("w+") as said, (Path(where) / "json").open("w+") as out_of:
            child = subprocess.Popen(asked, stdout=out_of, stderr=said, env=environment)
            loading = True
            while child.poll() is None:
                if loading:
                    loading = LOADED not in (Path(where) / "said").read_text()
                watched.look(loading)
                time.sleep(0.05)
            text = (Path(where) / "said").read_text()
            if child.returncode:
                raise SystemExit(text)
            told = re.search(r"keeps .*? of ([\d.]+) (\w)B of weights", " ".join(text.split()))
            if told is not None:
                watched.stored = float(told[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[told[2]]
            lines = [json.loads(line) for line in (Path(where) / "json").read_text().splitlines()]
            result = next(line for line in lines if "train_loss" in line)
            shares = [line["work"]["targets"] for line in lines]  # of each process
            return result | {"work": result["work"] | {"targets": sum(shares)}}, watched


def memory(
    names: list[str], counts: list[int], layers: int, width: int, where: Path
) -> list[dict[str, Any]]:
    """Peaks of each process, by run and number of processes."""
    rows = rows_of(where / "rows.jsonl", 12, 30)
    small = model_of(where / "small", 1, 128)
    model = model_of(where / "model", layers, width)
    size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    found = []
    for name in names:
        method, storage = RUNS[name]
        work = {}
        asked = ("--data", str(rows), "--method", method, "--set", f"storage={storage}")
        asked += ("--set", "steps=3", "--batch", "4", "--set", "max_length=32")
        asked += ("--rank", "16") * (method == "lora")
        asked += ("--device", "cpu", "--strategy", "fsdp", "--set", "optimizer=adamw")
        for count in counts:
            _, bare = run(count, 1, "--model", str(small), *asked)
            result, watched = run(count, 1, "--model", str(model), *asked)
            work[f"{count} processes"] = result["work"]
            same_work(work)
            libraries = max(bare.own.values())
            found.append(
                {
                    "run": name, "processes": count, "libraries": libraries,
                    "peak": max(watched.own.values()) - libraries,
                    "loading": watched.together - bare.together, "files": size,
                    "with mapped pages": watched.mapped - bare.mapped, "stored": watched.stored,
                    "loss": result["train_loss"], "tokens_per_second": result["tokens_per_second"],
                }
            )  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def speed(rounds: int, where: Path) -> dict[str, list[float]]:
    """Tokens a second of one process and of two."""
    rows = rows_of(where / "rows.jsonl", 64, 200)
    source = resolve_model("smollm2")
    asked = ("--model", source.name, "--data", str(rows), "--batch", "8", "--rank", "16")
    asked += ("--set", "storage=bf16", "--set", "steps=8", "--device", "cpu")
    found: dict[str, list[float]] = {"1": [], "2": []}
    work = {}
    for _ in range(rounds):
        for count in (1, 2):
            result, _ = run(count, 2 // count, *asked)
            work[f"{count} processes"] = result["work"]
            found[str(count)].append(result["tokens_per_second"])
            print(json.dumps({"processes": count, "tokens/s": found[str(count)][-1]}), flush=True)
        same_work(work)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="memory,speed")
    parser.add_argument("--counts", default="1,2,4")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    asked = parsed(
        parser,
        sides="loading,speed",
        counts="2",
        layers=1,
        width=128,
        rounds=1,
        runs=["LoRA r = 16, NF4"],
    )
    with tempfile.TemporaryDirectory() as where:
        if {"memory", "loading"} & set(asked.sides.split(",")):
            counts = [int(n) for n in asked.counts.split(",")]
            found = memory(asked.runs, counts, asked.layers, asked.width, Path(where))
            alone = {one["run"]: one["peak"] for one in found if one["processes"] == 1}
            table = [
                {
                    "run": one["run"], "processes": one["processes"],
                    "peak per process, MB": f"{one['peak'] / 1e6:,.0f}",
                    "relative to one process": one["peak"] / alone.get(one["run"], float("nan")),
                    "libraries, MB": f"{one['libraries'] / 1e6:,.0f}",
                }
                for one in found
            ]  # fmt: skip
            if "memory" in asked.sides:
                keep("processes_memory", table, dtypes="see the rows")
            shown = [
                {
                    "run": one["run"], "processes": one["processes"],
                    "while loading, MB": f"{one['loading'] / 1e6:,.0f}",
                    "relative to the files": one["loading"] / one["files"],
                    "relative to the stored weights": one["loading"] / one["stored"],
                    "with mapped pages": one["with mapped pages"] / one["files"],
                }
                for one in found
            ]  # fmt: skip
            keep("processes_loading", shown, dtypes="see the rows")
        if "speed" in asked.sides:
            rates = speed(asked.rounds, Path(where))
            ratios = [b / a for a, b in zip(rates["1"], rates["2"], strict=True)]
            row = {
                "one process with two threads, tokens/s": statistics.median(rates["1"]),
                "two processes with one thread, tokens/s": statistics.median(rates["2"]),
                "speed-up": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            }  # fmt: skip
            keep("processes_speed", [row], dtypes="bf16")


if __name__ == "__main__":
    main()
