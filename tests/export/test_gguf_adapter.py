"""Adapters as GGUF files: the products, read by lorafold's loader and in llama.cpp itself."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import lorafold as lf
from adapter_files import json_of
from conftest import refused
from export_cases import proof_of
from gguf_models import CONFIGS, UNREAD, moved, quietly, saved
from lorafold.errors import LorafoldError
from lorafold.exporting.engines import run_engine
from lorafold.exporting.gguf_metadata import architecture_of
from lorafold.exporting.gguf_model import adapter_tensors, write_model
from lorafold.exporting.proof import ReferenceAnswers, compare
from lorafold.exporting.run import FEW_PROMPTS, MAX_LOST
from lorafold.exporting.target import Subject, update_of
from lorafold.methods import METHODS
from lorafold.models.sources import resolve_model
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import base_for

MIXTURES = ("mixtral", "qwen3_moe")
EMBEDDING = "token_embd.weight"
EVERYWHERE = ("embed_tokens", "lm_head", "q_proj", "k_proj", "down_proj")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The directory of the tiny model of a kind, made once."""
    return cache(lambda kind: saved(kind, tmp_path_factory.mktemp("of") / "base"))


def written(base: Path, adapter: Path, out: Path, **options) -> Path:
    done = lf.export(base, adapter, out, to="gguf", prove=False, device="cpu", **options)
    assert done.unproved == "--no-proof was given"
    return out / "adapter.gguf"


def products(file: Path) -> dict[str, torch.Tensor]:
    """What the file adds to each tensor of a base, as llama.cpp multiplies."""
    found = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(file).tensors}
    ends = {name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")}
    assert len(found) == 2 * len(ends)
    both = {name: found[f"{name}.lora_b"] @ found[f"{name}.lora_a"] for name in ends - {EMBEDDING}}
    if EMBEDDING in ends:
        both[EMBEDDING] = found[f"{EMBEDDING}.lora_a"] @ found[f"{EMBEDDING}.lora_b"].mT
    return both


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in UNREAD])
def test_the_product_on_the_base_is_the_merged_model(kind, base_of, tmp_path):
    base = base_of(kind)
    untied = kind in ("llama", "qwen2", "mistral")
    adapter = moved(base, tmp_path / "adapter", **({"targets": EVERYWHERE} if untied else {}))
    write_model(base, tmp_path / "model.gguf", "F32", quietly)
    added = products(written(base, adapter, tmp_path / "out"))
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf", "r+").tensors:
        if tensor.name in added:
            tensor.data[...] += added.pop(tensor.name).numpy()
    assert not added
    lf.merge(base, adapter, tmp_path / "merged", certificate=False, device="cpu")
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (tmp_path / "merged", resolve_model(tmp_path / "model.gguf").path)
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_what_lorafold_does(kind, base_of, tmp_path):
    base = base_of(kind)
    adapter = moved(base, tmp_path / "adapter")
    done = lf.export(base, adapter, tmp_path / "out", to="gguf", device="cpu")
    proof = proof_of(done)
    assert proof.distance > 1e-2
    assert proof.changed == pytest.approx(proof.distance, rel=0.5)
    assert proof.prompts == 32
    assert proof.top >= 31  # two may be as good as equal
    if kind not in MIXTURES:  # there a token of two experts as good as equal goes another way
        assert proof.greedy + proof.near == 32
    assert not proof.other_tokens
    written = {one.name for one in (tmp_path / "out").iterdir()}
    assert written == {"adapter.gguf", "export.json", "manifest.json"}


def test_an_adapter_below_the_engine_s_rounding_is_as_near_as_the_base(base_of, tmp_path):
    base = base_of("llama")
    adapter = moved(base, tmp_path / "adapter", size=3e-4)
    done = lf.export(base, adapter, tmp_path / "out", to="gguf", device="cpu")
    assert proof_of(done, None).share > MAX_LOST
    assert done.proof.rounding
    assert "for the base alone" in done.summary()


@pytest.mark.slow
@pytest.mark.parametrize("tensors", ["F16", "BF16", "Q8_0"])
def test_smaller_types_are_proved_too(tensors, base_of, tmp_path):
    base = base_of("llama")
    adapter = moved(base, tmp_path / "adapter", lf.LoRA(rank=32, alpha=64, dropout=0.0))
    done = lf.export(base, adapter, tmp_path / "out", to="gguf", tensors=tensors, device="cpu")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/adapter.gguf").tensors}
    assert kinds == {tensors}
    proof_of(done, MAX_LOST)


@pytest.mark.slow
def test_a_stack_of_ranks_and_scales_with_embedding_and_head(base_of, tmp_path):
    """What llama.cpp's own converter does not say: rsLoRA, ranks that differ, two adapters."""
    base = base_of("llama")
    low = moved(base, tmp_path / "low", METHODS["rslora"](rank=16), targets=EVERYWHERE, name="a")
    high = moved(base, tmp_path / "high", lf.LoRA(rank=3, alpha=24), targets="attention", name="b")
    done = lf.export(base, [low, high], tmp_path / "out", to="llama.cpp", device="cpu")
    proof_of(done)
    assert f"--lora {done.out}/adapter.gguf" in done.summary()


