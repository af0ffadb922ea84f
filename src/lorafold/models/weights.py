"""Named tensors in memory or in safetensors files, which are read and written one tensor at a time.

    weights.shape(name)           no data is read
    weights.elements(name, i)     some elements, i (n, rank)  ->  (n,)
    weights.get(name)             the whole tensor

A safetensors file contains the header's length (8 bytes, little-endian), the header (JSON) and the
tensors' bytes in order. `safetensors.torch.save_file` is not used for merging, because it needs all
tensors of a file in memory at once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafold.core.attach import base_state
from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import read_object
from lorafold.files.paths import nearest_name
from lorafold.files.safetensors_header import tensor_spans

# dtypes by their names in safetensors
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
# the files of a model, except its tokenizer
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
BLOCK = 1 << 23  # bytes copied at a time
ALIGNMENT = 8  # alignment of the first tensor, so that readers can map it


class Weights(ABC):
    """Abstract: named tensors that can be read in part."""

    names: Collection[str]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    @abstractmethod
    def is_floating(self, name: str) -> bool:
        """Whether a tensor has a floating-point dtype of at least 16 bits."""

    @abstractmethod
    def elements(self, name: str, indices: Tensor) -> Tensor:
        """The elements (n,) of a tensor at indices (n, rank), on the CPU, in its dtype."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """A whole tensor, of any shape."""

    def find(self, name: str) -> str | None:
        """The name in these weights of a tensor that a model calls `name`, or None. Names in files
        often lack the first part ("model."), and in multimodal files they have a second part
        ("model.language_model.").
        """
        if name in self.names:
            return name
        first, *parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts) - 1))
        if shorter := next((end for end in ends if end in self.names), None):
            return shorter
        if longer := [n for n in self.names if n.endswith(f".{name}")]:
            return longer[0] if len(longer) == 1 else None
        if (alone := ".".join((first, *parts[1:]))) in self.names:
            return alone
        rest = f".{'.'.join(parts)}"
        inside = [n for n in self.names if n.startswith(f"{first}.") and n.endswith(rest)]
        return inside[0] if len(inside) == 1 else None


class InMemory(Weights):
    """Tensors (any shape) in memory, by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.names = tensors.keys()

    @classmethod
    def of_model(cls, model: nn.Module) -> InMemory:
        """The floating-point base weights of a model. Adapters, quantized weights and meta tensors
        are left out.
        """
        state = base_state(model)
        buffers = model.named_buffers(remove_duplicate=False)
        return cls({
            name: t
            for name, _ in (*model.named_parameters(remove_duplicate=False), *buffers)
            if (t := state.get(name)) is not None
            if t.is_floating_point() and t.itemsize > 1 and not t.is_meta
        })  # fmt: skip

    @classmethod
    def read(cls, content: bytearray, path: Path) -> InMemory:
        """The tensors of a safetensors file with these contents. The tensors share the memory of
        `content`, so they must not be written to; safetensors' `load` would copy it and hold the
        GIL.
        """
        try:
            entries = tensor_spans(content)
        except LorafoldError as e:
            raise unreadable(path, e) from None
        return cls({
            name: torch.frombuffer(
                content, dtype=DTYPES[place.dtype], count=prod(place.shape), offset=place.start
            ).view(place.shape)
            if place.stop > place.start
            else torch.empty(place.shape, dtype=DTYPES[place.dtype])
            for name, place in entries.items()
        })  # fmt: skip

    def with_others(self, hidden: Collection[str], others: Mapping[str, Tensor]) -> InMemory:
        """A copy without the tensors `hidden` and with the tensors `others` (any shape)."""
        shown = {name: t for name, t in self.tensors.items() if name not in hidden}
        return InMemory(shown | dict(others))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def is_floating(self, name: str) -> bool:
        return self.tensors[name].is_floating_point()

    def elements(self, name: str, indices: Tensor) -> Tensor:
        tensor = self.tensors[name]
        return tensor[tuple(indices.to(tensor.device).unbind(1))].cpu()

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


