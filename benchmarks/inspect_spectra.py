"""What `lorafold lab inspect` costs: spectra at the size of Llama-2-7B, and the whole command on
the embedded model. Linux only.

    python benchmarks/inspect_spectra.py [--rank 16] [--layers 32]

The first table: the singular parts and all figures of the spectrum of LoRA at that rank on the 224
linears of Llama-2-7B, from random factors; no update is formed (the largest would take 180 MB in
fp32). The second: `lorafold lab inspect` of a random adapter on every linear of smollm2, as a
process of its own with everything that it imports, once bare and once with its page. Peaks are of
resident memory.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from lib.results import keep
from lib.short import parsed

import lorafold as lf
from lorafold.inspecting.spectra import advice, effective_rank, entropy_rank, pooled, stable_rank
from lorafold.inspecting.updates import svd_of_factors
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.sources import resolve_model

HIDDEN, MLP = 4096, 11008
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)]


def spectra(rank: int, layers: int) -> dict:
    """Seconds for all sites, and for the slowest."""
    times, used = [], time.process_time()
    for out, inn in SHAPES * layers:
        up, down = torch.randn(out, rank), torch.randn(rank, inn)
        start = time.perf_counter()
        svd = svd_of_factors(up, down)
        for share in (0.9, 0.95, 0.99):
            effective_rank(svd.s, share)
        stable_rank(svd.s), entropy_rank(svd.s)
        advice(rank, pooled([svd.s]))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "target modules": len(times),
        "rank": rank,
        "threads": torch.get_num_threads(),
        "seconds": sum(times),
        "slowest module": max(times),
        "CPU seconds, including random factors": time.process_time() - used,
        "peak GB of the process": peak / 1e9,
    }


def command(adapter: Path, *options: str) -> dict:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "lorafold", "inspect", adapter, *options],
        check=True,
        capture_output=True,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "command": " ".join(["inspect", *(o for o in options if o.startswith("-"))]),
        "seconds": seconds,
        "CPU seconds": used,
        "peak GB": after.ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    asked = parsed(parser, layers=1)
    rank = asked.rank
    large = spectra(rank, asked.layers)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        # over mapped files: what this process holds would count as its children's
        adapter = lf.attach(mapped_model_of(resolve_model("smollm2")).model, lf.LoRA(rank=rank))
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=0.02)
        adapter.save(work / "adapter")
        rows = [
            command(work / "adapter"),
            command(work / "adapter", "--html", str(work / "page.html")),
        ]
    keep("inspect_spectra", [large], rows, dtypes="fp32")


if __name__ == "__main__":
    main()
