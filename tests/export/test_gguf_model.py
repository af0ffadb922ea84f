"""Models as GGUF files: read back, refused, and served alike by llama.cpp."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unicodedata import is_normalized

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafold as lf
from conftest import make_tokenizer, refused
from export_cases import proof_of
from gguf_models import CONFIGS, HEADS, UNREAD, learned, moved, quietly, saved
from lorafold.engine.kv_cache import common_length
from lorafold.errors import LorafoldError
from lorafold.exporting.engines import run_engine
from lorafold.exporting.gguf_metadata import (
    ARCHITECTURES,
    PROBE_TEXTS,
    architecture_of,
    pre_tokenizer_name,
)
from lorafold.exporting.gguf_model import BLOCKS, tensor_type, write_model
from lorafold.exporting.proof import (
    Answers,
    EngineAnswers,
    compare,
    last_logprobs,
    prompts_of,
    swap_close_experts,
)
from lorafold.merging import merged_tensors
from lorafold.models.gguf_tokenizers import PREFERRED, WHOLE_WORDS, rule_of
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer
from serving_cases import running

LONG = 16  # tokens of an answer


@pytest.mark.slow
def test_the_server_and_llama_cpp_answer_alike(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    adapter = moved(base, tmp_path / "adapters" / "a", lf.LoRA(rank=4))
    lf.export(base, adapter, tmp_path / "out", to="gguf", prove=False, device="cpu")
    write_model(base, tmp_path / "base.gguf", "F32", quietly)
    prompts = prompts_of(load_tokenizer(base))
    files = {"base": tmp_path / "base.gguf", "adapter": tmp_path / "out" / "adapter.gguf"}
    job = {
        "ids": prompts.ids, "texts": prompts.texts, "chats": prompts.chats, "greedy": LONG,
        "ends": [], **{name: str(file) for name, file in files.items()},
    }  # fmt: skip
    wanted = [list(row) for row in run_engine("llamacpp", job).greedy]
    with running(base, tmp_path / "adapters") as server:

        def answered(model: str) -> list[list[int]]:
            body = {"model": model, "max_tokens": LONG, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            asked = [{**body, "prompt": list(ids)} for ids in prompts.ids]
            told = [server.ask("/v1/completions", one) for one in asked]
            return [one.json["choices"][0]["token_ids"] for one in told]

        found, bare = answered("a"), answered("base")
    model = lf.load_model(base, storage="fp32", device="cpu")
    lf.load(model, adapter)
    for ids, own, other in zip(prompts.ids, found, wanted, strict=True):
        if own != other:  # only where two tokens are as likely
            shared = own[: common_length(own, other)]
            first, second = last_logprobs(model, [*ids, *shared]).topk(2).values
            assert first - second < 0.01
    assert sum(own == other for own, other in zip(bare, wanted, strict=True)) < len(wanted) // 2


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in UNREAD])
def test_what_is_read_back_is_what_was_written(kind, tmp_path):
    base = saved(kind, tmp_path / "base")
    write_model(base, tmp_path / "model.gguf", "F32", quietly)
    back = resolve_model(tmp_path / "model.gguf").path
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    found, wanted = theirs.state_dict(), ours.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6, msg=name)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base, back))
    # transformers has rules of its own for a first space, and for marks in a tokenizer of Qwen's
    for text in filter(lambda text: is_normalized("NFC", text) and text[0] != " ", PROBE_TEXTS):
        assert after(text)["input_ids"] == before(text)["input_ids"], text
    assert after.chat_template == before.chat_template
    assert after.eos_token == before.eos_token


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_what_the_model_does(kind, tmp_path):
    """With adapters folded in, experts among them."""
    pytest.importorskip("xllamacpp")
    base = saved(kind, tmp_path / "base")
    adapter, how = moved(base, tmp_path / "adapter"), {"tensors": "F32", "device": "cpu"}
    proof = proof_of(lf.export(base, adapter, tmp_path / "out", to="gguf-model", **how))
    assert proof.distance > 1e-2
    assert proof.top == proof.prompts == 32
    assert not proof.other_tokens
    assert not proof.other_texts


@pytest.mark.few(2)
@pytest.mark.parametrize("method", [lf.LoRA(rank=4, dropout=0.0), lf.DoRA(lf.LoRA(rank=4))])
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_model_that_was_trained_is_exported(method, storage, tmp_path):
    """Adapters are merged into the quantized weights that they were trained on."""
    pytest.importorskip("xllamacpp")
    base = saved("llama", tmp_path / "base", intermediate_size=128)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = moved(base, tmp_path / "adapter", method, storage, 0.05)
    how = {"to": "gguf-model", "tensors": "F32", "device": "cpu"}
    done = {
        into: lf.export(base, adapter, tmp_path / str(into), into=into, **how)
        for into in (None, "original")
    }
    kl = {into: one.away.kl for into, one in done.items()}
    assert kl[None] < 1e-5 < 1e-4 < kl["original"]
    assert done[None].proof.kl == pytest.approx(kl[None], abs=1e-12)
    assert done["original"].proof.share < 1e-4  # what was asked for, proved as such
    assert done[None].from_original.kl == pytest.approx(kl["original"], rel=1e-2)
    assert done[None].as_json()["trained_on"]["storage"] == storage
    assert f"trained on {base} in {storage}" in done[None].summary()


@pytest.mark.slow
def test_the_embedded_model_says_the_same_in_llama_cpp(smollm2, tmp_path):
    """Greedy texts too, but where two tokens are nearer than what was measured."""
    pytest.importorskip("xllamacpp")
    adapter = moved(smollm2, tmp_path / "adapter", targets=["o_proj"])
    proof = proof_of(lf.export(smollm2, adapter, tmp_path / "out", to="ollama", device="cpu"), 1e-3)
    assert proof.kl < 1e-4
    assert proof.greedy + proof.near == 32
    assert not proof.other_tokens
    assert not proof.other_texts


WATCHED = """
import sys, threading, time
from pathlib import Path
from lorafold.exporting.gguf_model import write_model
import gguf

