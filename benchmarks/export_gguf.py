"""How far llama.cpp is from lorafold with an exported adapter: bases of five types, types of the
adapter, other methods, and what llama.cpp's converter would have written.

    KL = sum_v p log(p / q)    p lorafold's next token in fp32, q llama.cpp's, in nats, over prompts
    share = KL / KL(adapted, base)

The converter's rule, as convert_lora_to_gguf.py has it: factors as they are, and alpha, which
llama.cpp divides by the rank; rsLoRA's root and ranks of single modules are not asked for.

    python benchmarks/export_gguf.py [--adapter DIR] [--prompts 32]
"""

import argparse
import json
import tempfile
from pathlib import Path

import gguf
import torch
from lib.results import keep

import lorafold as lf
from lorafold.exporting.answers import BUILT_IN
from lorafold.exporting.engines import ask
from lorafold.exporting.gguf_model import write_model
from lorafold.exporting.ours import Ours
from lorafold.exporting.proof import proof
from lorafold.exporting.target import Subject
from lorafold.methods import METHODS
from lorafold.opening import base_for
from lorafold.peft.saved import open_all

BASES = ("F32", "F16", "BF16", "Q8_0", "Q4_1")
TYPES = ("F16", "BF16", "Q8_0")


def quietly(done: int, total: int) -> None: ...


def made(out: Path, spec: object, **beside: object) -> Path:
    """An adapter whose up factors are noise that changes answers."""
    model = lf.load_model("smollm2", storage="fp32", device="cpu")
    adapter = lf.attach(model, spec, **beside)
    torch.manual_seed(0)
    for name, p in adapter.named_parameters():
        if name.endswith(".B"):
            p.data += 0.005 * torch.randn_like(p)
    return adapter.save(out)


def as_converted(adapter: Path, exported: Path, out: Path) -> Path:
    """The exported file by the converter's rule: every scale a plain alpha / rank."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    own = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1.0)
    reader, writer = gguf.GGUFReader(exported), gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
    for tensor in reader.tensors:
        up = tensor.name.endswith(".lora_b")
        writer.add_tensor(tensor.name, tensor.data / own if up else tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def main(trained: Path | None, prompts: int) -> None:
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        asked = tmp / "prompts.jsonl"
        asked.write_text("".join(BUILT_IN.read_text().splitlines(keepends=True)[:prompts]))

        def bases(kind: str) -> Path:
            file = tmp / f"base-{kind}.gguf"
            if not file.exists():
                source = base_for("smollm2", [], None, device="cpu").source
                write_model(source.path, file, kind, quietly)
            return file

        def ours(adapters: list[Path]) -> Ours:
            found = open_all(adapters)
            subject = Subject(base_for(None, found, None, device="cpu"), tuple(found))
            return Ours.of(subject, asked, quietly)

        def measured(what: str, own: Ours, file: Path, base: str, tensors: str = "F32") -> None:
            job = own.job({"base": str(bases(base)), "adapter": str(file)}, tmp)
            found = proof(own.answers, ask("llamacpp", job), own.margin)
            row = {
                "adapter": what, "its tensors": tensors, "base": base, "KL": found.kl,
                "largest": found.kl_largest, "KL(adapted, base)": found.distance,
                "share": f"{found.share or 0:.3%}", "likeliest": f"{found.top}/{found.prompts}",
                "greedy": f"{found.greedy}/{found.prompts}", "as good as equal": found.near,
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)

        def exported(adapters: list[Path], name: str, **options: object) -> Path:
            lf.export(None, adapters, tmp / name, to="gguf", prove=False, device="cpu", **options)
            return tmp / name / "adapter.gguf"

        first = trained or made(tmp / "lora", lf.LoRA(rank=8, alpha=16, dropout=0.0))
        title = f"LoRA, rank 8{', trained' * bool(trained)}"
        own = ours([first])
        plain = exported([first], "plain")
        for kind in BASES:
            measured(title, own, plain, kind)
            if kind != "F32":
                bases(kind).unlink()
        for kind in TYPES:
            measured(title, own, exported([first], f"plain-{kind}", tensors=kind), "F32", kind)

        rooted = made(tmp / "rslora", METHODS["rslora"](rank=16, alpha=16))
        own, file = ours([rooted]), exported([rooted], "rooted")
        measured("rsLoRA, rank 16", own, file, "F32")
        measured(
            "the same by the converter's rule", own,
            as_converted(rooted, file, tmp / "converted.gguf"), "F32",
        )  # fmt: skip
        low = made(tmp / "low", lf.LoRA(rank=4, alpha=32), targets="attention", name="low")
        high = made(tmp / "high", METHODS["rslora"](rank=16), targets="mlp", name="high")
        own = ours([low, high])
        measured("two, ranks 4 and 16", own, exported([low, high], "two"), "F32")
        dora = made(tmp / "dora", METHODS["dora"]())
        cut = exported([dora], "cut", as_lora=32)
        measured("DoRA, --as-lora 32", ours([dora]), cut, "F32")
    keep("export_gguf", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    given = parser.parse_args()
    main(given.adapter, given.prompts)
