"""What loading a model as NF4 needs: peak memory over an interpreter with everything imported, and
seconds. One JSON object a line, and a table in results/load_memory.json.

    python benchmarks/load_memory.py [--gigabytes 2.2]

smollm2, and a synthetic sharded Llama of random bf16 weights. The bound is the packed model, its
largest block in bf16 and 300 MB; mapped files count as well. Linux only.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from lib.child import watch
from lib.results import keep
from lib.short import parsed
from merge_memory import synthetic

from lorafold.models.checkpoint import open_checkpoint
from lorafold.models.sources import resolve_model

WORK = """
storage = Storage(torch.bfloat16, sys.argv[2] if sys.argv[2] != "bf16" else None)
storages = [t.untyped_storage() for t in load_model(sys.argv[1], storage).state_dict().values()]
kept = {s.data_ptr(): s.nbytes() for s in storages}
print(sum(kept.values()))
"""
IMPORTS = """
from lorafold.models.loading import Storage, load_model
from lorafold.layers.bitsandbytes import import_bitsandbytes
from transformers.models.llama import modeling_llama
import_bitsandbytes()
"""


def measure(label: str, model: Path, base: str) -> dict:
    sizes: dict[str, int] = {}
    entries = open_checkpoint(resolve_model(str(model))).entries
    for name, entry in entries.items():
        if ".layers." in name:
            block = name.split(".layers.")[1].split(".")[0]
            sizes[block] = sizes.get(block, 0) + 2 * torch.Size(entry.shape).numel()
    done = watch(IMPORTS, WORK, str(model), base)
    held = int(done.output.split()[-1])
    bound = held + max(sizes.values()) + 300 * 10**6
    row = {
        "model": label,
        "base": base,
        "files, MB": round(sum(e.size for e in entries.values()) / 1e6),
        "held": round(held / 1e6),
        "peak with mapped files": round(done.resident / 1e6),
        "peak": round(done.anonymous / 1e6),
        "bound": round(bound / 1e6),
        "within": done.resident <= bound,
        "seconds": round(done.seconds, 1),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gigabytes", type=float, default=2.2, help="size of the synthetic model's weights"
    )
    gigabytes = parsed(parser, gigabytes=0.01).gigabytes
    smollm2 = resolve_model("smollm2").path
    rows = [measure("smollm2", smollm2, base) for base in ("bf16", "nf4")]
    with tempfile.TemporaryDirectory() as scratch:
        rows.append(measure("synthetic-llama", synthetic(Path(scratch), gigabytes), "nf4"))
    keep("load_memory", rows, dtypes="see the rows")


if __name__ == "__main__":
    main()
