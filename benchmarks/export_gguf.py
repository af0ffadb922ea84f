"""How far llama.cpp is from lorafold with an exported adapter: bases of five types, types of the
adapter, other methods, and what llama.cpp's converter would have written.

    KL = sum_v p log(p / q)    p lorafold's next token in fp32, q llama.cpp's, in nats, over prompts
    share = KL / KL(adapted, base)

The converter is convert_lora_to_gguf.py in llama.cpp's sources, run as it is on lorafold's files.

    python benchmarks/export_gguf.py [--adapter DIR] [--prompts 32] [--converter FILE]
        [--bases F32 Q8_0] [--types BF16]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lib.results import keep
from lib.short import parsed

import lorafold as lf
from lorafold.exporting.engines import run_engine
from lorafold.exporting.gguf_model import write_model
from lorafold.exporting.proof import BUILT_IN_PROMPTS, ReferenceAnswers, compare
from lorafold.exporting.target import Subject
from lorafold.methods import METHODS
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import base_for

BASES = ("F32", "F16", "BF16", "Q8_0", "Q4_1")
TYPES = ("F16", "BF16", "Q8_0")


def quietly(done: int, total: int) -> None: ...


def made(out: Path, spec: object, base: str = "smollm2", **beside: object) -> Path:
    """An adapter whose up factors are noise that changes answers."""
    model = lf.load_model(base, storage="fp32", device="cpu")
    adapter = lf.attach(model, spec, **beside)
    torch.manual_seed(0)
    for name, p in adapter.named_parameters():
        if name.endswith(".B"):
            p.data += 0.005 * torch.randn_like(p)
    return adapter.save(out)


def converted(converter: Path, adapter: Path, out: Path) -> Path:
    """The file that llama.cpp's converter makes of an adapter over SmolLM2.

    Raises RuntimeError with its last line where it refuses the adapter.
    """
    base = base_for("smollm2", [], None, device="cpu").source.path
    command = [sys.executable, str(converter), str(adapter), "--base", str(base)]
    run = subprocess.run(
        [*command, "--outfile", str(out), "--outtype", "f32"], capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    return out


def main(asked: argparse.Namespace) -> None:
    trained, converter = asked.adapter, asked.converter
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        prompts = tmp / "prompts.jsonl"
        lines = BUILT_IN_PROMPTS.read_text().splitlines(keepends=True)
        prompts.write_text("".join(lines[: asked.prompts]))

        def bases(kind: str) -> Path:
            file = tmp / f"base-{kind}.gguf"
            if not file.exists():
                source = base_for("smollm2", [], None, device="cpu").source
                write_model(source.path, file, kind, quietly)
            return file

        def ours(adapters: list[Path]) -> ReferenceAnswers:
            found = open_all(adapters)
            subject = Subject(base_for(None, found, None, device="cpu"), tuple(found))
            return ReferenceAnswers.of(subject, prompts, quietly)

        def measured(
            what: str, own: ReferenceAnswers, file: Path, base: str, tensors: str = "F32"
        ) -> None:
            job = own.job({"base": str(bases(base)), "adapter": str(file)}, tmp)
            found = compare(own.answers, run_engine("llamacpp", job), own.margin)
            row = {
                "adapter": what, "its dtype": tensors, "base": base, "KL": found.kl,
                "largest KL": found.kl_largest, "KL(adapted, base)": found.distance,
                "share of what the adapter changes": f"{found.share or 0:.3%}",
                "same most likely token": f"{found.top}/{found.prompts}",
                "same greedy text": f"{found.greedy}/{found.prompts}",
                "differs at a near tie": found.near,
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)

        def exported(adapters: list[Path], name: str, **options: object) -> Path:
            lf.export(None, adapters, tmp / name, to="gguf", prove=False, device="cpu", **options)
            return tmp / name / "adapter.gguf"

        def beside(what: str, own: ReferenceAnswers, adapter: Path) -> None:
            """What the converter's file of the same adapter comes to."""
            if converter is None:
                return
            try:
                file = converted(converter, adapter, tmp / f"{adapter.name}-converted.gguf")
            except RuntimeError as err:
                rows.append({"adapter": f"{what}, by the converter", "KL": f"refused: {err}"})
                print(rows[-1], flush=True)
            else:
                measured(f"{what}, by the converter", own, file, "F32")

        first = trained or made(tmp / "lora", lf.LoRA(rank=8, alpha=16, dropout=0.0))
        title = f"LoRA, rank 8{', trained' * bool(trained)}"
        own = ours([first])
        plain = exported([first], "plain")
        for kind in asked.bases:
            measured(title, own, plain, kind)
            if kind != "F32":
                bases(kind).unlink()
        for kind in asked.types:
            measured(title, own, exported([first], f"plain-{kind}", tensors=kind), "F32", kind)
        beside(title, own, first)

        low = made(tmp / "low", lf.LoRA(rank=4, alpha=32), targets="attention", name="low")
        high = made(tmp / "high", METHODS["rslora"](rank=16), targets="mlp", name="high")
        lf.compose([low, high], tmp / "mixed", model="smollm2")
        others = {
            "rsLoRA, rank 16": (made(tmp / "rslora", METHODS["rslora"](rank=16, alpha=16)), {}),
            "ranks 4 and 16 in one": (tmp / "mixed", {}),
            "DoRA, --as-lora 32": (made(tmp / "dora", METHODS["dora"]()), {"as_lora": 32}),
        }
        for what, (adapter, options) in others.items():
            own = ours([adapter])
            measured(what, own, exported([adapter], f"{adapter.name}-exported", **options), "F32")
            beside(what, own, adapter)
    keep("export_gguf", rows, dtypes="fp32; base as in the rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--converter", type=Path)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    main(parsed(parser, prompts=2, bases=["F32"], types=["BF16"]))