def held():
    said = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(said.split()[0]) * 1024

before, peak, done = held(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], held() - before)
thread = threading.Thread(target=watch)
thread.start()
write_model(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], lambda done, total: None)
done.set()
thread.join()
print(peak[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read in /proc")
@pytest.mark.parametrize("tensors", ["F16", "Q8_0"])
def test_memory_is_that_of_the_largest_tensor(tensors, tmp_path):
    """Half a gigabyte of bf16; mapped pages, which the kernel takes back, don't count."""
    tokenizer = make_tokenizer()
    config = tf.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=8,
        vocab_size=16000, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sizes = [p.numel() * 2 for p in model.parameters()]
    model.save_pretrained(tmp_path / "base", max_shard_size="100MB")
    tokenizer.save_pretrained(tmp_path / "base")
    del model
    out = tmp_path / "model.gguf"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path / "base"), str(out), tensors],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert sum(sizes) > 4.5e8
    assert int(done.stdout) < max(sizes) + 100e6
    assert out.stat().st_size > sum(sizes) * (0.9 if tensors == "F16" else 0.5)


@pytest.mark.parametrize("tensors", BLOCKS)
def test_quantized_types_are_the_package_s_own(tensors, tmp_path):
    base = saved("llama", tmp_path / "base")
    write_model(base, tmp_path / "model.gguf", tensors, quietly)
    weights = tf.AutoModelForCausalLM.from_pretrained(base).state_dict()
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    wanted = weights["model.layers.1.mlp.down_proj.weight"].numpy()
    kind = gguf.GGMLQuantizationType[tensors]
    got = found["blk.1.ffn_down.weight"]
    assert got.tensor_type == kind
    np.testing.assert_array_equal(got.data, gguf.quants.quantize(wanted, kind))
    assert found["output.weight"].tensor_type.name == "Q8_0"
    assert found["token_embd.weight"].tensor_type.name == tensors
    assert found["blk.1.attn_norm.weight"].tensor_type.name == "F32"