def test_a_proof_finds_rows_in_another_order_and_a_lost_scale(base_of, tmp_path):
    """Both of which leave most likeliest tokens as they are."""
    directory = base_of("llama")
    adapters = open_all([moved(directory, tmp_path / "adapter")])
    base = base_for(directory, adapters, None, device="cpu")
    ours = ReferenceAnswers.of(Subject(base, tuple(adapters)), None, quietly)
    write_model(directory, tmp_path / "base.gguf", "F32", quietly)
    right = written(directory, tmp_path / "adapter", tmp_path / "out")
    for name, changed in (("order", unordered), ("scale", halved)):
        wrong = tmp_path / f"{name}.gguf"
        shutil.copy(right, wrong)
        for tensor in gguf.GGUFReader(wrong, "r+").tensors:
            changed(tensor)
        job = ours.job({"base": str(tmp_path / "base.gguf"), "adapter": str(wrong)}, tmp_path)
        found = compare(ours.answers, run_engine("llamacpp", job), ours.margin)
        assert found.share is not None
        assert found.share > MAX_LOST


def unordered(tensor) -> None:
    """The rows of queries and keys as transformers has them."""
    if tensor.name.endswith(("attn_q.weight.lora_b", "attn_k.weight.lora_b")):
        rows, rank = tensor.data.shape
        pairs = tensor.data.reshape(rows // 16, 8, 2, rank)  # of heads of 16
        tensor.data[...] = pairs.swapaxes(1, 2).reshape(rows, rank)


def halved(tensor) -> None:
    if tensor.name.endswith(".lora_b"):
        tensor.data[...] /= 2


def test_what_has_no_tensor_is_named(base_of, tmp_path):
    base = base_of("llama-tied")
    model = lf.load_model(base, storage="fp32", device="cpu")
    lf.attach(model, lf.LoRA(rank=2), targets=["q_proj", "lm_head"], name="one")
    row = architecture_of(model.config)
    factors = dict(update_of(model, ["one"]).factors)
    factors["model.layers.0.elsewhere"] = factors["lm_head"]
    tensors, problems = adapter_tensors(factors, model.config, row)
    names = {name.partition(".lora")[0] for name in tensors}
    assert names == {f"blk.{n}.attn_q.weight" for n in range(3)}
    head, other = problems
    assert "lm_head: the embedding and the head are tied" in head
    assert "elsewhere: llama.cpp has no tensor" in other


@pytest.mark.parametrize(
    ("kind", "beside", "said"),
    [
        ("llama", {"modules_to_save": ["norm"]}, "norm"),
        ("gpt2", {}, "of type gpt2, expected one of llama"),
        ("gemma", {"targets": ["embed_tokens"]}, "the embedding and the head are tied"),
    ],
)
def test_what_it_cannot_say_is_one_line(kind, beside, said, tiny_model, tiny_model_dir, tmp_path):
    adapter = lf.attach(tiny_model(kind), lf.LoRA(), **beside).save(tmp_path / "adapter")
    asked = ("--to", "gguf", "--out", str(tmp_path / "out"), "--device", "cpu")
    assert said in refused("export", str(adapter), "--model", str(tiny_model_dir(kind)), *asked)
    assert not (tmp_path / "out").exists()


def test_a_model_alone_is_another_target(base_of, tmp_path):
    with pytest.raises(LorafoldError, match=r"found no adapter.*gguf-model"):
        lf.export(base_of("llama"), out=tmp_path / "out", to="gguf", prove=False, device="cpu")


def test_llama_cpp_refuses_the_base_of_another_model_in_a_line(base_of, tmp_path):
    base = base_of("qwen2")
    adapter = written(base, moved(base, tmp_path / "adapter"), tmp_path / "out")
    write_model(base_of("llama"), tmp_path / "other.gguf", "F32", quietly)
    job = {
        "base": str(tmp_path / "other.gguf"), "adapter": str(adapter), "ids": [[1, 2]],
        "texts": ["a"], "chats": [], "greedy": 2, "ends": [],
    }  # fmt: skip
    with pytest.raises(LorafoldError, match=r"^llama\.cpp: .*arch mismatch$"):
        run_engine("llamacpp", job)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_nothing(base_of, tmp_path):
    resource = pytest.importorskip("resource")
    adapter = moved(base_of("llama"), tmp_path / "adapter")
    work = tmp_path / "work"
    work.mkdir()

    def limit() -> None:  # the file takes 60 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "lorafold", "export", str(adapter), "--no-proof"]
    command += ["--model", str(base_of("llama")), "--to", "gguf", "--out", str(work / "out")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "can't be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not [*work.iterdir()]


@pytest.mark.slow
def test_over_a_gguf_file_of_few_bits_what_it_differs_by_is_told(tmp_path, base_of):
    base = base_of("llama")
    write_model(base, tmp_path / "model.gguf", "Q4_0", quietly)
    adapter = moved(tmp_path / "model.gguf", tmp_path / "adapter", storage="bf16")
    done = lf.export(adapters=adapter, out=tmp_path / "out", to="gguf", device="cpu")
    assert done.proof.kl < 2e-5
    told = done.beside["over model.gguf"]
    assert told.prompts == FEW_PROMPTS
    assert told.kl > 10 * done.proof.kl
    kept = json_of(tmp_path / "out", "export.json")
    assert kept["beside"]["over model.gguf"]["kl"] == told.kl
    assert str(tmp_path / "model.gguf") in kept["launch"][0]
