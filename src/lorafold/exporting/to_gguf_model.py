"""Exports a whole model as one GGUF file, which llama.cpp and all that is built on it take.

Adapters go in folded: a file of its own for the adapter is another target. Types with more than a
scale a block, such as Q4_K_M, are llama.cpp's own quantizer's work, which is called where it is
found.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lorafold.errors import LorafoldError, shortened
from lorafold.exporting.gguf_model import FILE_TYPES, Content, described, write_content
from lorafold.exporting.gguf_tensors import PLAIN
from lorafold.exporting.target import Progress, Subject, Target, Written
from lorafold.models.loading import stored_in_files

QUANTIZER = "llama-quantize"
MIXED = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "IQ4_NL", "IQ4_XS")
# of other types than these the share is told and refuses nothing
TOLERANCE: Mapping[str, float | None] = {
    **dict.fromkeys((*FILE_TYPES, *MIXED)), **dict.fromkeys(PLAIN, 0.01), "Q8_0": 0.02
}  # fmt: skip


def file_of(tensors: str | None) -> str:
    """The name of the file."""
    return f"model-{tensors}.gguf"


def problems_of(subject: Subject) -> Sequence[str]:
    """Why a model can't be said as a GGUF file, a line each."""
    if (held := stored_in_files(subject.base.source)) is not None:
        return [
            f"the model's files have {held} weights; run lorafold merge first, or name the model"
            " that it was quantized from"
        ]
    if subject.tensors in MIXED and shutil.which(QUANTIZER) is None:
        return [
            f"{subject.tensors} is the work of llama.cpp's {QUANTIZER}, which is not on PATH; write"
            f" F16 and run: {QUANTIZER} {file_of('F16')} {file_of(subject.tensors)}"
            f" {subject.tensors}"
        ]
    try:
        described(_content(subject), "F16")
    except LorafoldError as error:
        return [str(error)]
    return []


def _content(subject: Subject) -> Content:
    name, source = Path(subject.base.name).name, subject.base.source
    model: Any = subject.model
    return Content(model, subject.names, source.path, subject.tokenizer, name)


def write_gguf(subject: Subject, directory: Path, progress: Progress) -> Sequence[str]:
    """Write the file of a subject into a directory; as `write_content`, which has the notes."""
    asked, content = str(subject.tensors), _content(subject)
    if asked not in MIXED:
        return write_content(content, directory / file_of(asked), asked, progress)
    plain = directory / file_of("F32")
    notes = write_content(content, plain, "F32", progress)
    command = [QUANTIZER, str(plain), str(directory / file_of(asked)), asked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        plain.unlink()
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise LorafoldError(f"{QUANTIZER}: code {done.returncode}: {shortened(said[-1], 160)}")
    return notes


class ToGgufModel(Target):
    """A whole model for llama.cpp."""

    name: ClassVar[str] = "gguf-model"
    engine: ClassVar[str | None] = "llamacpp"
    tensors: ClassVar[tuple[str, ...]] = (*FILE_TYPES, *MIXED)
    merged: ClassVar[bool] = True
    tolerance: ClassVar[Mapping[str, float | None]] = TOLERANCE

    def problems(self, subject: Subject) -> Sequence[str]:
        return problems_of(subject)

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        file = file_of(subject.tensors)
        notes = write_gguf(subject, directory, progress)
        launch = (("llama-server", "-m", f"{{out}}/{file}", "--jinja"),)
        return Written((file,), launch, tuple(notes), {"base": f"{{out}}/{file}"})