def test_rows_that_are_no_whole_blocks_are_f16():
    assert tensor_type("blk.0.ffn_down.weight", (64, 100), "Q4_0", True) == "F16"
    assert tensor_type("token_embd.weight", (300, 64), "Q4_0", True) == "Q8_0"
    assert tensor_type("blk.0.ffn_gate_inp.weight", (4, 64), "Q4_0", True) == "F32"


@pytest.mark.parametrize("name", PREFERRED)
def test_a_rule_of_splitting_is_found_by_what_it_does(name):
    backend = make_tokenizer().backend_tokenizer
    backend.pre_tokenizer = rule_of(name)
    assert pre_tokenizer_name(backend, name in WHOLE_WORDS) == name


def test_an_unknown_rule_is_refused(tmp_path):
    base = saved("llama", tmp_path / "base")
    tokenizer = make_tokenizer()
    own = pre_tokenizers.Split(Regex("[aeiou]"), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([own, plain])
    tokenizer.save_pretrained(base)
    asked = ("--to", "gguf-model", "--no-proof", "--out", str(tmp_path / "out"))
    told = refused("export", "--model", str(base), *asked, "--device", "cpu")
    assert "pre-tokenizer (Sequence) matches no known one of llama.cpp" in told
    assert len(told) < 400
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_changes_texts_is_refused(tmp_path):
    base = saved("gemma2", tmp_path / "base")
    tokenizer = learned(as_gemma=True)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), backend.normalizer])
    tokenizer.save_pretrained(base)
    with pytest.raises(LorafoldError, match=r"normalizes text in a way that llama\.cpp does not"):
        write_model(base, tmp_path / "model.gguf", "F16", quietly)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tf.GPT2Config(), "found a model of type gpt2, expected one of llama, mistral"),
        (tf.Qwen3MoeConfig(norm_topk_prob=False), "norm_topk_prob = False"),
        (tf.LlamaConfig(hidden_act="gelu"), "the activation gelu"),
        (tf.Gemma2Config(query_pre_attn_scalar=100), "query_pre_attn_scalar = 100"),
    ],
    ids=["architecture", "routing", "activation", "scale"],
)
def test_what_llama_cpp_takes_for_granted_is_not_said_otherwise(config, said):
    with pytest.raises(LorafoldError, match=said):
        architecture_of(config)


