"""Unpacks GGUF files to plain models, once, in the user's cache.

    the file's tensors                  the copy's
    F32, F16, BF16, and Q8_0 as F32     every value as it is in the file
    any fewer bits, as in Q4_1          bf16, or fp32 where that was asked for

A quantized GGUF file can't be trained as it is, and unpacking it takes tens of seconds
(SmolLM2-135M: 25 s). So the first use writes a safetensors copy, with tokenizer and generation
config, to `$LORAFOLD_CACHE`, else `$XDG_CACHE_HOME/lorafold`, else `~/.cache/lorafold`. Later uses
read the copy. Its name contains the digest of the GGUF file. A damaged copy is made anew.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import MANIFEST, atomic_directory, verify
from lorafold.files.contents import digest, file_digest
from lorafold.files.paths import cache_directory
from lorafold.models.gguf_files import SUFFIX, join, read, value
from lorafold.models.gguf_rules import FREQUENCIES, SCALED, scale_positions, split_as_learned
from lorafold.models.load_errors import check_complete, loading, tell_unread

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

HALF = re.compile(r"(.+\.ffn_)(gate|up)(_exps\..+)")
OTHER_HALF = {"gate": "up", "up": "gate"}
BLOCK = re.compile(r"blk\.(\d+)\.(?!attn_rot_embd)")  # old files have those positions' angles
log = logging.getLogger(__name__)
UNPACKING = 2  # raise it when copies made by an earlier version must not be used any more
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXACT = {*PLAIN, "Q8_0"}  # what a copy has as it is in the file


def missing_halves(readers: Sequence[GGUFReader]) -> list[str]:
    """The tensors of experts that are missing, by the file's names, although the ones are there
    that transformers joins them to.
    """
    names = set(_names(readers))
    halves = [found.groups() for found in map(HALF.fullmatch, sorted(names)) if found]
    others = [before + OTHER_HALF[own] + after for before, own, after in halves]
    return [name for name in others if name not in names]


def check_read(model: Any, report: Any, readers: Sequence[GGUFReader], what: str) -> None:
    """Log the tensors that transformers passes over.

    Raises LorafoldError for those of the model's own blocks, without which it computes something
    else than the file's model.

    Args:
        model: what it made of the files.
        report: its own, which has those that it knows of.
        readers: the files.
        what: what messages begin with.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = value(readers[0], "general.architecture")
    if is_gguf_arch_supported(architecture):
        if unread := sorted(report["unexpected_keys"]):
            tell_unread(what, unread)
        return
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    read = {*get_gguf_hf_weights_map(model, processor)}
    if model.config.model_type in SCALED:
        read.add(FREQUENCIES)
    # those of experts are known to it without their ending
    unread = [n for n in _names(readers) if not {n, n.removesuffix(".weight")} & read]
    blocks = model.config.get_text_config().num_hidden_layers
    inside = [n for n in unread if (at := BLOCK.match(n)) and int(at[1]) < blocks]
    if inside:
        raise LorafoldError(
            f"{what}: {type(model).__name__} has no place for {len(inside)} tensors of its blocks,"
            f" without which it is another model: {listed(inside)}"
        )
    if unread:
        tell_unread(what, unread)


def _names(readers: Sequence[GGUFReader]) -> list[str]:
    return [tensor.name for reader in readers for tensor in reader.tensors]


@dataclass(frozen=True)
class Gguf:
    """The GGUF files of a model, in their order, and whether fp32 is asked of its copy."""

    files: tuple[Path, ...]
    fp32: bool = False

    @property
    def identity(self) -> str:
        """The SHA-256 over the files, and over what their copy is."""
        made = f"gguf {UNPACKING}{' fp32' * self.fp32}"
        return digest((f"{made} {n}", *file_digest(file)) for n, file in enumerate(self.files))

    @property
    def copy(self) -> Path:
        """The directory of the copy, there or not."""
        digests = [file_digest(file)[1] for file in self.files]
        key = digests[0] if len(digests) == 1 else self.identity
        name = f"{self.files[0].stem}-{key[:16]}-{UNPACKING}{'-fp32' * self.fp32}"
        return cache_directory() / "models" / name

    def __str__(self) -> str:
        """Its name in messages."""
        return str(self.files[0])


def gguf_of(files: Sequence[Path], fp32: bool = False) -> Gguf:
    """The model of these files; fp32 is for files with fewer bits than their copy keeps."""
    return Gguf(tuple(files), fp32 and not _types(read(files)) <= EXACT)


def unpacked(gguf: Gguf) -> Path:
    """Return the directory of the copy of a model, which is made if there is none.

    Processes that run this at the same time make one copy. Raises LorafoldError if transformers
    can't read the files, if they lack weights, or if the cache can't be written.
    """
    copy = gguf.copy
    if not (copy / MANIFEST).is_file():
        with _locked(gguf, copy):
            if not (copy / MANIFEST).is_file():
                log.info("unpacking %s to %s (once)", gguf.files[0].name, copy)
                shutil.rmtree(copy, ignore_errors=True)
                _unpack(gguf, copy)
    return copy


def renew(gguf: Gguf, copy: Path) -> None:
    """Make a damaged copy anew, unless another process has done so. Raises as `unpacked` does."""
    with _locked(gguf, copy):
        if problems := verify(copy):
            name = gguf.files[0].name
            log.info("%s is damaged (%s): unpacking %s anew", copy, "; ".join(problems), name)
            _unpack(gguf, copy)


@contextmanager
def _locked(gguf: Gguf, copy: Path) -> Iterator[None]:
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_name(copy.name + ".lock")):
            yield
    except OSError as error:
        raise LorafoldError(
            f"{copy}: the copy of {gguf} could not be written: {error.strerror or error}; set"
            " LORAFOLD_CACHE to another directory"
        ) from error


def _unpack(gguf: Gguf, copy: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    what, readers = f"model {gguf}", read(gguf.files)
    dtype, in_file = _dtypes(_types(readers), gguf.fp32)
    with loading(what), atomic_directory(copy, overwrite=True) as tmp:
        file = gguf.files[0]
        if len(readers) > 1:
            file = tmp / f"joined{SUFFIX}"
            join(readers, file)
        auto: Any = AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        kind, pre = (value(readers[0], f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        split_as_learned(tokenizer, kind, pre, what)
        dense = GgufConfig(dequantize=True)
        model, info = auto.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=dense,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        missing = [*sorted(info["missing_keys"]), *missing_halves(readers)]
        check_complete(what, missing, info["mismatched_keys"])
        check_read(model, info, readers, what)
        scale_positions(model.config, readers, what)
        _narrow(model, in_file)
        if len(readers) > 1:
            file.unlink()
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)


def _types(readers: Sequence[GGUFReader]) -> set[str]:
    return {tensor.tensor_type.name for reader in readers for tensor in reader.tensors}


def _dtypes(types: set[str], fp32: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtype to read tensors of these types in, and that of the copy."""
    import torch

    if not types <= EXACT:
        wanted = torch.float32 if fp32 else torch.bfloat16
        return wanted, wanted
    # vectors, and the matrices of routers, are F32 in every file
    matrices = types - {"F32"} if len(types) > 1 else types
    return torch.float32, getattr(torch, PLAIN.get("".join(matrices), "float32"))


def _narrow(model: Any, dtype: torch.dtype) -> None:
    """Store the parameters in this dtype, but for those with values that it does not have."""
    import torch

    for parameter in model.parameters():
        narrow = parameter.data.to(dtype)
        if torch.equal(narrow.to(parameter.dtype), parameter.data):
            parameter.data = narrow
