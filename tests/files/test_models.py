"""Base models by name: which names are accepted, and which are refused in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapter_files import change, configure, tensors_of
from error_cases import refusal
from gguf_cases import write_gguf
from lorafold.errors import LorafoldError
from lorafold.models.loading import load_model
from lorafold.models.quantizations import ON_LOAD, STORAGES, StorageName, choose_storage
from lorafold.models.quantize_on_load import quantization_of
from lorafold.models.sources import ModelSource, resolve_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runtime.devices import choose_device

KINDS = ["llama", "qwen2", "gemma", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_loads_as_transformers_loads_it(tiny_model_dir, kind):
    path = tiny_model_dir(kind)
    source = resolve_model(path)
    assert source == ModelSource(path, str(path))
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    assert not model.training
    assert model.name_or_path == str(path)
    ids = tokenizer("a table for four", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert {p.dtype for p in load_model(path, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./no/such/model", "no such file or directory; expected smollm2, a directory"),
        ("missing.gguf", "no such file or directory; expected smollm2, a directory"),
        ("two words", "no such file or directory; expected smollm2, a directory"),
        ("nobody/no-such-model", "not on this machine, and can't be loaded from the hub"),
    ],
)
def test_a_missing_model_is_one_line_that_says_what_is_accepted(name, said):
    told = refusal(resolve_model, name)
    assert all(part in told for part in (said, name, "owner/name"))


def test_what_is_no_model_is_refused(tmp_path, tiny_model_dir):
    assert "no config.json in the directory" in refusal(resolve_model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter, expected a model; use the" in refusal(resolve_model, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "no *.safetensors in the directory" in refusal(resolve_model, tmp_path)
    assert "not a model" in refusal(resolve_model, tmp_path / "config.json")
    (tmp_path / "fake.gguf").write_bytes(b"not one")
    assert "another format, truncated, or newer" in refusal(resolve_model, tmp_path / "fake.gguf")
    told = refusal(resolve_model, tiny_model_dir("llama"), revision="main")
    assert "--revision main is only for models from the Hub" in told


def test_weights_that_are_missing_or_broken_are_refused(tmp_path, tiny_model_dir):
    path, name = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model"), "model.safetensors"
    lost = "model.layers.1.mlp.up_proj.weight"
    change(path, lambda tensors: tensors.pop(lost), name)
    missing = f"weights missing in the files (1): {lost}"
    assert missing in refusal(load_model, path, torch.float32)
    change(path, lambda tensors: tensors.update({lost: torch.zeros(3, 3)}), name)
    assert f"{lost}: shape [3, 3], expected [64, 32]" in refusal(load_model, path, torch.float32)
    (path / name).write_bytes((tiny_model_dir("llama") / name).read_bytes()[:-100])
    assert "loading in transformers failed" in refusal(load_model, path, torch.float32)
    configure(path, "config.json", model_type="no-such-architecture")
    assert "no-such-architecture" in refusal(load_model, path, torch.float32)


def test_devices_are_checked():
    assert choose_device("cpu") == torch.device("cpu")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    assert choose_device().type == next((kind for kind, there in found.items() if there), "cpu")
    for unknown in ("gpu", "cuda:", "cuda:x", "cpu0", ""):
        with pytest.raises(LorafoldError, match=r"found .*, expected cpu, cuda, cuda:N or mps"):
            choose_device(unknown)
    for absent in ("cuda:999", "cpu:1"):
        with pytest.raises(LorafoldError, match="not available on this machine, which has"):
            choose_device(absent)


def test_precision_follows_the_hardware_and_says_why():
    dtype, quantization, why = choose_storage("auto", "cpu")
    assert quantization is None
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else None
    if flags is not None:  # the kernel's word against torch's
        assert (dtype == torch.bfloat16) == bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags))
    assert why.startswith({torch.bfloat16: "bf16: ", torch.float32: "fp32: "}[dtype])
    assert choose_storage("bf16", "cpu")[0] == torch.bfloat16
    assert choose_storage("fp32", "cpu") == (torch.float32, None, "fp32: as requested")
    for packed in ("nf4", "int8"):
        assert choose_storage(packed, "cpu")[:2] == (dtype, packed)
    said = "storage fp4: unknown; expected auto, bf16, fp32, nf4 or int8, or fp8"
    assert said in refusal(choose_storage, "fp4", "cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_unpacked_once_with_nothing_lost(tiny_model_dir, tmp_path, cache):
    directory = tiny_model_dir("llama")
    write_gguf(directory, tmp_path / "tiny.gguf")
    source = resolve_model(tmp_path / "tiny.gguf")
    assert source.name == str(tmp_path / "tiny.gguf")
    assert cache in source.path.parents
    unpacked, original = load_model(source, torch.bfloat16), load_model(directory, torch.bfloat16)
    assert unpacked.state_dict().keys() == original.state_dict().keys()
    for name, weight in original.state_dict().items():
        assert torch.equal(unpacked.state_dict()[name], weight), name
    assert unpacked.config.get_text_config().tie_word_embeddings is False
    assert getattr(unpacked.config, "quantization_config", None) is None
    mine, theirs = load_tokenizer(source), load_tokenizer(directory)
    assert (mine.eos_token, mine.pad_token) == (theirs.eos_token, theirs.pad_token)
    assert mine.chat_template == theirs.chat_template
    assert unpacked.generation_config.eos_token_id == theirs.eos_token_id
    text = "Book a table<|im_end|> for  4 naïve 🙂 people\n at 20:00"
    assert mine(text).input_ids == theirs(text).input_ids
    before = (source.path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(tmp_path / "tiny.gguf").path == source.path
    assert (source.path / "model.safetensors").stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_written_is_one_line(tiny_model_dir, tmp_path, cache):
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf")
    cache.write_text("a file where the directory should be")
    told = refusal(resolve_model, tmp_path / "tiny.gguf")
    assert "set LORAFOLD_CACHE to another directory" in told


@pytest.mark.slow
def test_two_processes_that_unpack_at_once_both_get_the_copy(tiny_model_dir, tmp_path, cache):
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf")
    code = (
        "from lorafold.models.sources import resolve_model;"
        f" print(resolve_model({str(tmp_path / 'tiny.gguf')!r}).path)"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {child.communicate()[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    [name] = {Path(path).name for path in paths}
    assert sorted(os.listdir(cache / "models")) == [name, f"{name}.lock"]


@pytest.mark.slow
def test_the_embedded_model_answers_and_stops(smollm2):
    model, tokenizer = load_model("smollm2", torch.float32), load_tokenizer("smollm2")
    assert resolve_model("smollm2") == ModelSource(smollm2, "smollm2")
    assert model.name_or_path == "smollm2"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in tensors_of(smollm2).values()} == {torch.bfloat16}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    said = tokenizer.decode(answer[inputs["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_the_embedded_tokenizer_sees_every_digit_alone(smollm2):
    tokenizer = load_tokenizer("smollm2")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("at:  12").input_ids)
    # "Ġ", "Ġ" under GPT-2's rule: never seen in training
    assert tokens == ["at", ":", "ĠĠ", "1", "2"]


def test_each_storage_has_a_name_and_a_row_and_each_maker_is_there():
    assert {*get_args(StorageName)} == {*STORAGES, "auto"}
    for name in ON_LOAD:
        assert callable(STORAGES[name].pack)
        assert quantization_of(STORAGES[name].bnb_options, "model m") == name
