"""GGUF files, and their conversion to a cached copy in safetensors.

    tensors of the GGUF file            tensors of the copy
    F32, F16, BF16, and Q8_0 as F32     the exact values
    types of fewer bits, such as Q4_1   bf16, or fp32 on request

Conversion takes tens of seconds and happens on first use. The copy is stored in `$LORAFOLD_CACHE`,
else `$XDG_CACHE_HOME/lorafold`, else `~/.cache/lorafold`, under a name that contains the digest of
the GGUF file. Split files (`model-00001-of-00003.gguf`) are joined first, because transformers
reads only one file and fills all other weights with random values.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import MANIFEST, write_errors
from lorafold.files.cache import fill_once
from lorafold.files.contents import digest, file_digest
from lorafold.files.paths import cache_directory
from lorafold.models.gguf_rope import FREQUENCIES, LLAMA3_TYPES, metadata_value, set_rope_scaling
from lorafold.models.load_errors import check_complete, loading, one_line, warn_unread

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

SUFFIX = ".gguf"
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
ENCODER_PREFIX = "mmproj"  # the prefix of files with a model's encoders
GATE_OR_UP = re.compile(r"^(.+\.ffn_)(gate|up)(_exps\..+)$")
OTHER_HALF = {"gate": "up", "up": "gate"}
BLOCK = re.compile(r"blk\.(\d+)\.(?!attn_rot_embd)")  # rotary angles, in old files
log = logging.getLogger(__name__)
CONVERSION_VERSION = 2  # increase it to invalidate existing copies
FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXACT_TYPES = {*FLOAT_TYPES, "Q8_0"}  # types that are copied exactly


def check_unread(model: Any, report: Any, readers: Sequence[GGUFReader], what: str) -> None:
    """Warns about tensors that transformers does not read; raises if they belong to blocks."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = metadata_value(readers[0], "general.architecture")
    if is_gguf_arch_supported(architecture):
        return warn_unread(what, sorted(report["unexpected_keys"]))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    known = {*get_gguf_hf_weights_map(model, processor)}
    if model.config.model_type in LLAMA3_TYPES:
        known.add(FREQUENCIES)
    # transformers maps names of experts without .weight
    names = [tensor.name for tensor in _tensors(readers)]
    unread = [n for n in names if not {n, n.removesuffix(".weight")} & known]
    blocks = model.config.get_text_config().num_hidden_layers
    if inside := [n for n in unread if (at := BLOCK.match(n)) and int(at[1]) < blocks]:
        raise LorafoldError(
            f"{what}: {type(model).__name__} has no weights for tensors of the file's layers"
            f" ({listed(inside)}); use the model in Hugging Face's format"
        )
    warn_unread(what, unread)


def _tensors(readers: Sequence[GGUFReader]) -> Iterator[Any]:
    return (tensor for reader in readers for tensor in reader.tensors)


@dataclass(frozen=True)
class Gguf:
    """The GGUF files of a model, in order. `fp32` means that the copy is not rounded to bf16."""

    files: tuple[Path, ...]
    fp32: bool = False

    @property
    def identity(self) -> str:
        """A SHA-256 of the files and of the conversion's settings."""
        made = f"gguf {CONVERSION_VERSION}{' fp32' * self.fp32}"
        return digest((f"{made} {n}", *file_digest(file)) for n, file in enumerate(self.files))

    @property
    def copy(self) -> Path:
        """The directory of the safetensors copy, which may not exist yet."""
        digests = [file_digest(file)[1] for file in self.files]
        key = digests[0] if len(digests) == 1 else self.identity
        name = f"{self.files[0].stem}-{key[:16]}-{CONVERSION_VERSION}{'-fp32' * self.fp32}"
        return cache_directory() / "models" / name

    def __str__(self) -> str:
        return str(self.files[0])


def gguf_of(files: Sequence[Path], fp32: bool = False) -> Gguf:
    """The model in these files. `fp32` has no effect if the conversion is exact anyway."""
    return Gguf(tuple(files), fp32 and not _types(read_gguf(files)) <= EXACT_TYPES)


