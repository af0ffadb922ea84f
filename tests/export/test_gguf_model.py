"""Models as GGUF files: read back unchanged, and llama.cpp computes the same."""

from unicodedata import is_normalized

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafold as lf
from export_cases import proof_of
from gguf_models import CONFIGS, UNREAD, moved, quietly, saved
from lorafold.exporting.gguf_metadata import TEXTS
from lorafold.exporting.gguf_model import write_model
from lorafold.models.sources import resolve_model


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
    for text in filter(lambda text: is_normalized("NFC", text) and text[0] != " ", TEXTS):
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
