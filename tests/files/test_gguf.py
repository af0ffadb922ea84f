"""GGUF files: every weight that transformers reads from them, in their precision, or a refusal that
names what is missing.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig, Qwen3MoeConfig

import lorafold as lf
from gguf_cases import write_gguf
from lorafold.errors import LorafoldError
from lorafold.identity import of_model
from lorafold.models.loading import load_model
from lorafold.models.sources import configuration, resolve_model
from lorafold.models.tokenizer import load_tokenizer

LOST = "blk.1.ffn_up.weight"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def split(tiny_model_dir, tmp_path) -> list[Path]:
    """The files of a model that is split in several."""
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(tiny_model_dir("llama"), folder / "tiny.gguf", per_file=8)
    return sorted(folder.glob("*.gguf"))


def by_transformers(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    dense = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=dense, dtype=dtype
    ).state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_a_split_model_is_read_whole_by_any_of_its_files(split, tiny_model_dir, tmp_path, cache):
    assert [file.name for file in split] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    write_gguf(tiny_model_dir("llama"), tmp_path / "whole.gguf")
    expected = by_transformers(tmp_path / "whole.gguf", torch.float32)
    sources = [resolve_model(given) for given in (*split, split[0].parent)]
    assert len({source.path for source in sources}) == 1
    assert len({of_model(source) for source in sources}) == 1
    model = load_model(sources[0], torch.float32)
    assert same(model.state_dict(), expected)
    assert not list(sources[0].path.glob("*.gguf"))
    text = "Book a table  for 4"
    assert load_tokenizer(sources[0])(text) == load_tokenizer(tmp_path / "whole.gguf")(text)
    # the output matrix, which says that the head is not tied, is in another file than the metadata
    shown = [configuration(str(given)).to_dict() for given in (*split, split[0].parent)]
    for one in shown:
        del one["_name_or_path"]
    assert all(one == shown[0] for one in shown)
    assert shown[0]["tie_word_embeddings"] is model.config.tie_word_embeddings is False


def test_every_file_of_a_split_model_is_part_of_what_it_is(split, cache):
    source = resolve_model(split[0])
    before = of_model(source)
    for file in split:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert of_model(source) != before
        file.write_bytes(content)
    assert of_model(source) == before


def test_a_file_of_a_split_model_that_is_not_there_is_named(split, cache):
    split[1].rename(split[1].with_name("elsewhere"))
    for given in (split[0], split[2], split[0].parent):
        for read in (resolve_model, lambda name: configuration(str(name))):
            with pytest.raises(LorafoldError, match=r"missing beside it: tiny-00002-of-00003"):
                read(given)
    alone = split[0].rename(split[0].with_name("model.gguf"))
    with pytest.raises(LorafoldError, match=r"says that it is file 1 of 3, expected file 1 of 1"):
        resolve_model(alone)
    split[2].rename(split[0])
    split[1].with_name("elsewhere").rename(split[1])
    split[1].with_name(split[2].name).write_bytes(alone.read_bytes())
    with pytest.raises(LorafoldError, match=r"says that it is file 3 of 3, expected file 1 of 3"):
        resolve_model(split[1])


def test_weights_that_a_file_lacks_are_named(tiny_model_dir, tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model_dir("llama"), file, without=[LOST])
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(
            LorafoldError,
            match=rf"{file}: 1 weights are missing in its files: model\.layers\.1\.mlp\.up_proj",
        ):
            resolve_model(file)
    write_gguf(tiny_model_dir("llama"), file)
    whole = file.read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 200, 10, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(LorafoldError, match="expected a GGUF file, but it is none, was cut"):
            resolve_model(file)


def test_a_header_that_its_bytes_do_not_agree_with_is_refused(tiny_model_dir, tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model_dir("llama"), file)
    whole, name = file.read_bytes(), b"blk.0.ffn_down.weight"
    dims = whole.index(name) + len(name) + 4
    kind, place = dims + 16, dims + 20  # of a matrix
    tensors = int.from_bytes(whole[8:16], "little")
    lies = {
        8: ((tensors - 1).to_bytes(8, "little"), f".* after the last of the {tensors - 1}"),
        kind: ((1).to_bytes(4, "little"), ".* where the one before it ends"),  # F16
        place: ((0).to_bytes(8, "little"), "blk.0.ffn_down.weight at byte 0 of"),
    }
    for at, (value, said) in lies.items():
        file.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(LorafoldError, match=rf"{file}: its header is damaged: found {said}"):
            resolve_model(file)


def test_a_folder_has_one_model(tiny_model_dir, tmp_path, cache):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.gguf", "mmproj-a.gguf"):
        write_gguf(tiny_model_dir("llama"), folder / name)
    assert resolve_model(folder).path == resolve_model(folder / "a.gguf").path
    (folder / "b.gguf").touch()
    with pytest.raises(LorafoldError, match=r"found 2 GGUF models .* one of them: a.gguf, b.gguf"):
        resolve_model(folder)


KEPT = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32
}  # fmt: skip


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KEPT)
def test_a_copy_has_the_precision_of_its_file(kind, tiny_model_dir, tmp_path, cache):
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", kind=kind)
    expected = by_transformers(tmp_path / "tiny.gguf", torch.float32)
    source = resolve_model(tmp_path / "tiny.gguf")
    assert same(load_model(source, torch.float32).state_dict(), expected)
    stored = load_file(source.path / "model.safetensors")
    assert {weight.dtype for weight in stored.values() if weight.dim() > 1} == {KEPT[kind]}
    # vectors are fp32 in all files; those of the tiny model are ones
    assert source.config()["dtype"] == str(KEPT[kind]).removeprefix("torch.")
    assert resolve_model(tmp_path / "tiny.gguf", fp32=True).path == source.path


def test_vectors_that_fp16_does_not_have_stay_fp32(tiny_model_dir, tmp_path, cache):
    directory, name = tiny_model_dir("llama"), "blk.0.attn_norm.weight"
    values = np.linspace(0.9, 1.1, 32, dtype=np.float32)
    write_gguf(directory, tmp_path / "tiny.gguf", kind="F16", besides={name: values})
    source = resolve_model(tmp_path / "tiny.gguf")
    stored = load_file(source.path / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert torch.equal(stored, torch.from_numpy(values))


def test_fewer_bits_are_bf16_unless_fp32_is_asked_for(tiny_model_dir, tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model_dir("llama"), file, kind="Q4_1")
    exact, rounded = (by_transformers(file, dtype) for dtype in (torch.float32, torch.bfloat16))
    asked = lf.load_model(file, storage="fp32")
    assert same(asked.state_dict(), exact)
    for storage in ("auto", "bf16"):
        found = lf.load_model(file, storage=storage).state_dict()
        assert same({name: weight.bfloat16() for name, weight in found.items()}, rounded)
    fp32, bf16 = (resolve_model(file, fp32=fp32) for fp32 in (True, False))
    assert of_model(fp32) != of_model(bf16)
    assert {w.dtype for w in load_file(bf16.path / "model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("trained", ["fp32", "bf16"])
def test_an_adapter_is_merged_into_the_copy_that_it_was_trained_on(
    trained, tiny_model_dir, tmp_path, cache
):
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model_dir("llama"), file, kind="Q4_1")
    adapter = lf.attach(lf.load_model(file, storage=trained), lf.LoRA(rank=2), ["q_proj"])
    adapter.save(tmp_path / "a")
    lf.merge(file, tmp_path / "a", tmp_path / "out")
    own = by_transformers(file, {"fp32": torch.float32, "bf16": torch.bfloat16}[trained])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[name].float(), own[name].float())


def test_tensors_that_nobody_reads_are_told_or_refused(tiny_model_dir, tmp_path, cache, caplog):
    """Those of the model's own blocks change what it computes; others are of other models."""
    beside = {f"blk.{n}.odd.weight": np.ones(3, np.float32) for n in range(2, 11)}
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", besides=beside)
    with caplog.at_level(logging.WARNING, "lorafold"):
        resolve_model(tmp_path / "tiny.gguf")
    assert "9 tensors of its files are not read" in caplog.text
    assert "blk.6.odd.weight and 4 more" in caplog.text
    inside = {"blk.1.attn_q.bias": np.ones(32, np.float32)}
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", besides=inside)
    with pytest.raises(LorafoldError, match=r"no place for 1 tensors .*: blk\.1\.attn_q\.bias"):
        resolve_model(tmp_path / "tiny.gguf")


