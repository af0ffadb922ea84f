"""The files of adapters and models: read, compared, and changed as if by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.files.atomic import MANIFEST

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lorafold.json"


def json_of(path: Path, name: str = CONFIG) -> dict[str, Any]:
    """A JSON file of a directory, by default an adapter's config."""
    return json.loads((path / name).read_text(encoding="utf-8"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of all weight files of a directory."""
    return {k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path, atol: float = 0.0) -> None:
    found, expected = tensors_of(one), tensors_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=atol, atol=atol, msg=name)


def configure(path: Path, name: str = CONFIG, **fields: Any) -> None:
    """Change fields of a JSON file, and remove the manifest, which would tell."""
    (path / MANIFEST).unlink(missing_ok=True)
    (path / name).write_text(json.dumps(json_of(path, name) | fields))


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any], name: str = WEIGHTS) -> None:
    """Change the tensors of a file, and remove the manifest."""
    (path / MANIFEST).unlink(missing_ok=True)
    tensors = load_file(path / name)
    edit(tensors)
    save_file(tensors, path / name, metadata={"format": "pt"})