def unpack(gguf: Gguf) -> Path:
    """The directory of a model's safetensors copy, which is created if it does not exist."""
    copy = gguf.copy
    return copy if (copy / MANIFEST).is_file() else renew_copy(gguf, copy)


def renew_copy(gguf: Gguf, copy: Path) -> Path:
    """The directory of a model's safetensors copy, which is created if it does not exist or is
    damaged.
    """
    return fill_once(copy, partial(_unpack, gguf), log.info)


def _unpack(gguf: Gguf, copy: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from lorafold.models.gguf_tokenizers import set_pre_tokenizer

    log.info("converting %s to %s (once)", gguf.files[0].name, gguf.copy)
    what, readers = f"model {gguf}", read_gguf(gguf.files)
    dtype, in_file = _dtypes(_types(readers), gguf.fp32)
    with loading(what), write_errors(gguf.copy):
        file = gguf.files[0]
        if len(readers) > 1:
            file = copy / f"joined{SUFFIX}"
            join_files(readers, file)
        auto: Any = AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        kind, pre = (metadata_value(readers[0], f"tokenizer.ggml.{k}") for k in ("model", "pre"))
        set_pre_tokenizer(tokenizer, kind, pre, what)
        model, info = auto.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
            use_kernels=False,
            ignore_mismatched_sizes=True,
        )
        names = sorted(tensor.name for tensor in _tensors(readers))
        # gate and up, which transformers joins, must both be in the file
        halves = [GATE_OR_UP.sub(lambda m: m[1] + OTHER_HALF[m[2]] + m[3], n) for n in names]
        missing = [*sorted(info["missing_keys"]), *(n for n in halves if n not in names)]
        check_complete(what, missing, info["mismatched_keys"])
        check_unread(model, info, readers, what)
        set_rope_scaling(model.config, readers, what)
        for parameter in model.parameters():  # narrow, unless this rounds a value
            narrow = parameter.data.to(in_file)
            if narrow.to(parameter.dtype).equal(parameter.data):
                parameter.data = narrow
        if len(readers) > 1:
            file.unlink()
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)


def _types(readers: Sequence[GGUFReader]) -> set[str]:
    return {tensor.tensor_type.name for tensor in _tensors(readers)}


def _dtypes(types: set[str], fp32: bool) -> tuple[torch.dtype, torch.dtype]:
    import torch

    if not types <= EXACT_TYPES:
        return (torch.float32 if fp32 else torch.bfloat16,) * 2
    # vectors and routers are always F32
    matrices = types - {"F32"} if len(types) > 1 else types
    return torch.float32, getattr(torch, FLOAT_TYPES.get("".join(matrices), "float32"))


def split_files_of(file: Path) -> tuple[Path, ...]:
    """All files of a split model in order, from the path of any one of them."""
    named = SPLIT_NAME.fullmatch(file.name)
    if named is None:
        return (file,)
    stem, _, count = named.groups()
    parts = [file.with_name(f"{stem}-{n:05}-of-{count}{SUFFIX}") for n in range(1, int(count) + 1)]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise LorafoldError(
            f"model {file}: the model has {int(count)} files; missing: {listed(absent)}"
        )
    return tuple(parts)


def group_by_model(names: Iterable[str]) -> list[list[str]]:
    """The GGUF files of each model in a repository, in order, without files of encoders."""
    models: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix == SUFFIX and not path.name.startswith(ENCODER_PREFIX):
            part = SPLIT_NAME.fullmatch(path.name)
            key = (path.name,) if part is None else (part[1], part[3])
            models.setdefault((str(path.parent), *key), []).append(name)
    return list(models.values())


