"""Exports as GGUF files for llama.cpp and tools built on it: an adapter, or a whole model.

    y = W x + B (A x)      every scale is in B, and alpha is 0: llama.cpp multiplies by alpha / r
                           if alpha is not 0

An adapter is verified on a temporary F32 file of the base, or F16 from 2^30 parameters on. Types
with more than one scale per block, such as Q4_K_M, are written by llama.cpp's quantizer.
"""

from __future__ import annotations

import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import ClassVar

import gguf

from lorafold.errors import LorafoldError, truncate_middle
from lorafold.exporting.gguf_metadata import architecture_of
from lorafold.exporting.gguf_model import (
    FILE_TYPES,
    FLOAT_TYPES,
    GgufContent,
    MergedParameter,
    adapter_tensors,
    gguf_content,
    write_content,
    write_gguf,
    write_model,
)
from lorafold.exporting.plain_lora import OTHER_TEMPLATE, TEMPLATE, base_reference, write_template
from lorafold.exporting.target import (
    ExportedFiles,
    Job,
    Line,
    Progress,
    Subject,
    Target,
    lora_problems,
)
from lorafold.models.loading import prequantized_storage

ADAPTER_FILE = "adapter.gguf"
BASE_DIR = "base-gguf"  # the directory of the base in launch lines
JOB = {"adapter": f"{{out}}/{ADAPTER_FILE}"}


class GgufAdapter(Target):
    engine = "llamacpp"
    tensors = ("F32", "F16", "BF16", "Q8_0")
    tolerance: ClassVar[Mapping[str, float | None]] = {"Q8_0": 0.02}

    @abstractmethod
    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        """Commands that run the adapter on a GGUF base, as in `ExportedFiles.launch`."""

    def problems(self, subject: Subject) -> Sequence[str]:
        if not subject.adapters:
            return ["found no adapter, expected one; use --to gguf-model for a whole model"]
        arch, update = architecture_of(subject.config), subject.update
        reasons = adapter_tensors(update.factors, subject.config, arch)[1]
        return [*lora_problems(update, "a GGUF adapter"), *reasons]

    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        arch = architecture_of(subject.config)
        tensors, _ = adapter_tensors(subject.update.factors, subject.config, arch)
        writer = gguf.GGUFWriter(None, arch.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        placed = [MergedParameter.known(name, tensor) for name, tensor in tensors.items()]
        content = GgufContent(writer, placed, ())
        notes = [*write_content(content, directory / ADAPTER_FILE, str(subject.tensors), progress)]
        source, options, files = subject.base.source.gguf, ["--jinja"], [ADAPTER_FILE]
        if write_template(subject, directory):
            notes.append(OTHER_TEMPLATE)
            options += ["--chat-template-file", f"{{out}}/{TEMPLATE}"]
            files.append(TEMPLATE)
        if source is not None:
            return ExportedFiles(files, self.use(str(source), options), notes, JOB)
        revision = base_reference(subject.base).revision
        at = f" --revision {revision}" if revision else ""
        model, file = quote(subject.base.name) + at, f"{BASE_DIR}/model-F16.gguf"
        command = f"lorafold export --model {model} --to gguf-model --out {BASE_DIR}"
        launch = (f"{command}  # writes {file}", *self.use(file, options))
        return ExportedFiles(files, launch, notes, JOB)

    def proof_job(self, subject: Subject, scratch: Path, progress: Progress) -> Job:
        scratch.mkdir(exist_ok=True)
        base = scratch / "base.gguf"
        tensors = "F32" if sum(p.numel() for p in subject.model.parameters()) < 1 << 30 else "F16"
        write_model(subject.base.source.path, base, tensors, progress)
        return {"base": str(base)}

    def further_jobs(self, subject: Subject) -> Mapping[str, Job]:
        files = subject.base.source.gguf.files[:1] if subject.base.source.gguf else ()
        return {f"over {file.name}": {"base": str(file)} for file in files}


class ToGguf(GgufAdapter):
    name = "gguf"

    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        return (("llama-cli", "-m", base, "--lora", lora_option, *options),)


class ToLlamaCpp(GgufAdapter):
    name = "llama.cpp"

    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        return (
            ("llama-server", "-m", base, "--lora", lora_option, *options),
            'send "lora": [{"id": 0, "scale": 0.0}] with a request to query the base model',
        )


def lora_option(out: str) -> str:
    """The path for --lora. The option takes a comma-separated list, so a path with a comma or quote
    is quoted as in CSV.
    """
    path = f"{out}/{ADAPTER_FILE}"
    return '"' + path.replace('"', '""') + '"' if {*path} & {*',"'} else path


QUANTIZER = "llama-quantize"
MIXED_TYPES = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "IQ4_NL", "IQ4_XS")
# for other types, the share is only reported
TOLERANCE: Mapping[str, float | None] = {
    **dict.fromkeys((*FILE_TYPES, *MIXED_TYPES)), **dict.fromkeys(FLOAT_TYPES, 0.01), "Q8_0": 0.02
}  # fmt: skip


def model_file(tensors: str | None) -> str:
    return f"model-{tensors}.gguf"


def write_file(subject: Subject, directory: Path, progress: Progress) -> Sequence[str]:
    tensors = str(subject.tensors)
    if tensors not in MIXED_TYPES:
        return write_gguf(subject, directory / model_file(tensors), tensors, progress)
    plain = directory / model_file("F32")
    notes = write_gguf(subject, plain, "F32", progress)
    command = [QUANTIZER, str(plain), str(directory / model_file(tensors)), tensors]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        plain.unlink()
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        last = truncate_middle(lines[-1], 160)
        raise LorafoldError(f"{QUANTIZER}: exited with code {done.returncode}: {last}")
    return notes


class GgufModel(Target):
    engine = "llamacpp"
    tensors = (*FILE_TYPES, *MIXED_TYPES)
    merged = True
    tolerance = TOLERANCE

    def problems(self, subject: Subject) -> Sequence[str]:
        if (held := prequantized_storage(subject.base.source)) is not None:
            return [
                f"the model's files have {held} weights; run lorafold merge first, or pass the"
                " unquantized model as --model"
            ]
        if subject.tensors in MIXED_TYPES and shutil.which(QUANTIZER) is None:
            return [
                f"{subject.tensors} requires llama.cpp's {QUANTIZER}, which is not on PATH; install"
                f" it, or export F16 and run: {QUANTIZER} {model_file('F16')}"
                f" {model_file(subject.tensors)} {subject.tensors}"
            ]
        gguf_content(subject, "F16")
        return []


class ToGgufModel(GgufModel):
    name = "gguf-model"

    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        file = model_file(subject.tensors)
        notes = write_file(subject, directory, progress)
        launch = (("llama-server", "-m", f"{{out}}/{file}", "--jinja"),)
        return ExportedFiles((file,), launch, notes, {"base": f"{{out}}/{file}"})
