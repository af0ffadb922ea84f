"""What a fold needs: peak anonymous memory over an interpreter with everything imported, and
seconds. One JSON object a line, and a table in results/merge_memory.json. Linux only.

    python benchmarks/merge_memory.py [--gigabytes 2.2]

The fold (certificate aside) of LoRA of rank 16 on every linear, head included, into a synthetic
sharded Llama of random bf16 weights and into smollm2, whose head is tied to its embedding. The
bound is three times the largest tensor in fp32 plus 300 MB. Each runs in a process of its own,
which reports what it has with everything imported. Pages of mapped files, which the kernel takes
back whenever it likes, don't count.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from lib.child import watch
from lib.results import keep
from lib.short import parsed
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from lorafold.models.checkpoint import build, open_checkpoint
from lorafold.models.sources import resolve_model

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
IMPORTS = """
import lorafold as lf
import lorafold.merging.run
from transformers.models.llama import modeling_llama
"""
WORK = """
result = lf.merge(sys.argv[1], [sys.argv[2]], sys.argv[3], certificate=False)
print(result.folded.stats.survival)
"""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def synthetic(path: Path, gigabytes: float) -> Path:
    """A Llama of about that size, written a layer a shard."""
    one = LlamaConfig(**SHAPE, num_hidden_layers=1)
    shapes = {name: tuple(p.shape) for name, p in build(one, False).named_parameters()}
    layer = sum(
        2 * torch.Size(shape).numel() for name, shape in shapes.items() if ".layers." in name
    )
    rest = sum(
        2 * torch.Size(shape).numel() for name, shape in shapes.items() if ".layers." not in name
    )
    layers = max(1, round((gigabytes * 1e9 - rest) / layer))
    LlamaConfig(
        **SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    ).save_pretrained(path)
    groups = [{n: s for n, s in shapes.items() if ".layers." not in n}]
    groups += [
        {n.replace(".layers.0.", f".layers.{i}."): s for n, s in shapes.items() if ".layers." in n}
        for i in range(layers)
    ]
    files = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        save_file(
            {n: (0.02 * torch.randn(s)).bfloat16() for n, s in group.items()},
            path / file,
            metadata={"format": "pt"},
        )
        files.update(dict.fromkeys(group, file))
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    return path


def random_adapter(model: Path, path: Path, rank: int = 16) -> Path:
    """A LoRA adapter in PEFT's format on every linear, the head included: the largest tensor is
    among those that change.
    """
    path.mkdir()
    tensors = {}
    for name, p in build(AutoConfig.from_pretrained(model), False).named_parameters(
        remove_duplicate=False
    ):
        if (module := name.removesuffix(".weight")).endswith(LINEARS):
            out, inn = p.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inn) / inn**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank) * 0.02
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(LINEARS),
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def measure(label: str, model: Path, work: Path) -> dict:
    entries = open_checkpoint(resolve_model(str(model))).entries.values()
    largest = 4 * max(torch.Size(e.shape).numel() for e in entries)
    adapter = random_adapter(model, work / f"{label}-adapter")
    work_of = (str(model), str(adapter), str(work / f"{label}-merged"))
    done = watch(IMPORTS, WORK, *work_of)
    bound = 3 * largest + 300 * 10**6
    row = {
        "model": label,
        "weights, MB": round(sum(e.size for e in entries) / 1e6),
        "largest tensor in fp32": round(largest / 1e6),
        "peak": round(done.anonymous / 1e6),
        "bound": round(bound / 1e6),
        "within": done.anonymous <= bound,
        "seconds": round(done.seconds, 1),
        "update survives": round(float(done.output), 4),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gigabytes", type=float, default=2.2, help="size of the synthetic model's weights"
    )
    gigabytes = parsed(parser, gigabytes=0.01).gigabytes
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "llama").mkdir()
        models = {
            "smollm2": resolve_model("smollm2").path,
            "synthetic-llama": synthetic(work / "llama", gigabytes),
        }
        keep(
            "merge_memory",
            [measure(label, path, work) for label, path in models.items()],
            dtypes="bf16",
        )


if __name__ == "__main__":
    main()
