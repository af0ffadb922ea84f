"""Exported adapters compute the same in other engines, or the export is refused."""

from pathlib import Path

import pytest
import torch

import lorafold as lf
from adapter_files import json_of
from conftest import refused
from conversation_cases import jsonl
from export_cases import noisy, proof_of
from lorafold.errors import LorafoldError
from lorafold.exporting.target import update_of
from lorafold.methods import METHODS

EXACT = ("lora", "rslora", "pissa", "olora", "vera", "adalora")
OTHERS = ("dora", "loha", "lokr", "ia3")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """The directory of an adapter of a method on the tiny Llama, whose update is not small."""

    def saved(method: str, **beside) -> Path:
        return noisy(tiny_model("llama"), METHODS[method](), tmp_path / "adapter", **beside)

    return saved


@pytest.mark.parametrize("method", EXACT)
def test_factors_are_the_update(method, adapter, tiny_model):
    """Of every method that is a product, bases moved by PiSSA and OLoRA included."""
    saved, model, merged = adapter(method), tiny_model("llama"), tiny_model("llama")
    lf.load(model, saved, "one")
    update = update_of(model, ["one"])
    assert not update.dense
    assert not update.beside
    assert len(update.factors) == 14
    before = {path: merged.get_submodule(path).weight.clone() for path in update.factors}
    lf.load(merged, saved, "one").merge()
    for path, (up, down) in update.factors.items():
        change = merged.get_submodule(path).weight - before[path]
        torch.testing.assert_close(change, up @ down, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", OTHERS)
def test_others_are_cut_to_the_best_of_a_rank(method, adapter, tiny_model):
    model = tiny_model("llama")
    lf.load(model, adapter(method), "one")
    whole = update_of(model, ["one"], rank=32)
    assert whole.error < 1e-5
    cut = update_of(model, ["one"], rank=4)
    for path, (up, down) in whole.factors.items():
        s = torch.linalg.svdvals(up @ down)
        lost, _ = cut.lost[path]
        assert lost == pytest.approx(float(s[4:].square().sum()), rel=1e-3, abs=1e-9)
        assert down.shape[0] <= 32
        assert cut.factors[path][1].shape[0] <= 4
    assert update_of(model, ["one"]).dense.keys() == whole.factors.keys()


@pytest.fixture
def prompts(tmp_path):
    """A file of few prompts: PEFT takes a second for each."""
    rows = [{"prompt": text} for text in ("the fox", "What is rain?", "jumps", "over the dog")]
    return Path(jsonl(tmp_path / "prompts.jsonl", *rows))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rslora", "pissa"])
def test_peft_computes_what_lorafold_does(method, adapter, prompts, tiny_model_dir, tmp_path):
    out, base = tmp_path / "out", tiny_model_dir("llama")
    done = lf.export(base, adapter(method), out, to="peft", prompts=prompts, device="cpu")
    proof = proof_of(done, 1e-6)
    assert proof.kl < 1e-9
    assert proof.top == proof.prompts == 4
    assert proof.greedy + proof.near == 4
    assert not proof.unused
    assert proof.changed == pytest.approx(proof.distance, rel=1e-3)
    assert json_of(out, "export.json")["proof"]["engine"] == "PEFT"
    config = json_of(out / "adapter")
    assert not any(config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    assert config["lora_alpha"] == config["r"]


def test_as_lora_says_what_it_loses_and_which_rank_is_enough(
    adapter, prompts, tiny_model_dir, tmp_path
):
    base, saved = tiny_model_dir("llama"), adapter("dora")
    few = {"prompts": prompts, "device": "cpu"}
    with pytest.raises(LorafoldError, match=r"DoRADelta is no product .* --as-lora \d+ writes"):
        lf.export(base, saved, tmp_path / "none", to="gguf", **few)
    assert not (tmp_path / "none").exists()
    done = lf.export(base, saved, tmp_path / "out", to="gguf", as_lora=2, **few)
    proof_of(done, 1e-3)
    assert done.cut.share > 1e-3
    assert done.cut.enough > 2


def test_what_a_target_cannot_say_is_refused(adapter, tiny_model_dir, tmp_path):
    saved = adapter("lora", modules_to_save=["norm"])
    asked = ("--to", "peft", "--out", str(tmp_path / "out"), "--device", "cpu")
    told = refused("export", str(saved), "--model", str(tiny_model_dir("llama")), *asked)
    assert "norm" in told
    assert "can't say" in told
    assert not (tmp_path / "out").exists()
