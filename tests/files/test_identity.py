"""What a thing is, as one digest: it changes with everything that can change an answer."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import lorafold as lf
from lorafold.errors import LorafoldError
from lorafold.files import contents
from lorafold.files.atomic import sha256
from lorafold.identity import joined, of_adapter, of_code, of_model
from lorafold.models.sources import ModelSource
from lorafold.peft.adapter_directory import SavedAdapter


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_space(path: Path) -> None:
    """Write a space over the last byte."""
    path.write_bytes(path.read_bytes()[:-1] + b" ")


def test_a_file_is_read_once_and_known_by_its_marks(cache, tmp_path, monkeypatch) -> None:
    file = tmp_path / "it"
    file.write_bytes(b"one")
    read: list[Path] = []
    monkeypatch.setattr(contents, "file_sha256", lambda path: (read.append(path), sha256(path))[1])
    monkeypatch.setattr(contents, "FRESH_SECONDS", 0.0)
    assert contents.file_digest(file) == contents.file_digest(file) == (3, sha256(file))
    assert read == [file]
    file.write_bytes(b"two")
    assert contents.file_digest(file) == (3, sha256(file))
    assert read == [file, file]


def test_a_file_that_was_written_just_now_is_read_again(cache, tmp_path) -> None:
    file = tmp_path / "it"
    file.write_bytes(b"one")
    past = time.time() - 60
    os.utime(file, (past, past))
    contents.file_digest(file)  # its content is old; its marks changed just now
    assert not (cache / "digests").exists()


def test_a_kept_digest_that_is_damaged_is_made_anew(cache, tmp_path, monkeypatch) -> None:
    file = tmp_path / "it"
    file.write_bytes(b"one")
    monkeypatch.setattr(contents, "FRESH_SECONDS", 0.0)
    contents.file_digest(file)
    [entry] = (cache / "digests" / "known").iterdir()
    for damaged in ("", "[]", '{"marks": [], "sha256": 1}'):
        entry.write_text(damaged)
        assert contents.file_digest(file) == (3, sha256(file))


def test_a_file_of_the_hub_is_taken_by_its_name(cache, tmp_path) -> None:
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert contents.file_digest(link) == (7, "a" * 64)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
     "tokenizer_config.json", "chat_template.jinja"],
)  # fmt: skip
def test_a_model_is_another_with_another_byte(name: str, tiny_model_dir, cache, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir("llama"), copy)
    (copy / "chat_template.jinja").touch()
    (copy / "own.py").write_text("a = 1")
    source, with_code = ModelSource(copy, "copy"), ModelSource(copy, "", trust_remote_code=True)
    before, trusted = of_model(source), of_model(with_code)
    assert of_model(ModelSource(copy, "by another name")) == before != trusted
    (copy / "README.md").write_text("a card")
    (copy / "own.py").write_text("a = 2")
    assert of_model(source) == before
    assert of_model(with_code) != trusted
    put_space(copy / name)
    assert of_model(source) != before


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_counts_where_it_runs(
    file: str, tiny_model_dir, cache, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hub = tmp_path / "model", tmp_path / "hub"
    shutil.copytree(tiny_model_dir("llama"), model)
    there = json.loads((model / file).read_text()) if (model / file).is_file() else {}
    there["auto_map"] = {"AutoModelForCausalLM": "them/code--modeling_own.OwnForCausalLM"}
    (model / file).write_text(json.dumps(there))
    code = hub / "models--them--code"
    (code / "snapshots" / "5d1c").mkdir(parents=True)
    (code / "refs").mkdir()
    (code / "refs" / "main").write_text("5d1c")
    (code / "snapshots" / "5d1c" / "modeling_own.py").write_text("from .parts import a")
    (code / "snapshots" / "5d1c" / "parts.py").write_text("a = 1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    source, with_code = ModelSource(model, ""), ModelSource(model, "", trust_remote_code=True)
    before, trusted = of_model(source), of_model(with_code)
    (code / "snapshots" / "5d1c" / "parts.py").write_text("a = 2")
    assert of_model(source) == before
    assert of_model(with_code) != trusted


def test_a_shard_that_lies_elsewhere_counts(tiny_model_dir, cache, tmp_path) -> None:
    copy, shard = tmp_path / "copy", tmp_path / "shared" / "model.safetensors"
    shutil.copytree(tiny_model_dir("llama"), copy)
    shard.parent.mkdir()
    (copy / "model.safetensors").rename(shard)
    index = {"weight_map": {"a": "../shared/model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    before = of_model(ModelSource(copy, "copy"))
    put_space(shard)
    assert of_model(ModelSource(copy, "copy")) != before


def test_an_adapter_is_another_with_another_word_and_a_stack_with_another_order(
    tiny_model, cache, tmp_path
) -> None:
    one = lf.attach(tiny_model("llama"), lf.LoRA(rank=2), name="it").save(tmp_path / "one")
    two = shutil.copytree(one, tmp_path / "two")
    assert of_adapter(one) == of_adapter(two)
    (two / "chat_template.jinja").write_text("{{ messages }}")
    assert of_adapter(one) != of_adapter(two)
    assert of_adapter(one, words=False) == of_adapter(two, words=False)
    assert of_adapter(SavedAdapter.open(two)) == of_adapter(two)
    first, second = of_adapter(one), of_adapter(two)
    assert joined(["base", first, second]) != joined(["base", second, first])
    assert joined(["base", first]) != joined(["other", first])
    assert joined(["base"]) == "base"
    with pytest.raises(LorafoldError, match="expected the directory of an adapter"):
        of_adapter(tmp_path)


def test_code_is_another_with_another_room_or_package() -> None:
    found = [of_code("ops"), of_code("ops", "core"), of_code("ops", packages=("torch",))]
    assert len(set(found)) == 3
