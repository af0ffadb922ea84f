"""What a step that decodes costs: streams of the base and of adapters, beside the bare reading of
the weights and llama.cpp on the same ones.

    python benchmarks/decoding.py [--threads 1] [--rounds 5] [--new 48] [--storage bf16] [--peer]

The embedded model, prompts of 64 random tokens, greedy, adapters of rank 16 with random factors on
every linear of the blocks. A figure is the median time of a step in which all rows have one token,
in milliseconds, and the median over rounds, in which the cases run in turn. `reading` sums the
weights' bytes with the same threads. `--peer` runs llama.cpp (xllamacpp) in a process of its own,
with the same weights in bf16 and the first adapter, and takes its own figure of a token's time.
Prints a table, which is also written to results/decoding.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request as Post
from urllib.request import urlopen

import torch
from lib.results import keep
from lib.short import parsed

import lorafold as lf
from lorafold.engine import Engine, Request

PROMPT, MANY = 64, 16
CASES: dict[str, Sequence[int | None]] = {
    "1, base": [None],
    "1, adapter": [0],
    "16, base": [None] * MANY,
    "16, one adapter": [0] * MANY,
    "16, distinct": range(MANY),
    "64, one adapter": [0] * 4 * MANY,
}


def prompt(seed: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1000, 40_000, (PROMPT,), generator=draw).tolist())


def step_ms(engine: Engine, names: list[str | None], new: int) -> float:
    """The median time of a step in which every request has one token to compute."""
    asked = [Request(str(i), prompt(i), new, name) for i, name in enumerate(names)]
    streams, times = [engine.submit(request) for request in asked], []
    while any(stream.ended is None for stream in streams):
        decoding = all(stream.so_far() and stream.ended is None for stream in streams)
        start = time.perf_counter()
        engine.step()
        if decoding:
            times.append(time.perf_counter() - start)
    assert all(len(stream.result().tokens) == new for stream in streams)
    return 1e3 * statistics.median(times)


def reading_ms(nbytes: int) -> float:
    weights = torch.ones(nbytes // 8, dtype=torch.int64)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        weights.sum()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def llama_cpp(model: str, adapter: str, threads: int, new: int) -> float:
    """The time of a token in milliseconds, by llama.cpp's own clock."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = model, 1024, 1
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    params.cache_ram_mib, params.cache_prompt, params.ui, params.verbosity = 0, False, False, 1
    for each in (params.cpuparams, params.cpuparams_batch):
        each.n_threads = threads
    server = xllamacpp.Server(params)
    body = {"prompt": prompt(0), "n_predict": new, "ignore_eos": True, "temperature": 0}
    url, data = f"{server.listening_address}/completion", json.dumps(body).encode()
    found = []
    for _ in range(2):  # the first warms up
        with urlopen(Post(url, data, {"Content-Type": "application/json"})) as answer:
            found.append(json.load(answer)["timings"])
    assert found[-1]["predicted_n"] == new, found
    return float(found[-1]["predicted_per_token_ms"])


def files(model: Any, folder: Path) -> tuple[list[Path], str, str]:
    """The adapters, and the model and the first adapter as GGUF files."""
    paths = []
    for i in range(MANY):
        torch.manual_seed(i)
        adapter = lf.attach(model, lf.LoRA(rank=16, dropout=0.0), name="it")
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=0.02)
        paths.append(adapter.save(folder / str(i)))
        adapter.detach()
    return paths, str(folder / "base"), str(folder / "lora")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--storage", default="bf16")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--llama-cpp", nargs=2, metavar=("MODEL", "ADAPTER"), help="internal")
    asked = parsed(parser, rounds=1, new=16)
    if asked.llama_cpp:
        gguf, lora = asked.llama_cpp
        print(llama_cpp(gguf, lora, asked.threads, asked.new))
        return
    torch.set_num_threads(asked.threads)
    model = lf.load_model("smollm2", storage=asked.storage)
    nbytes = sum(p.nbytes for p in model.parameters())
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, base, lora = files(model, folder)
        if asked.peer:
            lf.export("smollm2", out=base, to="gguf-model", tensors="BF16", prove=False)
            lf.export("smollm2", paths[0], out=lora, to="llama.cpp", tensors="F16", prove=False)
            [base], [lora] = (map(str, Path(where).glob("*.gguf")) for where in (base, lora))
        with Engine(model, slots=4 * MANY, length=512, prefix_reuse=False) as engine:
            for i, path in enumerate(paths):
                engine.load(str(i), path)
            for _ in range(asked.rounds):
                if asked.peer:  # after it, both threads share a core for some seconds
                    step_ms(engine, [None] * 4 * MANY, asked.new)
                times["reading"].append(reading_ms(nbytes))
                for case, adapters in CASES.items():
                    names = [None if i is None else str(i) for i in adapters]
                    times[f"lorafold: {case}"].append(step_ms(engine, names, asked.new))
                for case, adapter in {"1, base": "", "1, adapter": lora}.items():
                    if asked.peer:
                        command = [sys.executable, __file__, "--llama-cpp", base, adapter]
                        command += ["--threads", str(asked.threads), "--new", str(asked.new)]
                        done = subprocess.run(command, capture_output=True, check=True)
                        times[f"llama.cpp: {case}"].append(float(done.stdout.split()[-1]))
    settings = {"threads": asked.threads, "storage": asked.storage}
    rows = []
    for case, found in times.items():
        ms, streams = statistics.median(found), len(CASES.get(case.partition(": ")[2], [None]))
        rows.append(settings | {"case": case, "ms": ms, "tokens/s": 1e3 * streams / ms})
    keep("decoding", rows, dtypes=asked.storage)


if __name__ == "__main__":
    main()
