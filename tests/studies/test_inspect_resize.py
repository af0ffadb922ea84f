"""Adapters of another rank, and out of a model: optimal, and plain LoRA that PEFT reads."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf
from adapter_cases import adapted_logits, logits, make_adapter, relative
from fresh_models import fresh_model
from lorafold.errors import LorafoldError
from lorafold.inspecting.resize import extract, resize
from lorafold.layers import layer_of
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base

SPECS = {
    "lora": lf.LoRA(rank=6),
    "pissa": lf.PiSSA(rank=3),
    "vera": lf.VeRA(rank=8),
    "adalora": lf.AdaLoRA(rank=4, init_rank=6),
    "loha": lf.LoHa(rank=2),
    "lokr": lf.LoKr(rank=2),
    "dora": lf.DoRA(),
}


def updates(model_dir, adapter) -> dict[str, torch.Tensor]:
    """The dense updates of a saved adapter, by the fold of its own method."""
    model = fresh_model(model_dir)
    found = {}
    for path, delta in lf.load(model, adapter).own_deltas.items():
        w = layer_of(model.get_submodule(path)).dense()[0].detach().double()
        found[path] = (delta.double().fold(w, None)[0] - w).detach()
    return found


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", SPECS)
def test_full_rank_is_the_identity(method, kind, tiny_model_dir, tmp_path):
    base = tiny_model_dir(kind)
    make_adapter(base, tmp_path / "a", spec=SPECS[method])
    found = resize(Base(base), open_all([tmp_path / "a"]), tmp_path / "b", energy=1.0)
    before = adapted_logits(base, tmp_path / "a")
    assert relative(before, logits(fresh_model(base))) > 1e-3
    assert relative(adapted_logits(base, tmp_path / "b"), before) < 1e-4
    assert found.error < 1e-6
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("method", ["lora", "loha", "dora"])
def test_no_adapter_of_that_rank_is_nearer(method, tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "a", spec=SPECS[method])
    found = resize(Base(base), open_all([tmp_path / "a"]), tmp_path / "b", rank=2)
    before, after = (updates(base, tmp_path / name) for name in "ab")
    lost = whole = 0.0
    for path, dw in before.items():
        s = torch.linalg.svdvals(dw)
        least = float(s[2:].norm() / s.norm())  # Eckart and Young
        assert float((dw - after[path]).norm() / dw.norm()) == pytest.approx(least, rel=1e-3)
        assert found.sites[path]["error"] == pytest.approx(least, rel=1e-3)
        assert torch.linalg.matrix_rank(after[path], rtol=1e-5) == found.sites[path]["rank"] == 2
        lost, whole = lost + float(s[2:].square().sum()), whole + float(s.square().sum())
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_an_energy_gives_each_site_the_least_rank_that_holds_it_and_peft_reads_it(
    tiny_model_dir, tmp_path
):
    base = tiny_model_dir("llama")
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 5}, "alpha_pattern": {"down_proj": 20}}
    spec = lf.LoRA(rank=6, **patterns)
    make_adapter(base, tmp_path / "a", spec=spec)
    found = resize(Base(base), open_all([tmp_path / "a"]), tmp_path / "b", energy=0.7)
    assert len({site["rank"] for site in found.sites.values()}) > 1
    truncated = fresh_model(base)
    for path, dw in updates(base, tmp_path / "a").items():
        u, s, vt = torch.linalg.svd(dw)
        held = s.square().cumsum(0) / s.square().sum()
        k = int((held < 0.7).sum()) + 1
        assert found.sites[path]["rank"] == k
        truncated.get_submodule(path).weight.data += ((u[:, :k] * s[:k]) @ vt[:k]).float()
    theirs = peft.PeftModel.from_pretrained(fresh_model(base), tmp_path / "b").eval()
    assert relative(logits(theirs), logits(truncated)) < 1e-5
    assert relative(adapted_logits(base, tmp_path / "b"), logits(truncated)) < 1e-5


def test_biases_saved_modules_and_token_rows_are_carried_over(tiny_model_dir, tmp_path):
    base = tiny_model_dir("qwen2")
    make_adapter(base, tmp_path / "a", bias="all", modules_to_save=["model.norm"], tokens=[5, 9])
    resize(Base(base), open_all([tmp_path / "a"]), tmp_path / "b", energy=1.0)
    before, after = (adapted_logits(base, tmp_path / name) for name in "ab")
    assert relative(after, before) < 1e-4
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    beside = {key for key in before if "lora_" not in key}
    assert len(beside) > 3
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in beside)


def test_a_rank_that_is_not_there_and_an_untrained_adapter(tiny_model, tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    lf.attach(tiny_model("llama"), lf.LoRA(rank=3)).save(tmp_path / "fresh")
    found = resize(Base(base), open_all([tmp_path / "fresh"]), tmp_path / "b", rank=8)
    assert found.error == 0
    assert {site["rank"] for site in found.sites.values()} == {0}
    plain = logits(fresh_model(base))
    assert relative(adapted_logits(base, tmp_path / "b"), plain) < 1e-6
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=3))
    more = resize(Base(base), open_all([tmp_path / "a"]), tmp_path / "c", rank=8)
    assert {site["rank"] for site in more.sites.values()} == {3}


def test_what_it_refuses(tiny_model_dir, tmp_path):
    base = Base(tiny_model_dir("gpt2"))
    make_adapter(base.source.path, tmp_path / "ia3", spec=lf.IA3())
    told = r"the adapter changes the bias of transformer.h.0.attn.c_attn together with its"
    with pytest.raises(LorafoldError, match=told):
        resize(base, open_all([tmp_path / "ia3"]), tmp_path / "out", rank=2)
    make_adapter(base.source.path, tmp_path / "prompt", spec=lf.Prompt(tokens=2))
    with pytest.raises(LorafoldError, match="has no singular values"):
        resize(base, open_all([tmp_path / "prompt"]), tmp_path / "out", rank=2)
    make_adapter(base.source.path, tmp_path / "a")
    resize(base, open_all([tmp_path / "a"]), tmp_path / "out", rank=2)
    with pytest.raises(LorafoldError, match="replace it with --overwrite"):
        resize(base, open_all([tmp_path / "a"]), tmp_path / "out", rank=2)
    resize(base, open_all([tmp_path / "a"]), tmp_path / "out", rank=1, overwrite=True)
    other = open_all([tmp_path / "out"])
    with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
        resize(Base(tiny_model_dir("llama")), other, tmp_path / "other", rank=1)


def test_extract_gives_back_what_was_added(tiny_model_dir, tmp_path):
    base = tiny_model_dir("qwen2")
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=3))
    tuned = fresh_model(base)
    lf.load(tuned, tmp_path / "a").merge()
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract(Base(base), Base(tmp_path / "tuned"), tmp_path / "out", rank=3)
    assert found.error < 1e-4
    assert found.left_out == {}
    before, after = updates(base, tmp_path / "a"), updates(base, tmp_path / "out")
    assert before.keys() == after.keys()
    assert all((before[path] - after[path]).norm() < 1e-4 * before[path].norm() for path in before)
    assert relative(adapted_logits(base, tmp_path / "out"), logits(tuned)) < 1e-4
    other = fresh_model(base)
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
        lf.load(other, tmp_path / "out")


def test_extract_is_optimal_and_names_what_it_leaves_out(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    tuned = fresh_model(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "mlp" in name or name == "model.norm.weight":
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract(Base(base), Base(tmp_path / "tuned"), tmp_path / "out", rank=4)
    plain, own = tuned.state_dict(), fresh_model(base).state_dict()
    norm = "model.norm.weight"
    moved = float((plain[norm] - own[norm]).norm() / own[norm].norm())
    assert found.left_out == {norm: pytest.approx(moved, rel=1e-5)}
    assert set(found.sites) == {n.removesuffix(".weight") for n in own if "mlp" in n}
    for path, site in found.sites.items():
        s = torch.linalg.svdvals(plain[f"{path}.weight"] - own[f"{path}.weight"])
        assert site["error"] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-3)
    assert "model.norm.weight by" in str(found)


def test_extract_refuses_other_models(tiny_model_dir, tmp_path):
    base, other = Base(tiny_model_dir("llama")), Base(tiny_model_dir("gpt2"))
    with pytest.raises(LorafoldError, match=r"not a fine-tuned version of .*, because the modules"):
        extract(base, other, tmp_path / "out", rank=2)
    with pytest.raises(LorafoldError, match="nothing to extract"):
        extract(base, base, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
