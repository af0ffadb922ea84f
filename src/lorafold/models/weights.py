"""Tensors by name, wherever they lie: in a model or in safetensors files.

Nothing is read until it is asked for.

    weights.shape(name)           no data read
    weights.at(name, where)       some elements, where (n, rank)  ->  (n,)
    weights.get(name)             the whole tensor
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafold.errors import LorafoldError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# patterns of what a model is read from, but for its tokenizer
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
    def names(self) -> Iterable[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def is_floating(self, name: str) -> bool: ...

    @abstractmethod
    # where (n, rank) -> (n,), on the CPU, in the tensor's own dtype
    def at(self, name: str, where: Tensor) -> Tensor: ...

    @abstractmethod
    def get(self, name: str) -> Tensor: ...

    def find(self, name: str) -> str | None:
        """The name here of a tensor called `name` elsewhere: files often lack the model's own first
        word ("transformer.", "model.").
        """
        if name in self.names:
            return name
        words = name.split(".")
        shorter = next(
            (n for i in range(1, len(words) - 1) if (n := ".".join(words[i:])) in self.names), None
        )
        longer = [n for n in self.names if n.endswith(f".{name}")]
        return shorter or (longer[0] if len(longer) == 1 else None)


class ModelWeights(Weights):
    """The plain base weights of a model, adapters left out; what has no data (the meta device) or
    is packed counts as absent.
    """

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict()
        own = [
            name
            for named in (model.named_parameters, model.named_buffers)
            for name, _ in named(remove_duplicate=False)
        ]
        self._tensors = {
            k: state[k]
            for k in own
            if k in state and state[k].is_floating_point() and not state[k].is_meta
        }

    @property
    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def is_floating(self, name: str) -> bool:
        return self._tensors[name].is_floating_point()

    def at(self, name: str, where: Tensor) -> Tensor:
        tensor = self._tensors[name]
        return tensor[tuple(where.to(tensor.device).unbind(1))].cpu()

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class FileWeights(Weights):
    """Safetensors files, mapped into memory, or else read anew for each tensor.

    LorafoldError names a file that can't be read.
    """

    def __init__(self, files: Iterable[Path], *, mapped: bool = True) -> None:
        self._file: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, "pt", backend="mmap" if mapped else "pread")
            except (OSError, SafetensorError) as e:
                raise LorafoldError(
                    f"{path}: not readable as safetensors, it may have been cut short or damaged"
                    f" ({e})"
                ) from None
            self._file.update(dict.fromkeys(file.keys(), file))

    @property
    def names(self) -> Iterable[str]:
        return self._file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file[name].get_slice(name).get_shape())

    def is_floating(self, name: str) -> bool:
        dtype: str = self._file[name].get_slice(name).get_dtype()
        return dtype.startswith(("F", "BF"))

    def at(self, name: str, where: Tensor) -> Tensor:
        lazy = self._file[name].get_slice(name)
        return torch.cat(
            [lazy[tuple(slice(i, i + 1) for i in index)].flatten() for index in where.tolist()]
        )

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._file[name].get_tensor(name)
        return tensor

    def slice(self, name: str) -> Any:
        """safetensors' own view of a tensor, which is read when it is indexed."""
        return self._file[name].get_slice(name)


def model_files(directory: Path) -> list[Path]:
    """The weight files of a model directory. LorafoldError where there are none."""
    if (index := directory / INDEX).is_file():
        return [
            directory / name
            for name in sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        ]
    if (single := directory / SINGLE).is_file():
        return [single]
    raise LorafoldError(f"{directory}: found neither {SINGLE} nor {INDEX}")
