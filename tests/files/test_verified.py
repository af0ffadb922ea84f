"""One flipped bit in a file that lorafold wrote and reads is found."""

import hashlib
import json
import logging
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from adapter_cases import make_adapter, resaved
from adapter_files import WEIGHTS, json_of
from conversation_cases import jsonl
from error_cases import refusal
from gguf_cases import write_gguf
from lorafold.api.merge import merge
from lorafold.cli import main
from lorafold.files import atomic, contents
from lorafold.files.atomic import MANIFEST, verify
from lorafold.files.paths import cache_directory
from lorafold.inspecting.resize import extract
from lorafold.inspecting.spectra import cached_svd
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.models.sources import read_configuration, resolve_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.peft.adapter_directory import FILES, SavedAdapter, open_all
from lorafold.resolve import Base
from lorafold.resolve.base import known_classes
from lorafold.training.checkpoint import RunDirectory

pytestmark = pytest.mark.usefixtures("unestimated")

BITS, ROW = 40, {"prompt": "Book", "completion": "a table"}


def flip(file: Path, seed: int) -> None:
    """Flip one bit of the file, drawn by the seed."""
    content = bytearray(file.read_bytes())
    bit = random.Random(seed).randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def says_damaged(message: str, file: str) -> bool:
    why = "content differs from the manifest: the files were damaged or edited; restore them, or"
    return f"{file}: {why} delete {MANIFEST} if you edited them" in message


