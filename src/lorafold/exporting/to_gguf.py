"""Exports an adapter as a GGUF file, for llama.cpp and what is built on it.

    y = W x + B (A x)      every scale is in B, and alpha is 0: llama.cpp multiplies by alpha / r
                           where alpha is another

So each site has the rank and the scale that it has. The proof runs over a base that is written for
it in F32, in F16 where that would be large, and removed; where the model is a GGUF file, the same
is asked over that file, and what it differs by is told.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.exporting.folded import Folded
from lorafold.exporting.gguf_metadata import architecture_of
from lorafold.exporting.gguf_model import Described, write_described, write_model
from lorafold.exporting.gguf_tensors import tensors_of_update
from lorafold.exporting.plain_lora import TEMPLATE, elsewhere, write_template
from lorafold.exporting.target import Line, Progress, Subject, Target, Written, only_products

FILE = "adapter.gguf"
BASE = "base-gguf"  # the directory that a launch line has the base written to
LARGE = 1 << 30  # weights
JOB = {"adapter": f"{{out}}/{FILE}"}


class GgufAdapter(Target):
    """Abstract: an adapter as a file; what differs is how it is used."""

    engine: ClassVar[str | None] = "llamacpp"
    tensors: ClassVar[tuple[str, ...]] = ("F32", "F16", "BF16", "Q8_0")
    tolerance: ClassVar[Mapping[str, float | None]] = {"Q8_0": 0.02}

    @abstractmethod
    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        """How the file is used over the file of a base, with options, as `Written.launch`."""

    def problems(self, subject: Subject) -> Sequence[str]:
        if not subject.adapters:
            return ["found no adapter, expected one; --to gguf-model writes a whole model"]
        try:
            row = architecture_of(subject.config)
        except LorafoldError as error:
            return [str(error)]
        update = subject.update
        found = tensors_of_update(update.factors, subject.config, row)[1]
        return [*only_products(update, "a GGUF adapter"), *found]

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        notes = [*write_adapter(subject, directory / FILE, progress)]
        gguf, base = subject.base.source.gguf, elsewhere(subject.base)
        options: tuple[str, ...] = ("--jinja",)
        files: tuple[str, ...] = (FILE,)
        if write_template(subject, directory):
            notes.append(f"the chat template is another than the base's: {TEMPLATE}")
            options = (*options, "--chat-template-file", f"{{out}}/{TEMPLATE}")
            files = (FILE, TEMPLATE)
        if gguf is not None:
            return Written(files, tuple(self.use(str(gguf), options)), tuple(notes), JOB)
        at = f" --revision {base.revision}" if base.revision else ""
        model, file = quote(subject.base.name) + at, f"{BASE}/model-F16.gguf"
        made = f"lorafold export --model {model} --to gguf-model --out {BASE}  # writes {file}"
        lines = (made, *self.use(file, options))
        return Written(files, lines, tuple(notes), JOB)

    def proving(self, subject: Subject, scratch: Path, progress: Progress) -> Mapping[str, Any]:
        scratch.mkdir(exist_ok=True)
        base = scratch / "base.gguf"
        weights = sum(p.numel() for p in subject.model.parameters())
        kind = "F32" if weights < LARGE else "F16"
        write_model(subject.base.source.path, base, kind, progress)
        return {"base": str(base)}

    def beside(self, subject: Subject) -> Mapping[str, Mapping[str, Any]]:
        gguf = subject.base.source.gguf
        if gguf is None:
            return {}
        return {f"over {gguf.files[0].name}": {"base": str(gguf.files[0])}}


class ToGguf(GgufAdapter):
    """For whatever reads such files."""

    name: ClassVar[str] = "gguf"

    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        return (("llama-cli", "-m", base, "--lora", listed_path, *options),)


class ToLlamaCpp(GgufAdapter):
    """For llama.cpp's server. With --lora-init-without-apply a request that names no scale gets the
    adapter all the same, so that scales are said there; --lora-scaled takes no path with a colon.
    """

    name: ClassVar[str] = "llama.cpp"

    def use(self, base: str, options: Sequence[str]) -> Sequence[Line]:
        return (
            ("llama-server", "-m", base, "--lora", listed_path, *options),
            'a request with "lora": [{"id": 0, "scale": 0.0}] is answered by the base alone',
        )


def listed_path(out: str) -> str:
    """The file as one of a list, which llama.cpp's --lora takes: quoted as in CSV where it has what
    would end it.

    Args:
        out: the directory of the export.
    """
    path = f"{out}/{FILE}"
    return '"' + path.replace('"', '""') + '"' if {*path} & {*',"'} else path


def write_adapter(subject: Subject, out: Path, progress: Progress) -> Sequence[str]:
    """Write the file, as `write_described`, whose result this is.

    Args:
        out: the file.
    """
    import gguf

    row = architecture_of(subject.config)
    tensors, _ = tensors_of_update(subject.update.factors, subject.config, row)
    writer = gguf.GGUFWriter(None, row.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    placed = [Folded(name, tuple(t.shape), partial(_same, t)) for name, t in tensors.items()]
    return write_described(Described(writer, placed, ()), out, str(subject.tensors), progress)


def _same(values: Tensor) -> Tensor:
    return values
