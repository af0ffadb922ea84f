"""safetensors headers are read and refused as the safetensors library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from error_cases import refusal
from lorafold.files.safetensors_header import SIZES
from lorafold.models.weights import DTYPES, InMemory

HERE = Path("adapter_model.safetensors")


def test_every_dtype_and_shape_is_what_safetensors_reads() -> None:
    assert DTYPES.keys() == SIZES.keys()
    torch.manual_seed(0)
    given = {f"of {n}": torch.randint(0, 2, (3, 5)).to(d) for n, d in DTYPES.items()}
    given |= {"empty": torch.zeros(0, 4), "one": torch.tensor(2.5), "long": torch.randn(7, 2, 3)}
    content = save(given, {"format": "pt"})
    ours, theirs = InMemory.read(bytearray(content), HERE).tensors, load(content)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        found, expected = (t.flatten().view(torch.uint8) for t in (ours[name], tensor))
        assert torch.equal(found, expected), name


def described(metadata: Any) -> bytes:
    """A file without tensors, with that metadata."""
    head = json.dumps({"__metadata__": metadata}).encode()
    return len(head).to_bytes(8, "little") + head


def rewritten(**changed: Any) -> bytes:
    """A file of one tensor, with other fields in its header."""
    about = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changed
    head = json.dumps({"a": about}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(24)


DAMAGED = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "a header that is not there": b"\xff" * 16,
    "no JSON": (2).to_bytes(8, "little") + b"{:",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "an unknown dtype": rewritten(dtype="F33"),
    "a dtype of another size": rewritten(dtype="F16"),
    "a shape of another size": rewritten(shape=[2, 4]),
    "a shape below 0": rewritten(shape=[-2, -3]),
    "a shape of no numbers": rewritten(shape="ab"),
    "offsets past the end": rewritten(shape=[2, 4], data_offsets=[0, 32]),
    "a gap": rewritten(shape=[5], data_offsets=[4, 24]),
    "an end before its beginning": rewritten(data_offsets=[24, 0]),
    "bytes that no tensor has": rewritten(shape=[2], data_offsets=[0, 8]),
    "three offsets": rewritten(data_offsets=[0, 12, 24]),
    "no offsets": rewritten(data_offsets=None),
    "a cut tail": rewritten()[:-1],
    "a longer tail": rewritten() + b"\0",
    "metadata that are no texts": described({"format": [1]}),
    "metadata in a list": described([]),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_safetensors_refuses_is_refused_in_one_line(kind: str) -> None:
    with pytest.raises(SafetensorError):
        load(DAMAGED[kind])
    told = refusal(InMemory.read, bytearray(DAMAGED[kind]), HERE)
    assert "not readable as safetensors" in told


def test_tensors_share_the_bytes_of_the_file() -> None:
    content = bytearray(save({"a": torch.zeros(4)}))
    tensor = InMemory.read(content, HERE).get("a")
    content[-4:] = bytes(torch.tensor([1.0]).numpy())
    assert tensor.tolist() == [0, 0, 0, 1]