@pytest.fixture
def base(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A saved adapter with a tokenizer beside it."""
    laid = lf.load(load_model(base, torch.float32), make_adapter(base, tmp_path / "plain"))
    return laid.save(tmp_path / "adapter", tokenizer=load_tokenizer(base))


@pytest.fixture
def merged(base: Path, adapter: Path, tmp_path: Path) -> Path:
    """A merged model in several files."""
    shards = resaved(base, tmp_path / "shards", max_shard_size="20KB")
    merge(str(shards), [adapter], tmp_path / "merged", certificate=False)
    return tmp_path / "merged"


@pytest.fixture
def told(monkeypatch, capsys):
    """Run a command that fails with one line on stderr and nothing on stdout; return the line."""
    monkeypatch.setenv("LORAFOLD_TUNE", "off")
    handlers = list(logging.getLogger("lorafold").handlers)

    def run(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["lorafold", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            main()
        printed = capsys.readouterr()
        assert (ending.value.code, printed.out) == (2, "")
        assert "Traceback" not in printed.err
        assert printed.err.count("error: ") == 1
        last: str = printed.err.splitlines()[-1]
        assert last.startswith("error: ")
        return last

    yield run
    logging.getLogger("lorafold").handlers[:] = handlers


def below(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_forty_bits_of_an_adapter(adapter: Path, tiny_model) -> None:
    model, whole = tiny_model("llama"), (adapter / WEIGHTS).read_bytes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in range(BITS):
        flip(adapter / WEIGHTS, seed)
        assert says_damaged(refusal(lf.load, model, adapter), WEIGHTS)
        assert model.state_dict().keys() == before.keys()
        (adapter / WEIGHTS).write_bytes(whole)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    lf.load(model, adapter)


COMMANDS = [
    "eval --data {rows} --adapter {adapter}",
    "generate --prompt Book --adapter {adapter}",
    "merge --adapter {adapter} --out {out}",
    "inspect {adapter} --html {out}",
    "inspect {plain} --against {adapter} --html {out}",
    "compose --adapter {plain} --adapter {adapter} --how linear --out {out}",
    "compose --adapter {plain} --adapter {adapter} --how linear --how svd --out {out}",
    "resize {adapter} --rank 2 --out {out}",
    "train --data {rows} --init-adapter {adapter} --out {out} --set steps=1",
]


@pytest.mark.few(9)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json", "lorafold.json"])
def test_every_command_that_reads_an_adapter(command, file, base, adapter, tmp_path, told) -> None:
    rows, out = jsonl(tmp_path / "rows.jsonl", ROW), tmp_path / "out"
    flip(adapter / file, COMMANDS.index(command))
    names = {"rows": rows, "adapter": adapter, "plain": tmp_path / "plain", "out": out}
    before = below(tmp_path)
    line = told(*(part.format(**names) for part in command.split()), "--model", base)
    assert says_damaged(line, file)
    assert below(tmp_path) == before
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_bit_of_an_adapter_s_tokenizer(file: str, base, adapter, tmp_path: Path, told) -> None:
    flip(adapter / file, 0)
    for stack in ([adapter], [adapter, tmp_path / "plain"]):
        assert says_damaged(refusal(Base(base).tokenizer, open_all(stack)), file)
    line = told("generate", "--prompt", "Book", "--model", base, "--adapter", adapter)
    assert says_damaged(line, file)
    # the weights are read without it
    lf.load(load_model(base, torch.float32), adapter)


ROWS = [{"prompt": f"Book {n}", "completion": "a table"} for n in range(4)]
EVALUATED = {"completions": False, "device": "cpu"}
READING = {
    "evaluate": lambda base, adapter, out: lf.evaluate(base, ROWS, adapters=adapter, **EVALUATED),
    "merge": lambda base, adapter, out: lf.merge(base, adapter, out, device="cpu"),
    "compose": lambda base, adapter, out: lf.compose([adapter], out, model=base),
    "resize": lambda base, adapter, out: lf.resize(adapter, out, model=base, rank=2),
    "train": lambda base, adapter, out: lf.train(
        lf.Recipe(steps=1, storage="fp32"), data=ROWS, out=out, model=base, over=adapter
    ),
}
looked_at: Counter[str] | None = None  # files by path, while a test counts


@sys.addaudithook
def _counted(event: str, given: tuple[Any, ...]) -> None:
    if looked_at is not None and event == "open" and isinstance(given[0], str):
        looked_at[given[0]] += 1


@pytest.mark.parametrize("verb", READING)
def test_an_adapter_is_opened_once(verb: str, base, adapter, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "looked_at", Counter())
    READING[verb](base, adapter, tmp_path / "out")
    found = {name: looked_at[str(adapter / name)] for name in FILES}  # type: ignore[index]
    assert found == dict.fromkeys(FILES, 1)


def test_what_is_gone_is_not_overlooked(base: Path, adapter: Path) -> None:
    """Without its record an adapter fits every base, without its tokenizer it speaks another."""
    (adapter / "tokenizer_config.json").unlink()
    told = refusal(Base(base).tokenizer, [SavedAdapter.open(adapter)])
    assert "tokenizer_config.json: missing" in told
    (adapter / "lorafold.json").unlink()
    assert "lorafold.json: missing" in refusal(SavedAdapter.open, adapter)
    assert "lorafold.json: missing" in refusal(lf.load, load_model(base, torch.float32), adapter)


def test_a_file_of_another_size_says_its_size(adapter: Path, tiny_model) -> None:
    size = (adapter / WEIGHTS).stat().st_size
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-1])
    message = refusal(lf.load, tiny_model("llama"), adapter)
    assert message.startswith(f"{adapter}: {WEIGHTS}: {size - 1} bytes, expected {size}: the files")


@pytest.mark.parametrize("file", ["model-00002-of-*.safetensors", "model.*.index.json"])
def test_a_bit_of_a_merged_model(file: str, base, merged, adapter, tmp_path: Path, told) -> None:
    [shard] = merged.glob(file)
    flip(shard, 1)
    for storage in (torch.float32, Storage(torch.float32, "nf4")):
        assert says_damaged(refusal(load_model, merged, storage), shard.name)
    assert says_damaged(refusal(merge, str(merged), [adapter], tmp_path / "out"), shard.name)
    pair = Base(base), Base(merged)
    assert says_damaged(refusal(extract, *pair, tmp_path / "out", rank=2), shard.name)
    rows = jsonl(tmp_path / "rows.jsonl", ROW)
    for command in (
        ("eval", "--data", rows),
        ("generate", "--prompt", "Book"),
        ("inspect", adapter),
        ("train", "--data", rows, "--out", tmp_path / "out", "--set", "steps=1"),
    ):
        assert says_damaged(told(*command, "--model", merged), shard.name)
    assert not (tmp_path / "out").exists()


def test_a_bit_of_what_lies_beside_a_merged_model_s_weights(merged, adapter, tmp_path) -> None:
    whole = (merged / "tokenizer.json").read_bytes()
    flip(merged / "tokenizer.json", 2)
    load_model(merged, torch.float32)
    assert says_damaged(refusal(load_tokenizer, merged), "tokenizer.json")
    # damage is not carried over to where a new manifest would vouch for it
    plain = tmp_path / "plain"
    for certificate in (True, False):
        message = refusal(merge, str(merged), [plain], tmp_path / "out", certificate=certificate)
        assert says_damaged(message, "tokenizer.json")
    (merged / "tokenizer.json").write_bytes(whole)
    flip(merged / "config.json", 2)
    for do in (
        lambda: load_model(merged, torch.float32),
        lambda: known_classes(Base(merged), []),
        lambda: read_configuration(str(merged)),
    ):
        assert says_damaged(refusal(do), "config.json")


def test_a_bit_of_a_model_trained_whole(tiny_model, tmp_path: Path) -> None:
    path = lf.attach(tiny_model("llama"), lf.Full()).save(tmp_path / "whole")
    load_model(path, torch.float32)
    flip(path / "model.safetensors", 3)
    assert says_damaged(refusal(load_model, path, torch.float32), "model.safetensors")


def test_what_is_not_read_does_not_matter(base: Path, adapter: Path, merged: Path) -> None:
    for path in (adapter, merged):
        (path / "README.md").write_text("# My own words\n")
        (path / "notes.txt").write_text("added")
    lf.load(load_model(base, torch.float32), adapter)
    Base(base).tokenizer([SavedAdapter.open(adapter)])
    load_model(merged, torch.float32)
    load_tokenizer(merged)
    # nor do the tokenizer's files where the weights are read, and the other way round
    flip(adapter / "tokenizer.json", 4)
    lf.load(load_model(base, torch.float32), adapter)


@pytest.mark.parametrize("manifest", [None, '{"name": "an app", "icons": []}'], ids=str)
def test_without_a_manifest_of_ours_all_is_as_ever(manifest, base, adapter, tiny_model) -> None:
    config = json_of(adapter) | {"lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "adapter_config.json: " in refusal(lf.load, tiny_model("llama"), adapter)
    (adapter / MANIFEST).unlink()
    if manifest is not None:
        (adapter / MANIFEST).write_text(manifest)
    assert lf.load(tiny_model("llama"), adapter).spec.alpha == 1
    Base(base).tokenizer([SavedAdapter.open(adapter)])


@pytest.mark.parametrize(
    "manifest", [b"{", b"\xff", b"[]", b'{"files": []}', b'{"files": {"a": {}}}'], ids=repr
)
def test_a_manifest_that_is_none(manifest: bytes, base: Path, adapter: Path, told) -> None:
    (adapter / MANIFEST).write_bytes(manifest)
    line = told("generate", "--prompt", "Book", "--model", base, "--adapter", adapter)
    assert line.startswith(f"error: {adapter}: {MANIFEST}: not readable as a manifest: the files")


def test_each_file_is_hashed_once_a_load(base, adapter: Path, merged: Path, monkeypatch) -> None:
    hashed, read, sha256 = list[str](), list[bytes](), atomic.sha256

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    def counted_bytes(content: bytes) -> Any:
        read.append(content)
        return hashlib.sha256(content)

    model = load_model(base, torch.float32)
    monkeypatch.setattr(atomic, "sha256", counted)
    monkeypatch.setattr(contents, "sha256", counted_bytes)
    lf.load(model, adapter)
    files = ["adapter_config.json", WEIGHTS, "lorafold.json", MANIFEST]
    # besides, the digests of an adapter and of its base are those of a few lines
    assert [read.count((adapter / name).read_bytes()) for name in files] == [1] * len(files)
    assert sum(map(len, read)) < 1.1 * sum((adapter / name).stat().st_size for name in files)
    assert hashed == []
    load_model(merged, Storage(torch.float32, "nf4"))
    weights = [name for name in hashed if "safetensors" in name]
    assert sorted(weights) == sorted(path.name for path in merged.glob("*.safetensors*"))


def test_a_damaged_copy_of_a_gguf_file_is_made_anew(tiny_model_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf")
    source = resolve_model(tmp_path / "tiny.gguf")
    read = load_model(source, torch.float32).state_dict()
    expected = {name: tensor.clone() for name, tensor in read.items()}  # they are mapped
    flip(source.path / "model.safetensors", 5)
    found = load_model(tmp_path / "tiny.gguf", torch.float32).state_dict()
    assert verify(source.path) == []
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    flip(source.path / "tokenizer.json", 6)
    load_tokenizer(source)
    assert verify(source.path) == []
    (source.path / MANIFEST).unlink()
    assert resolve_model(tmp_path / "tiny.gguf") == source
    assert verify(source.path) == []
    kept = {path.name for path in source.path.parent.iterdir()}
    assert kept == {source.path.name, f"{source.path.name}.lock"}


def test_damaged_singular_vectors_are_made_anew(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path))
    w = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    cached_svd(w)
    [file] = cache_directory().rglob("svd.safetensors")
    whole = file.read_bytes()
    flip(file, 7)
    assert torch.allclose(cached_svd(w).dense(), w, atol=1e-2)
    assert file.read_bytes() == whole


def test_a_bit_of_what_a_run_to_resume_is(tmp_path: Path) -> None:
    run, identity = RunDirectory(tmp_path / "out"), {"seed": 0}
    run.start(identity)
    run.check(identity)
    flip(run.path / "run.json", 8)
    assert says_damaged(refusal(run.check, identity), "run.json")
    shutil.rmtree(run.path)
    assert "no run to resume" in refusal(run.check, identity)
