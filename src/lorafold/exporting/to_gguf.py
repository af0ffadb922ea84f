"""Exports as GGUF files for llama.cpp and tools built on it: an adapter, or a whole model.

    y = W x + B (A x)      every scale is in B, and alpha is 0: llama.cpp multiplies by alpha / r
                           if alpha is not 0

An adapter is verified on a temporary base in F32, or in F16 if F32 would be large. Types with more
than one scale per block, such as Q4_K_M, are made by llama.cpp's quantizer.
"""

from __future__ import annotations

import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import gguf

from lorafold.errors import LorafoldError, truncate_middle
from lorafold.exporting.gguf_metadata import architecture_of
from lorafold.exporting.gguf_model import (
    FILE_TYPES,
    PLAIN,
    Described,
    MergedParameter,
    described,
    tensors_of_update,
    write_described,
    write_gguf,
    write_model,
)
from lorafold.exporting.plain_lora import OTHER_TEMPLATE, TEMPLATE, base_reference, write_template
from lorafold.exporting.target import Line, Progress, Subject, Target, Written, only_products
from lorafold.models.loading import stored_in_files

FILE = "adapter.gguf"
BASE = "base-gguf"  # the directory of the base in launch lines
JOB = {"adapter": f"{{out}}/{FILE}"}
ADAPTER_TOLERANCE: Mapping[str, float | None] = {"Q8_0": 0.02}


class GgufAdapter(Target):
    engine = "llamacpp"
    tensors = ("F32", "F16", "BF16", "Q8_0")
    tolerance = ADAPTER_TOLERANCE

    @abstractmethod
    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        """Commands that use the file on a base file with options, as in `Written.launch`."""

    def problems(self, subject: Subject) -> Sequence[str]:
        if not subject.adapters:
            return ["found no adapter, expected one; use --to gguf-model for a whole model"]
        row, update = architecture_of(subject.config), subject.update
        reasons = tensors_of_update(update.factors, subject.config, row)[1]
        return [*only_products(update, "a GGUF adapter"), *reasons]

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        row = architecture_of(subject.config)
        tensors, _ = tensors_of_update(subject.update.factors, subject.config, row)
        writer = gguf.GGUFWriter(None, row.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        placed = [MergedParameter.known(name, tensor) for name, tensor in tensors.items()]
        content = Described(writer, placed, ())
        notes = [*write_described(content, directory / FILE, str(subject.tensors), progress)]
        source, options, files = subject.base.source.gguf, ["--jinja"], [FILE]
        if write_template(subject, directory):
            notes.append(OTHER_TEMPLATE)
            options += ["--chat-template-file", f"{{out}}/{TEMPLATE}"]
            files.append(TEMPLATE)
        if source is not None:
            return Written(files, self.use(str(source), options), notes, JOB)
        revision = base_reference(subject.base).revision
        at = f" --revision {revision}" if revision else ""
        model, file = quote(subject.base.name) + at, f"{BASE}/model-F16.gguf"
        made_by = f"lorafold export --model {model} --to gguf-model --out {BASE}  # writes {file}"
        return Written(files, (made_by, *self.use(file, options)), notes, JOB)

    def proving(self, subject: Subject, scratch: Path, progress: Progress) -> Mapping[str, Any]:
        scratch.mkdir(exist_ok=True)
        base = scratch / "base.gguf"
        weights = sum(p.numel() for p in subject.model.parameters())
        kind = "F32" if weights < 1 << 30 else "F16"
        write_model(subject.base.source.path, base, kind, progress)
        return {"base": str(base)}

    def further_jobs(self, subject: Subject) -> Mapping[str, Mapping[str, Any]]:
        gguf = subject.base.source.gguf
        if gguf is None:
            return {}
        return {f"over {gguf.files[0].name}": {"base": str(gguf.files[0])}}


class ToGguf(GgufAdapter):
    name = "gguf"

    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        return (("llama-cli", "-m", base, "--lora", listed_path, *options),)


class ToLlamaCpp(GgufAdapter):
    name = "llama.cpp"

    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        return (
            ("llama-server", "-m", base, "--lora", listed_path, *options),
            'send "lora": [{"id": 0, "scale": 0.0}] with a request to query the base model',
        )


def listed_path(out: str) -> str:
    """The path for --lora, which takes a list: quoted as in CSV if it has a comma or quote."""
    path = f"{out}/{FILE}"
    return '"' + path.replace('"', '""') + '"' if {*path} & {*',"'} else path


QUANTIZER = "llama-quantize"
MIXED = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "IQ4_NL", "IQ4_XS")
# for other types, the share is only reported
TOLERANCE: Mapping[str, float | None] = {
    **dict.fromkeys((*FILE_TYPES, *MIXED)), **dict.fromkeys(PLAIN, 0.01), "Q8_0": 0.02
}  # fmt: skip


def file_of(tensors: str | None) -> str:
    return f"model-{tensors}.gguf"


def write_file(subject: Subject, directory: Path, progress: Progress) -> Sequence[str]:
    tensors = str(subject.tensors)
    if tensors not in MIXED:
        return write_gguf(subject, directory / file_of(tensors), tensors, progress)
    plain = directory / file_of("F32")
    notes = write_gguf(subject, plain, "F32", progress)
    command = [QUANTIZER, str(plain), str(directory / file_of(tensors)), tensors]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        plain.unlink()
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        last = truncate_middle(lines[-1], 160)
        raise LorafoldError(f"{QUANTIZER}: code {done.returncode}: {last}")
    return notes


class GgufModel(Target):
    engine = "llamacpp"
    tensors = (*FILE_TYPES, *MIXED)
    merged = True
    tolerance = TOLERANCE

    def problems(self, subject: Subject) -> Sequence[str]:
        if (held := stored_in_files(subject.base.source)) is not None:
            return [
                f"the model's files have {held} weights; run lorafold merge first, or pass the"
                " unquantized model as --model"
            ]
        if subject.tensors in MIXED and shutil.which(QUANTIZER) is None:
            return [
                f"{subject.tensors} requires llama.cpp's {QUANTIZER}, which is not on PATH; install"
                f" it, or export F16 and run: {QUANTIZER} {file_of('F16')}"
                f" {file_of(subject.tensors)} {subject.tensors}"
            ]
        described(subject, "F16")
        return []


class ToGgufModel(GgufModel):
    name = "gguf-model"

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        file = file_of(subject.tensors)
        notes = write_file(subject, directory, progress)
        launch = (("llama-server", "-m", f"{{out}}/{file}", "--jinja"),)
        return Written((file,), launch, notes, {"base": f"{{out}}/{file}"})
