"""Named tensors of a model or of safetensors files, read only when they are asked for.

    weights.shape(name)           no data is read
    weights.at(name, where)       some elements, where (n, rank)  ->  (n,)
    weights.get(name)             the whole tensor
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafold.core.attach import base_state
from lorafold.errors import LorafoldError, listed
from lorafold.files.header import places
from lorafold.files.paths import beside
from lorafold.files.record import read_object

# by their names in safetensors
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
# the files of a model, except those of its tokenizer
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)


class Weights(ABC):
    """Abstract: named tensors that can be read in part."""

    @property
    @abstractmethod
    def names(self) -> Iterable[str]:
        """The names of the tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    @abstractmethod
    def is_floating(self, name: str) -> bool:
        """Tell whether a tensor has a floating-point dtype of 16 bits or more: fewer are codes."""

    @abstractmethod
    def at(self, name: str, where: Tensor) -> Tensor:
        """Return the elements at indices (n, rank) of a tensor: (n,), on the CPU, in its dtype."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """Return a whole tensor, of any shape."""

    def find(self, name: str) -> str | None:
        """Return the name here of a tensor that is called `name` elsewhere, or None. Files often
        lack the first part of the model's names ("transformer.", "model."), and a part for text
        that was loaded alone the second one ("model.language_model.").
        """
        if name in self.names:
            return name
        parts = name.split(".")
        shorter = next(
            (n for i in range(1, len(parts) - 1) if (n := ".".join(parts[i:])) in self.names), None
        )
        longer = [n for n in self.names if n.endswith(f".{name}")]
        if shorter or longer:
            return shorter or (longer[0] if len(longer) == 1 else None)
        first, rest, alone = parts[0], ".".join(parts[1:]), ".".join((parts[0], *parts[2:]))
        inside = [n for n in self.names if n.startswith(f"{first}.") and n.endswith(f".{rest}")]
        return alone if alone in self.names else inside[0] if len(inside) == 1 else None


class InMemory(Weights):
    """Abstract: tensors that are in memory."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors, of any shape, by name."""

    @property
    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def is_floating(self, name: str) -> bool:
        return self.tensors[name].is_floating_point()

    def at(self, name: str, where: Tensor) -> Tensor:
        tensor = self.tensors[name]
        return tensor[tuple(where.to(tensor.device).unbind(1))].cpu()

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


class ModelWeights(InMemory):
    """The floating-point base weights of a model, without its adapters. Quantized weights, and
    those on the meta device, count as absent.
    """

    def __init__(self, model: nn.Module) -> None:
        state = base_state(model)
        own = [
            name
            for named in (model.named_parameters, model.named_buffers)
            for name, _ in named(remove_duplicate=False)
        ]
        self._tensors = {
            k: state[k]
            for k in own
            if k in state and self._counts(state[k])
        }

    @staticmethod
    def _counts(tensor: Tensor) -> bool:  # of any shape
        return tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._tensors


class LoadedWeights(InMemory):
    """The tensors of a safetensors file that was read into memory, which they share: `load` of
    safetensors copies it all, and no other thread runs meanwhile. They must not be written to.
    Raises LorafoldError for one that can't be read.

    Args:
        content: the bytes of the file.
        path: where they are from, for the message.
    """

    def __init__(self, content: bytearray, path: Path) -> None:
        try:
            found = places(content)
        except LorafoldError as e:
            raise unreadable(path, e) from None
        self._tensors = {
            name: torch.frombuffer(
                content, dtype=DTYPES[place.dtype], count=prod(place.shape), offset=place.start
            ).view(place.shape)
            if place.stop > place.start
            else torch.empty(place.shape, dtype=DTYPES[place.dtype])
            for name, place in found.items()
        }

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._tensors


class FileWeights(Weights):
    """The tensors of safetensors files, which are mapped into memory, or if not `mapped` read anew
    for each tensor. Raises LorafoldError for a file that can't be read.
    """

    def __init__(self, files: Iterable[Path], *, mapped: bool = True) -> None:
        self._file: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, "pt", backend="mmap" if mapped else "pread")
            except (OSError, SafetensorError) as e:
                raise unreadable(path, e) from None
            self._file.update(dict.fromkeys(file.keys(), file))

    @property
    def names(self) -> Iterable[str]:
        return self._file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file[name].get_slice(name).get_shape())

    def is_floating(self, name: str) -> bool:
        dtype: str = self._file[name].get_slice(name).get_dtype()
        return dtype.startswith(("F", "BF")) and not dtype.startswith("F8")

    def at(self, name: str, where: Tensor) -> Tensor:
        lazy = self._file[name].get_slice(name)
        return torch.cat(
            [lazy[tuple(slice(i, i + 1) for i in index)].flatten() for index in where.tolist()]
        )

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._file[name].get_tensor(name)
        return tensor

    def slice(self, name: str) -> Any:
        """Return safetensors' view of a tensor, which reads the data when it is indexed."""
        return self._file[name].get_slice(name)


def unreadable(path: Path, error: Exception) -> LorafoldError:
    """The error for a file of tensors that can't be read."""
    if isinstance(error, FileNotFoundError):
        return LorafoldError(f"{path}: there is no such file{beside(path)}")
    return LorafoldError(
        f"{path}: not readable as safetensors, it may have been cut short or damaged ({error})"
    )


def shards_left_out(directory: Path) -> list[str]:
    """The names of the shards in a model directory that are none of its weight files: of another
    save than its index, or beside a file that has the whole model.
    """
    read = model_files(directory)
    return sorted(file.name for file in directory.glob(SHARDS) if file not in read)


def model_files(directory: Path) -> list[Path]:
    """Return the weight files of a model directory, those that transformers reads. Raises
    LorafoldError if there are none, or with the names of those that are missing.
    """
    if (single := directory / SINGLE).is_file():
        return [single]
    if (index := directory / INDEX).is_file():
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
            raise LorafoldError(f"{index}: found no weight_map, expected the file of each tensor")
        files = [directory / name for name in sorted(set(named.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise LorafoldError(
                f"{directory}: {INDEX} names files that are missing: {listed(missing)}"
            )
        return files
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    beside = f" beside {listed(others)}" if others else ""
    raise LorafoldError(
        f"{directory}: found neither {SINGLE} nor {INDEX}{beside}, expected one of them"
    )