def test_values_that_f16_has_not_are_refused(tmp_path):
    base = saved("llama", tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    model.save_pretrained(base)
    with pytest.raises(LorafoldError, match=r"ffn_up.weight has a value of 1e\+05.*BF16 or F32"):
        lf.export(base, out=tmp_path / "out", to="gguf-model", prove=False, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    base = saved("llama", tmp_path / "base")
    full = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(merged_tensors, "shutil", full)
    with pytest.raises(LorafoldError, match=r"the disk has 0\.0 GB left"):
        lf.export(base, out=tmp_path / "out", to="gguf-model", prove=False, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device is full here")
def test_a_disk_that_fills_is_told_in_a_line(tmp_path):
    base = saved("llama", tmp_path / "base")
    out = tmp_path / "model.gguf"
    out.symlink_to("/dev/full")
    with pytest.raises(LorafoldError, match="No space left on device"):
        write_model(base, out, "F16", quietly)


@pytest.mark.skipif(shutil.which("llama-quantize") is not None, reason="its quantizer is here")
def test_types_of_the_quantizer_are_told_how_to_get(tmp_path):
    base = saved("llama", tmp_path / "base")
    with pytest.raises(LorafoldError, match=r"llama-quantize model-F16.gguf model-Q4_K_M.gguf"):
        lf.export(base, out=tmp_path / "out", to="gguf-model", tensors="Q4_K_M", prove=False)


def test_a_head_that_changes_alone_goes_in(tmp_path):
    """What was tied is two matrices."""
    base = saved("llama-tied", tmp_path / "base")
    model = lf.load_model(base, storage="fp32", device="cpu")
    adapter = moved(base, tmp_path / "adapter", targets=["q_proj", "lm_head"])
    lf.load(model, adapter).merge(untie_weights=True)
    how = {"to": "gguf-model", "tensors": "F32", "prove": False, "device": "cpu"}
    lf.export(base, adapter, tmp_path / "out", **how)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model-F32.gguf").tensors}
    head = model.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(found["output.weight"].data, head, atol=1e-6)
    assert np.abs(found["token_embd.weight"].data - head).max() > 0.01
    assert json.loads((tmp_path / "out" / "export.json").read_text())["to"] == "gguf-model"


def test_the_table_of_families_is_complete():
    named = {make(**{"vocab_size": 300}).model_type for make in CONFIGS.values()}
    assert named == set(ARCHITECTURES)
    assert HEADS["head_dim"] == 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = saved("mixtral", tmp_path_factory.mktemp("ties") / "base")
    return lf.load_model(base, storage="fp32", device="cpu")


@pytest.fixture(scope="module")
def prompts():
    """Token ids (24, 40)."""
    return torch.randint(0, 300, (24, 40), generator=torch.Generator().manual_seed(0)).tolist()


def answered(rows, bare):
    none = tuple(() for _ in rows)
    engine = EngineAnswers(rows.clone(), bare.clone(), none, "llama.cpp", "1")
    return Answers(rows, bare, none), engine


def test_the_other_expert_is_no_difference(model, prompts):
    rows = torch.stack([last_logprobs(model, ids) for ids in prompts])
    ours, theirs = answered(rows, rows.roll(1, 0))
    theirs.adapted.add_(1e-3 * torch.randn(rows.shape))
    far = {}
    for n, ids in enumerate(prompts):
        other = next(swap_close_experts(model, ids), None)
        if other is not None and (other - rows[n]).abs().max() > 0.05:
            far[n] = other
    n = next(iter(far))
    theirs.adapted[n] = far[n]
    plain = compare(ours, theirs, lambda prompt, at: 1.0)
    assert plain.tied == 0
    assert plain.kl == plain.measured
    found = compare(
        ours, theirs, lambda prompt, at: 1.0, lambda n: swap_close_experts(model, prompts[n])
    )
    assert found.tied == 1
    assert found.kl < 2e-6 < found.measured == plain.kl
    assert found.gap < 0.01 < plain.gap
    assert "experts at near ties of the router in 1 of" in str(found)


def test_what_is_far_for_another_reason_stays_far(model, prompts):
    rows = torch.stack([last_logprobs(model, ids) for ids in prompts])
    ours, theirs = answered(rows, rows.roll(1, 0))
    theirs.adapted[3] += 0.3 * torch.randn(rows.shape[1:])
    found = compare(
        ours, theirs, lambda prompt, at: 1.0, lambda n: swap_close_experts(model, prompts[n])
    )
    assert found.tied == 0
    assert found.kl == found.measured > 1e-4


def test_the_model_is_as_it_was_when_the_first_is_enough(model, prompts):
    """What asks next, texts of another length among it, finds no state moved."""
    before = [last_logprobs(model, ids) for ids in prompts]
    kept = [swap_close_experts(model, ids) for ids in prompts]
    assert sum(next(one, None) is not None for one in kept) > 1
    for ids, row in zip(prompts, before, strict=True):
        torch.testing.assert_close(last_logprobs(model, ids), row, rtol=0, atol=0)
        last_logprobs(model, ids[:2])


def test_a_model_without_experts_has_none(tiny_model):
    assert list(swap_close_experts(tiny_model("llama"), [1, 2, 3])) == []