def test_half_of_the_experts_is_named_if_it_is_missing(tiny_model_dir, tmp_path, cache):
    """transformers reads zeros for it."""
    gate = {"blk.0.ffn_gate_exps.weight": np.ones((2, 3, 32), np.float32)}
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", besides=gate)
    with pytest.raises(LorafoldError, match=r"1 weights are missing .*blk\.0\.ffn_up_exps\.weigh"):
        resolve_model(tmp_path / "tiny.gguf")


@pytest.mark.slow
def test_experts_are_read_whole(tiny_model_dir, tmp_path, cache, caplog):
    directory = shutil.copytree(tiny_model_dir("llama"), tmp_path / "experts")
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=300,
        max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    file = tmp_path / "tiny.gguf"
    write_gguf(directory, file, pre="qwen2")
    with caplog.at_level(logging.WARNING, "lorafold"):
        found = load_model(file, torch.float32)
    assert same(found.state_dict(), model.state_dict())
    assert found.config.tie_word_embeddings
    assert caplog.text == ""
    for lost in ("gate", "up", "down"):
        write_gguf(directory, file, pre="qwen2", without=[f"blk.1.ffn_{lost}_exps.weight"])
        with pytest.raises(LorafoldError, match="1 weights are missing in its files"):
            resolve_model(file)


