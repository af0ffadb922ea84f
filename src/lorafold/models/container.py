"""Reads and writes safetensors files one tensor at a time.

    8 bytes: the header's length, little-endian | the header, JSON | the tensors' bytes, in order

`safetensors.torch.save_file` needs all tensors of a file in memory at once; merging needs only one.
Tensors are read through safetensors and stay memory-mapped: they take no memory of their own.

`write_whole` writes a trained model: weights, config, tokenizer, record and card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, write_json
from lorafold.files.card import CARD, Beside, training_card
from lorafold.files.record import RECORD
from lorafold.methods.full import write_model
from lorafold.models.architecture import opened_by_name
from lorafold.models.sources import called

BLOCK = 1 << 23  # bytes copied at a time
ALIGNMENT = 8  # of the first tensor, so that readers can map it
# of dtypes, as a file writes them
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name and dtype as the file writes them, its shape, and the offset
    and number of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    def shaped(self, shape: tuple[int, ...]) -> Entry:
        """Return the entry of a tensor of another shape and the same dtype."""
        return (
            self
            if shape == self.shape
            else replace(self, shape=shape, size=self.size // prod(self.shape) * prod(shape))
        )


@dataclass(frozen=True)
class Piece:
    """A tensor to be written, of which the values are got when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]


@dataclass(frozen=True)
class Container:
    """A safetensors file: its tensors by name, in the order of their bytes, and its metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_container(path: Path) -> Container:
    """Read the header of a file. Raises LorafoldError if it is not a complete safetensors file."""
    try:
        with safe_open(path, framework="pt"):  # checks the header and the length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as e:
        raise LorafoldError(
            f"{path}: expected a safetensors file, but it can't be read as one: {e}"
        ) from None
    metadata = header.pop("__metadata__", {})
    entries = []
    for name, described in header.items():
        start, end = described["data_offsets"]
        entries.append(
            Entry(
                name,
                described["dtype"],
                tuple(described["shape"]),
                path,
                8 + length + start,
                end - start,
            )
        )
    return Container({e.name: e for e in sorted(entries, key=lambda e: e.offset)}, metadata)


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return tensors of any shapes, by name, mapped from the file. They must not be written to."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def write_container(
    path: Path,
    layout: Sequence[tuple[str, Entry]],
    metadata: dict[str, str],
    changed: Callable[[str], Tensor | None],
    written: Callable[[str, int], None],
) -> None:
    """Write a safetensors file whose tensors are those of other files or have new values.

    Raises LorafoldError if a file that is copied from ends early.

    Args:
        path: The file to write.
        layout: (name, entry) pairs in the order of their bytes. Each tensor has its entry's dtype
            and shape, and its bytes unless it is changed.
        metadata: Free text for the header.
        changed: Gives the new values of a name, of its entry's shape, or None to copy the bytes.
        written: Is called with the name and the number of bytes after each tensor.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, entry in layout:
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.size],
        }
        at += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, entry in layout:
            values = changed(name)
            if values is None:
                _copy_bytes(entry, out)
            else:
                out.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written(name, entry.size)


def check_finite(name: str, t: Tensor) -> Tensor:
    """A tensor of any shape. Raises LorafoldError, which names it, if it has NaN or infinity."""
    counts = t.is_floating_point() and t.itemsize > 1 and t.numel()
    if counts and not torch.stack(torch.aminmax(t.detach())).isfinite().all():
        raise LorafoldError(f"found NaN or infinity in {name}, expected finite numbers")
    return t


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write a safetensors file of which one tensor is in memory at a time. Raises LorafoldError if
    one is not finite.

    Args:
        path: The file to write.
        pieces: By name.
    """
    entries = [
        (name, Entry(name, NAMES[p.dtype], p.shape, path, 0, prod(p.shape) * p.dtype.itemsize))
        for name, p in pieces.items()
    ]

    def got(name: str) -> Tensor:
        return check_finite(name, pieces[name].get().cpu())

    write_container(path, entries, {}, got, lambda *_: None)


def _copy_bytes(entry: Entry, out: BinaryIO) -> None:
    left = entry.size
    with entry.file.open("rb") as source:
        source.seek(entry.offset)
        while left:
            block = source.read(min(left, BLOCK))
            if not block:
                raise LorafoldError(
                    f"{entry.file}: ends inside the tensor {entry.name}, so it was cut short"
                )
            out.write(block)
            left -= len(block)


def write_whole(
    path: str | Path,
    model: nn.Module,
    spec: Spec,
    beside: Beside,
) -> Path:
    """Write the directory, completely or not at all.

    Raises LorafoldError if the path exists and may not be replaced, or if the model is not one of
    transformers.

    Args:
        path: The directory to write.
        model: The trained model.
        spec: The method.
    """
    if not hasattr(model, "save_pretrained"):
        raise LorafoldError(
            f"{path} was not written: found a {type(model).__name__}, but {type(spec).__name__}"
            " saves whole models and expects one of transformers (with save_pretrained)"
        )
    own_card = training_card(
        called(model),
        {"recipe": {"method": type(spec).__name__, **vars(spec)}},
        {},
        whole=True,
        opened_by=opened_by_name(model),
    )
    with atomic_directory(path, beside.overwrite) as directory:
        write_model(model, directory)
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(directory)
        write_json(directory / RECORD, {**beside.record, "lorafold": version("lorafold")})
        (directory / CARD).write_text(beside.card or own_card, encoding="utf-8")
    return Path(path)
