"""All readers take the same weight files, and headers are read as safetensors reads them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from adapter_cases import resaved
from adapter_files import change, tensors_of
from error_cases import refusal
from lorafold.errors import LorafoldError
from lorafold.files.safetensors_header import ELEMENT_BYTES
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.classifier import load_classifier
from lorafold.models.fingerprint import of
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.models.sources import resolve_model
from lorafold.models.weights import DTYPES, FileWeights, InMemory, model_files


def of_files(path: Path) -> Any:
    return of(FileWeights(model_files(path)))


READERS: dict[str, Callable[[Path], Any]] = {
    "plain": lambda path: load_model(path, torch.float32),
    "nf4": lambda path: load_model(path, Storage(torch.float32, "nf4")),
    "classifier": lambda path: load_classifier(resolve_model(path), ("a", "b"), 0, torch.float32),
    "mapped": lambda path: mapped_model_of(resolve_model(path)).model,
    "fingerprint": of_files,
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(tiny_model_dir, tmp_path) -> Path:
    return resaved(tiny_model_dir("llama-wide"), tmp_path / "shards", max_shard_size="100KB")


@pytest.mark.parametrize("reader", READERS)
def test_what_is_missing_is_named_by_every_reader(reader, shards):
    read = READERS[reader]
    index = (shards / INDEX).read_text()
    first, second, *_ = sorted(path.name for path in shards.glob("*.safetensors"))
    (shards / INDEX).unlink()
    with pytest.raises(LorafoldError, match=rf"nor {INDEX} \(only {first}, {second}"):
        read(shards)
    for broken, said in (("{", "not readable as JSON"), ("{}", "no valid weight_map"),
                         ('{"weight_map": {"a": 1}}', "no valid weight_map")):  # fmt: skip
        (shards / INDEX).write_text(broken)
        with pytest.raises(LorafoldError, match=f"{INDEX}: .*{said}"):
            read(shards)
    (shards / INDEX).write_text(index)
    (shards / second).unlink()
    with pytest.raises(LorafoldError, match=f"{INDEX} lists files that are missing: {second}$"):
        read(shards)


def test_shards_that_no_index_names_are_told(shards, caplog):
    with caplog.at_level(logging.WARNING):
        load_model(shards, torch.float32)
        assert caplog.messages == []
        left = "model-00002-of-00009.safetensors"
        shutil.copy(shards / sorted(p.name for p in shards.glob("*.safetensors"))[0], shards / left)
        load_model(shards, torch.float32)
    assert caplog.messages == [f"model {shards}: ignoring other weight files (1): {left}"]


@pytest.mark.parametrize("content", ["null", '{"model_type": "llama", "rope_parameters": 3}'])
def test_a_configuration_that_transformers_stumbles_over_is_one_line(content, shards):
    (shards / "config.json").write_text(content)
    with pytest.raises(LorafoldError, match=f"model {shards}: loading in transformers failed: .+"):
        load_model(shards, torch.float32)


def test_a_file_beside_an_index_is_what_every_reader_takes(shards, tiny_model_dir):
    weights = tensors_of(tiny_model_dir("llama-wide"))
    doubled = {name: 2 * weight for name, weight in weights.items()}
    save_file(doubled, shards / "model.safetensors", metadata={"format": "pt"})
    name = "model.embed_tokens.weight"
    for reader in ("plain", "nf4", "mapped"):
        found = READERS[reader](shards).state_dict()[name]
        torch.testing.assert_close(found.float(), doubled[name], rtol=2**-8, atol=0)
    assert of_files(shards) == of_files(without_shards(shards))


def without_shards(path: Path) -> Path:
    alone = shutil.copytree(path, path.with_name("alone"))
    for file in (*alone.glob("model-*"), alone / INDEX):
        file.unlink()
    return alone


def test_tensors_that_a_model_has_no_place_for_are_told(tiny_model_dir, tmp_path, caplog):
    path = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    lost = {f"model.layers.2.{n}.weight": torch.ones(3) for n in range(9)}
    change(path, lambda tensors: tensors.update(lost), "model.safetensors")
    with caplog.at_level(logging.WARNING, "lorafold"):
        load_model(tiny_model_dir("llama"), torch.float32)
        assert caplog.text == ""
        load_model(path, torch.float32)
    assert "ignoring tensors in the files (9)" in caplog.text
    assert "model.layers.2.4.weight and 4 more" in caplog.text


HERE = Path("adapter_model.safetensors")


def test_every_dtype_and_shape_is_what_safetensors_reads() -> None:
    assert DTYPES.keys() == ELEMENT_BYTES.keys()
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
