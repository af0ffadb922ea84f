"""What merged models lose as GGUF files in llama.cpp: KL of its distribution of the next token from
lorafold's adapted model in fp32 over 32 prompts, greedy texts, seconds and bytes. One JSON object a
line.

    python benchmarks/export_models.py [ADAPTER] [--model smollm2] [--quantizer PROGRAM]
        [--tensors F16 Q8_0]

Without an adapter it is LoRA with random factors. PROGRAM IN.gguf OUT.gguf NUMBER is llama.cpp's
own quantizer (llama-quantize takes the number of a type too). It quantizes the F16 file that was
written here: `same` counts the tensors that have the same bytes in both, and its KL is asked for
where some differ.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from export_gguf import made
from lib.results import markdown
from lib.short import parsed

import lorafold as lf
from lorafold.exporting.engines import run_engine
from lorafold.exporting.gguf_model import FILE_TYPES
from lorafold.exporting.proof import ReferenceAnswers, compare
from lorafold.exporting.target import Subject
from lorafold.exporting.to_gguf import model_file, write_file
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base

ENGINE = "llamacpp"


def quietly(done: int, total: int) -> None: ...


def same(ours: Path, theirs: Path) -> tuple[int, int]:
    """The tensors with the same bytes, and all."""
    found = {t.name: t for t in gguf.GGUFReader(theirs).tensors}
    own = gguf.GGUFReader(ours).tensors
    alike = [
        t.tensor_type == found[t.name].tensor_type and np.array_equal(t.data, found[t.name].data)
        for t in own
    ]
    return sum(alike), len(alike)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, nargs="?")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantizer")
    parser.add_argument("--tensors", nargs="+", default=["F16", "Q8_0", "Q4_0"])
    args = parsed(parser, tensors=["F16"])
    with tempfile.TemporaryDirectory() as folder:
        lora = lf.LoRA(rank=8, alpha=16, dropout=0.0)
        path = args.adapter or made(Path(folder) / "adapter", lora, args.model)
        measured(args, (SavedAdapter.open(path),), Path(folder))


def measured(args: argparse.Namespace, adapters: tuple[SavedAdapter, ...], out: Path) -> None:
    """Print a line for each type of tensors."""
    base = Base(args.model, device="cpu")
    ours = ReferenceAnswers.of(Subject(base, adapters), None, quietly)

    def told(file: Path) -> dict:
        theirs = run_engine(ENGINE, ours.job({"base": str(file)}, file.parent))
        found = compare(ours.answers, theirs, ours.margin)
        names = ("kl", "kl_largest", "distance", "share", "top", "greedy", "near", "gap")
        about = found.as_json() | {"share": found.share}
        counts = {n: len(about[n]) for n in ("other_tokens", "other_texts")}
        return {n: about[n] for n in names} | counts | {"engine": theirs.version}

    table = []
    for tensors in dict.fromkeys(["F16", *args.tensors]):
        start = time.perf_counter()
        write_file(Subject(base, adapters, tensors), out, quietly)
        seconds, file = time.perf_counter() - start, out / model_file(tensors)
        line = {"tensors": tensors, "seconds": round(seconds, 1), "bytes": file.stat().st_size}
        if args.quantizer and tensors.startswith("Q"):
            theirs = out / "theirs.gguf"
            number = str(int(gguf.LlamaFileType[FILE_TYPES[tensors]]))
            command = [args.quantizer, str(out / model_file("F16")), str(theirs), number]
            subprocess.run(command, check=True, capture_output=True)
            line["same"], line["of"] = same(file, theirs)
            if line["same"] < line["of"]:
                line["kl_of_quantizer"] = told(theirs)["kl"]
        table.append(line | told(file))
        print(json.dumps(table[-1]), flush=True)
    print("\n" + markdown(table))


if __name__ == "__main__":
    main()