class FileWeights(Weights):
    """The tensors of safetensors files, which are memory-mapped, or read at each access if not
    `mapped`.
    """

    def __init__(self, files: Iterable[Path], *, mapped: bool = True) -> None:
        self._file: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, "pt", backend="mmap" if mapped else "pread")
            except (OSError, SafetensorError) as e:
                raise unreadable(path, e) from None
            self._file.update(dict.fromkeys(file.keys(), file))
        self.names = self._file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def is_floating(self, name: str) -> bool:
        dtype = self.slice(name).get_dtype()
        return dtype.startswith(("F", "BF")) and not dtype.startswith("F8")

    def elements(self, name: str, indices: Tensor) -> Tensor:
        lazy = self.slice(name)
        return torch.cat(
            [lazy[tuple(slice(i, i + 1) for i in index)].flatten() for index in indices.tolist()]
        )

    def get(self, name: str) -> Tensor:
        return self._file[name].get_tensor(name)

    def slice(self, name: str) -> Any:
        """safetensors' view of a tensor, which reads the data when it is indexed."""
        return self._file[name].get_slice(name)


def unreadable(path: Path, error: Exception) -> LorafoldError:
    if isinstance(error, FileNotFoundError):
        return LorafoldError(f"{path}: no such file{nearest_name(path)}")
    return LorafoldError(
        f"{path}: not readable as safetensors, so it may be truncated or damaged ({error})"
    )


def model_files(directory: Path) -> list[Path]:
    """The weight files of a model directory that transformers would read."""
    if (single := directory / SINGLE_FILE).is_file():
        return [single]
    if (index := directory / INDEX).is_file():
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
            raise LorafoldError(f"{index}: found no valid weight_map of tensors to files")
        files = [directory / name for name in sorted(set(named.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise LorafoldError(
                f"{directory}: {INDEX} lists files that are missing: {listed(missing)}"
            )
        return files
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    note = f" (only {listed(others)})" if others else ""
    raise LorafoldError(
        f"{directory}: found neither {SINGLE_FILE} nor {INDEX}{note}, expected one of them"
    )


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: its name and dtype in the file, its shape, offset and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    def shaped(self, shape: tuple[int, ...]) -> TensorEntry:
        if shape == self.shape:
            return self
        return replace(self, shape=shape, size=self.size // prod(self.shape) * prod(shape))


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to be written; `get` is called for its values only when they are written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]


@dataclass(frozen=True)
class Container:
    """A safetensors file: its tensors by name, in file order, and its metadata."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_container(path: Path) -> Container:
    """Reads the header of a safetensors file, and checks that the file is complete."""
    try:
        with safe_open(path, framework="pt"):  # checks the header and the length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as e:
        raise LorafoldError(f"{path}: can't be read as safetensors: {e}") from None
    metadata, entries = header.pop("__metadata__", {}), {}
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        (start, end), shape = tensor["data_offsets"], tuple(tensor["shape"])
        entries[name] = TensorEntry(
            name, tensor["dtype"], shape, path, 8 + length + start, end - start
        )
    return Container(entries, metadata)


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors (any shape) by name, memory-mapped from a file, so they must not be written to."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def write_container(
    path: Path,
    layout: Sequence[tuple[str, TensorEntry]],
    metadata: dict[str, str],
    changed: Callable[[str], Tensor | None],
    written: Callable[[str, int], None],
) -> None:
    """Writes a safetensors file of copied and new tensors, in the order of `layout`.

    `changed` returns new values for a tensor in the shape of its entry (any shape), or None to copy
    its bytes; `written` is called with the name and size in bytes of each written tensor.
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
            if (values := changed(name)) is None:
                _copy_bytes(entry, out)
            else:
                out.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written(name, entry.size)


def check_finite(name: str, t: Tensor) -> Tensor:
    """Returns t (any shape), or raises if it contains NaN or infinity."""
    counts = t.is_floating_point() and t.itemsize > 1 and t.numel()
    if counts and not torch.stack(torch.aminmax(t.detach())).isfinite().all():
        raise LorafoldError(f"found NaN or infinity in {name}, expected finite numbers")
    return t


def write_tensors(path: Path, pieces: Mapping[str, PendingTensor]) -> None:
    """Writes a safetensors file with only one tensor in memory at a time."""
    entries = [
        (n, TensorEntry(n, NAMES[p.dtype], p.shape, path, 0, prod(p.shape) * p.dtype.itemsize))
        for n, p in pieces.items()
    ]
    write_container(
        path, entries, {}, lambda n: check_finite(n, pieces[n].get().cpu()), lambda *_: None
    )


def _copy_bytes(entry: TensorEntry, out: BinaryIO) -> None:
    with entry.file.open("rb") as source:
        source.seek(entry.offset)
        left = entry.size
        while left:
            if not (block := source.read(min(left, BLOCK))):
                raise LorafoldError(f"{entry.file}: truncated inside the tensor {entry.name}")
            left -= out.write(block)
