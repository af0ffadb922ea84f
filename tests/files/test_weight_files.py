"""Which files of a model are read: the same ones by all that reads weights, with what is missing or
left over in them told by name.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_cases import resaved
from lorafold.errors import LorafoldError
from lorafold.models.checkpoint import mapped_model_of
from lorafold.models.classifier import load_classifier
from lorafold.models.fingerprint import of
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.models.sources import resolve_model
from lorafold.models.weights import FileWeights, model_files


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
    with pytest.raises(LorafoldError, match=f"neither .* nor {INDEX} beside {first}, {second}"):
        read(shards)
    for broken, said in (("{", "not readable as JSON"), ("{}", "no weight_map"),
                         ('{"weight_map": {"a": 1}}', "no weight_map")):  # fmt: skip
        (shards / INDEX).write_text(broken)
        with pytest.raises(LorafoldError, match=f"{INDEX}: .*{said}"):
            read(shards)
    (shards / INDEX).write_text(index)
    (shards / second).unlink()
    with pytest.raises(LorafoldError, match=f"{INDEX} names files that are missing: {second}$"):
        read(shards)


def test_shards_that_no_index_names_are_told(shards, caplog):
    with caplog.at_level(logging.WARNING):
        load_model(shards, torch.float32)
        assert caplog.messages == []
        left = "model-00002-of-00009.safetensors"
        shutil.copy(shards / sorted(p.name for p in shards.glob("*.safetensors"))[0], shards / left)
        load_model(shards, torch.float32)
    assert caplog.messages == [f"model {shards}: 1 files beside its weights are not read: {left}"]


@pytest.mark.parametrize("content", ["null", '{"model_type": "llama", "rope_parameters": 3}'])
def test_a_configuration_that_transformers_stumbles_over_is_one_line(content, shards):
    (shards / "config.json").write_text(content)
    with pytest.raises(LorafoldError, match=f"model {shards}: transformers can't load it: .+"):
        load_model(shards, torch.float32)


def test_a_file_beside_an_index_is_what_every_reader_takes(shards, tiny_model_dir):
    weights = load_file(tiny_model_dir("llama-wide") / "model.safetensors")
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
    weights = load_file(path / "model.safetensors")
    lost = {f"model.layers.2.{n}.weight": torch.ones(3) for n in range(9)}
    save_file(weights | lost, path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "lorafold"):
        load_model(tiny_model_dir("llama"), torch.float32)
        assert caplog.text == ""
        load_model(path, torch.float32)
    assert "9 tensors of its files are not read" in caplog.text
    assert "model.layers.2.4.weight and 4 more" in caplog.text