def gguf_files_in(folder: Path) -> tuple[Path, ...]:
    """The GGUF files of the only model in a folder; empty if there are none."""
    files = sorted(p for p in folder.glob(f"*{SUFFIX}") if not p.name.startswith(ENCODER_PREFIX))
    models = list(dict.fromkeys(map(split_files_of, files)))
    if len(models) > 1:
        names = listed(parts[0].name for parts in models)
        raise LorafoldError(
            f"model {folder}: found {len(models)} GGUF models; pass one of them: {names}"
        )
    return models[0] if models else ()


def read_gguf(files: Sequence[Path]) -> list[GGUFReader]:
    """Reads the metadata of a model's files, and checks that they are complete and in order."""
    from gguf import GGUFReader

    readers = []
    for number, file in enumerate(files):
        try:
            reader = GGUFReader(file)
        except (OSError, ValueError, LookupError, OverflowError) as error:
            raise LorafoldError(
                f"{file}: can't be read as GGUF (another format, truncated, or newer than the"
                f" installed package gguf): {one_line(error)}"
            ) from error
        check_offsets(reader, file)
        readers.append(reader)
        own = metadata_value(reader, "split.no") or 0
        count = metadata_value(reader, "split.count") or 1
        if (own, count) != (number, len(files)):
            raise LorafoldError(
                f"{file}: the metadata describes file {own + 1} of {count}, expected file"
                f" {number + 1} of {len(files)}; the files of a model must be in one directory"
                f" and have names such as NAME-00001-of-{count:05}{SUFFIX}"
            )
    expected, count = metadata_value(readers[0], "split.tensors.count"), len([*_tensors(readers)])
    if expected not in (None, count):
        raise LorafoldError(f"{files[0]}: found {count} tensors, expected {expected}")
    return readers


def check_offsets(reader: GGUFReader, file: Path) -> None:
    """Checks that the tensors fill the file after its header without gaps, because wrong offsets
    would give wrong values.
    """
    end = 0
    for tensor in reader.tensors:
        offset = tensor.data_offset - reader.data_offset
        if offset != end:
            raise LorafoldError(
                f"{file}: the header is damaged: found {tensor.name} at byte {offset} of the"
                f" tensors, expected {end}, the end of the previous tensor"
            )
        end += -(-int(tensor.n_bytes) // reader.alignment) * reader.alignment
    left = len(reader.data) - reader.data_offset - end
    if left >= reader.alignment:
        raise LorafoldError(
            f"{file}: the header is damaged: found {left} bytes after the last of its"
            f" {len(reader.tensors)} tensors, expected none"
        )


@contextmanager
def joined_metadata(files: Sequence[Path]) -> Iterator[Path]:
    """A context that yields one file with all metadata and tensor names of a model. For split
    files, it is a temporary file without the values.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = files[0]
        if len(files) > 1:
            file = Path(folder) / f"joined{SUFFIX}"
            join_files(read_gguf(files), file, values=False)
        yield file


def join_files(readers: Sequence[GGUFReader], out: Path, *, values: bool = True) -> None:
    """Writes a model's files, in order, as one file. Without `values`, a hole in the file replaces
    the tensors' values.
    """
    import numpy as np

    first, tensors = readers[0], [*_tensors(readers)]
    count = first.fields["GGUF.tensor_count"].parts[0]
    metadata = max(f.offset + sum(p.nbytes for p in f.parts) for f in first.fields.values())
    alignment = int(first.alignment)
    before = 4 + 4  # bytes of the magic number and the version
    with out.open("wb") as file:
        file.write(first.data[:before].tobytes())
        file.write(np.array([len(tensors)], count.dtype).tobytes())
        file.write(first.data[before + count.nbytes : metadata].tobytes())
        offsets, end = [], 0
        for tensor in tensors:
            *header, last = tensor.field.parts
            offsets.append(end)
            file.writelines(part.tobytes() for part in header)
            file.write(np.array([end], last.dtype).tobytes())
            end += -(-tensor.n_bytes // alignment) * alignment
        start = -(-file.tell() // alignment) * alignment
        for tensor, offset in zip(tensors, offsets, strict=True) if values else ():
            file.seek(start + offset)
            tensor.data.tofile(file)
        file.truncate(start + end)