@pytest.fixture
def on_hub(tmp_path, monkeypatch) -> Path:
    """The snapshot of a repository of the hub, owner/name, that is on this machine."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    own, commit = tmp_path / "hub" / "models--owner--name", "a" * 40
    (own / "refs").mkdir(parents=True)
    (own / "refs" / "main").write_text(commit)
    (own / "snapshots" / commit / "Q8_0").mkdir(parents=True)
    return own / "snapshots" / commit


@pytest.mark.parametrize("per_file", [0, 8])
def test_the_only_gguf_model_of_a_repository_is_read(
    per_file: int, on_hub, tiny_model_dir, cache
):
    (on_hub / "mmproj-tiny.gguf").write_bytes(b"of a tower")
    write_gguf(tiny_model_dir("llama"), on_hub / "Q8_0" / "tiny.gguf", per_file=per_file)
    found = resolve_model("owner/name")
    first = min((on_hub / "Q8_0").glob("*.gguf"))
    assert found.name == "owner/name"
    assert found.path == resolve_model(first).path
    shown = [configuration(name).to_dict() for name in ("owner/name", str(first))]
    assert [one.pop("_name_or_path") is not None for one in shown] == [True, True]
    assert shown[0] == shown[1]


def test_the_gguf_models_of_a_repository_are_named(on_hub, tiny_model_dir, cache):
    for name in ("a.gguf", "Q8_0/b.gguf"):
        write_gguf(tiny_model_dir("llama"), on_hub / name)
    for read in (resolve_model, configuration):
        with pytest.raises(LorafoldError) as told:
            read("owner/name")
        assert str(told.value) == (
            "model owner/name: found 2 GGUF models in it, expected one; give the path of one as"
            " --model (hf download owner/name FILE prints it): Q8_0/b.gguf, a.gguf"
        )
    (on_hub / "a.gguf").unlink()
    (on_hub / "Q8_0" / "b.gguf").unlink()
    with pytest.raises(LorafoldError, match="model owner/name: found no config"):
        resolve_model("owner/name")
