"""Exports to mlx-lm, vLLM and SGLang: the factors, the command lines, and the engines' output."""

import json
import shlex
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import lorafold as lf
from adapter_files import json_of
from conftest import make_tokenizer
from error_cases import refusal
from export_cases import changes, noisy, proof_of, python_of, tensors_in, with_tokenizer
from lorafold.errors import LorafoldError
from lorafold.exporting.servers import ToSglang
from lorafold.exporting.target import Subject
from lorafold.exporting.to_mlx import adapter_keys, legacy_config
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base
from mixtures import mixture

CLOSE = {"atol": 3e-5, "rtol": 1e-4}
ROOT = "base_model.model."


@pytest.fixture(scope="module")
def tiny_mixture(tmp_path_factory):
    """The directory of a tiny mixture of experts, and a fresh model of it."""

    def made(name):
        path = tmp_path_factory.mktemp(name) / "model"
        return with_tokenizer(mixture(name), make_tokenizer(), path)

    return made


@pytest.fixture
def llama(tiny_model, tiny_model_dir, tmp_path):
    """Save an adapter of a spec on the tiny Llama; the base, the adapter, and the output."""

    def made(spec, kind="llama", **beside):
        saved = noisy(tiny_model(kind), spec, tmp_path / "adapter", **beside)
        return tiny_model_dir(kind), saved, tmp_path / "out"

    return made


exported = partial(lf.export, device="cpu", prove=False)
in_fp32 = partial(lf.load_model, storage="fp32")


def before_and_after(base, saved):
    """The model of a directory, and with an adapter folded in."""
    model, merged = in_fp32(base), in_fp32(base)
    lf.load(merged, saved, "one").merge()
    return model, merged


def test_mlx_factors_are_the_update(llama):
    """Of rsLoRA with differing ranks and alphas: one rank, one scale."""
    ranks, alphas = {"q_proj": 3}, {"down_proj": 40.0}
    spec = lf.LoRA(rank=5, alpha=16, rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    base, saved, out = llama(spec)
    exported(base, saved, out, to="mlx")
    config = json_of(out / "adapter")
    parameters = config["lora_parameters"]
    assert (config["fine_tune_type"], parameters["scale"], parameters["rank"]) == ("lora", 1, 5)
    assert "self_attn.q_proj" in parameters["keys"]
    tensors = tensors_in(out / "adapter" / "adapters.safetensors")
    sites = sorted({key.rsplit(".", 1)[0] for key in tensors})
    assert len(sites) == 14
    for site, change in changes(*before_and_after(base, saved), sites).items():
        a, b = tensors[f"{site}.lora_a"], tensors[f"{site}.lora_b"]
        assert a.shape[1] == b.shape[0] == 5
        torch.testing.assert_close(change, (a @ b).t(), **CLOSE)


def test_mlx_has_dora(llama):
    base, saved, out = llama(lf.DoRA())
    exported(base, saved, out, to="mlx")
    assert json_of(out / "adapter")["fine_tune_type"] == "dora"
    tensors = tensors_in(out / "adapter" / "adapters.safetensors")
    model, merged = before_and_after(base, saved)
    sites = [key.removesuffix(".m") for key in tensors if key.endswith(".m")]
    assert len(sites) == 14
    for site in sites:
        a, b, m = (tensors[f"{site}.{leaf}"] for leaf in ("lora_a", "lora_b", "m"))
        v = model.get_submodule(site).weight.detach() + (a @ b).t()
        folded = (m / v.norm(dim=1))[:, None] * v
        torch.testing.assert_close(merged.get_submodule(site).weight.detach(), folded, **CLOSE)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_mlx_experts_are_apart(name, tiny_mixture, tmp_path):
    base = tiny_mixture(name)
    saved = noisy(in_fp32(base), lf.LoRA(rank=3), tmp_path / "adapter")
    exported(base, saved, tmp_path / "out", to="mlx")
    tensors = tensors_in(tmp_path / "out" / "adapter" / "adapters.safetensors")
    site = "model.layers.1.mlp.experts"
    sites = [f"{site}.gate_up_proj", f"{site}.down_proj"]
    found = changes(*before_and_after(base, saved), sites)
    both, down = found[f"{site}.gate_up_proj"], found[f"{site}.down_proj"]
    if name == "gpt-oss":  # stored transposed, gates and ups in turns
        both, down = both.mT, down.mT
        gate, up = both[:, ::2], both[:, 1::2]
    else:
        gate, up = both.chunk(2, 1)
    switches = {"mixtral": "block_sparse_moe.switch_mlp", "gpt-oss": "mlp.experts"}
    switch = switches.get(name, "mlp.switch_mlp")
    for leaf, change in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        path = f"model.layers.1.{switch}.{leaf}"
        product = tensors[f"{path}.lora_b"] @ tensors[f"{path}.lora_a"]
        torch.testing.assert_close(change, product, **CLOSE)


def test_mlx_keys_are_those_of_the_tensors():
    every = [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    assert adapter_keys([*every, "lm_head"], 3) == ["lm_head", "self_attn.q_proj"]
    assert adapter_keys(every[1:], 3) == every[1:]


def test_configs_of_transformers_5_are_told_in_the_older_words():
    """Their positions would be another model's for mlx-lm."""
    plain = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    assert legacy_config(plain) == {**plain, "rope_theta": 1e5}
    scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    older = legacy_config(scaled)
    assert older is not None
    assert older["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    local = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}
    older = legacy_config({"rope_parameters": local})
    assert older is not None
    assert (older["rope_theta"], older["rope_local_base_freq"]) == (1e6, 1e4)
    assert legacy_config({"num_local_experts": 8}) == {"num_local_experts": 8, "num_experts": 8}
    assert legacy_config({"rope_theta": 1e4, **plain}) is None
    assert legacy_config({}) is None
    kinds = ["sliding_attention", "full_attention"] * 2
    layers = {"model_type": "gemma3_text", "layer_types": kinds}
    assert legacy_config(layers) == {**layers, "sliding_window_pattern": 2}
    assert legacy_config({**layers, "layer_types": kinds[:1] * 5 + kinds[1:2]}) is None


def test_vllm_line_and_files(llama, tiny_model, tmp_path):
    base, saved, out = llama(lf.LoRA(rank=9, rslora=True))
    done = exported(base, saved, out, to="vllm")
    assert shlex.split(done.launch[0]) == [
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "16", "--lora-modules",
        f"adapter={out / 'adapter'}",
    ]  # fmt: skip
    one, other = tiny_model("llama"), tiny_model("llama")
    lf.load(one, saved, "one").merge()
    lf.load(other, tmp_path / "out" / "adapter", "one").merge()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


def test_vllm_is_told_of_stacked_experts(tiny_mixture, tmp_path):
    """With zeros for the parameter that is not changed, and under its own names."""
    base = tiny_mixture("mixtral")
    targets = r".*experts\.gate_up_proj"
    saved = noisy(in_fp32(base), lf.LoRA(rank=2), tmp_path / "adapter", targets=targets)
    done = exported(base, saved, tmp_path / "out", to="vllm")
    words = shlex.split(done.launch[0])
    assert "--enable-mixed-moe-lora-format" in words
    about = json.loads(words[words.index("--lora-modules") + 1])
    assert about["is_3d_lora_weight"] is True
    assert about["path"] == str(tmp_path / "out" / "adapter")
    tensors = tensors_in(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    prefix = f"{ROOT}model.layers.0.block_sparse_moe.experts"
    assert f"{prefix}.base_layer.lora_A.weight" in tensors
    assert not tensors[f"{prefix}.lora_B.weight"].any()
    assert tensors[f"{prefix}.base_layer.lora_B.weight"].any()


def test_sglang_gets_zeros_for_what_it_packs(llama, tmp_path):
    done = lf.export(*llama(lf.LoRA(rank=4), targets=["q_proj"]), to="sglang", device="cpu")
    assert done.proof is None
    assert "read back, not run: 6 modules" in done.unproved
    tensors = tensors_in(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for name, changed in (("q_proj", True), ("k_proj", False), ("v_proj", False)):
        b = tensors[f"{ROOT}model.layers.1.self_attn.{name}.lora_B.weight"]
        assert bool(b.any()) is changed
    assert "--lora-strict-loading" in done.launch[0]


def test_sglang_experts_are_pairs(tiny_mixture, tmp_path):
    base = tiny_mixture("qwen3-moe")
    saved = noisy(in_fp32(base), lf.LoRA(rank=3), tmp_path / "adapter")
    done = lf.export(base, saved, tmp_path / "out", to="sglang", device="cpu")
    assert "read back, not run" in done.unproved
    tensors = tensors_in(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    site = "model.layers.0.mlp.experts"
    [change] = changes(*before_and_after(base, saved), [f"{site}.gate_up_proj"]).values()
    gate, up = change.chunk(2, 1)
    for e in range(8):
        for name, part in (("gate_proj", gate[e]), ("up_proj", up[e])):
            key = f"{ROOT}{site}.{e}.{name}"
            product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            torch.testing.assert_close(part, product, **CLOSE)
    targets = json_of(tmp_path / "out" / "adapter")["target_modules"]
    assert {"gate_proj", "up_proj", "down_proj"} <= set(targets)


def test_sglang_reads_back_what_is_there(llama, tmp_path):
    """A scale that is lost, a tensor too many and one that is not there are found."""
    base, saved, out = llama(lf.LoRA(rank=4))
    exported(base, saved, out, to="sglang")
    subject, target = Subject(Base(base), (SavedAdapter.open(saved),)), ToSglang()
    assert "14 modules" in target.read_back(subject, tmp_path / "out")
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    whole = tensors_in(file)
    key = f"{ROOT}model.layers.1.mlp.up_proj.lora_B.weight"
    damaged = {
        "differ by 5": {**whole, key: whole[key] / 2},
        "match no module": {**whole, key.replace("layers.1", "layers.7"): whole[key].clone()},
        "missing in the written file": {k: t for k, t in whole.items() if k != key},
    }
    for said, tensors in damaged.items():
        save_file(tensors, file)
        assert said in refusal(target.read_back, subject, out)


TWO, TIED, SITE = lf.LoRA(rank=2), {"targets": ["embed_tokens"]}, {"targets": ["q_proj"]}
REFUSED = {
    "mlx, names": ("mlx", "gpt2", TWO, {}, "mlx-lm has no such module"),
    "mlx, tied": ("mlx", "gemma", TWO, TIED, "a tied embedding and head"),
    "mlx, no product": ("mlx", "llama", lf.DoRA(over=lf.LoHa()), SITE, "DoRA is not"),
    "vllm, head": ("vllm", "gemma", TWO, TIED, "no LoRA on the embedding"),
    "vllm, norms": ("vllm", "llama", TWO, {"modules_to_save": ["norm"]}, "can't represent"),
    "vllm, none": ("vllm", "gpt2", TWO, {}, "vLLM supports no LoRA for models of type gpt2"),
    "vllm, rank": (
        "vllm", "llama", lf.LoRA(rank=513, alpha=1), SITE,
        "rank 513: vLLM supports at most 512; use --as-lora 512",
    ),
    "sglang, names": ("sglang", "gpt2", TWO, {}, "SGLang supports no LoRA on modules of this name"),
    "sglang, tied": ("sglang", "gemma", TWO, TIED, "a tied embedding"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_has_not_is_refused(case, llama):
    to, kind, spec, beside, said = REFUSED[case]
    base, saved, out = llama(spec, kind, **beside)
    told = refusal(exported, base, saved, out, to=to)
    assert said in told
    assert len(told) < 300
    assert not out.exists()


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_experts_of_unknown_families_are_refused(to, tiny_mixture, tmp_path):
    """vLLM would pass over them without a word."""
    base = tiny_mixture("deepseek-v3" if to == "vllm" else "gpt-oss")
    targets = r".*experts\.down_proj"
    saved = noisy(in_fp32(base), lf.LoRA(rank=2), tmp_path / "adapter", targets=targets)
    with pytest.raises(LorafoldError, match=r"known for .*, not for"):
        exported(base, saved, tmp_path / "out", to=to)


def check(done):
    """The engine computes what lorafold does, and took all of the files."""
    proof = proof_of(done, 1e-3)
    assert proof.top == proof.prompts
    assert proof.greedy + proof.near == proof.prompts
    assert proof.changed == pytest.approx(proof.distance, rel=0.02)
    assert not proof.unused


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama, DoRA"])
def test_mlx_computes_what_lorafold_does(kind, llama):
    python = python_of("mlx")
    kind, _, dora = kind.partition(", ")
    asked = llama(lf.DoRA() if dora else lf.LoRA(rank=4, rslora=True), kind)
    check(lf.export(*asked, to="mlx", engine_python=python, device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "qwen2-moe"])
def test_mlx_computes_experts(name, tiny_mixture, tmp_path):
    python, base = python_of("mlx"), tiny_mixture(name)
    saved = noisy(in_fp32(base), lf.LoRA(rank=3), tmp_path / "adapter", std=0.1)
    out = tmp_path / "out"
    check(lf.export(base, saved, out, to="mlx", engine_python=python, device="cpu"))


@pytest.mark.slow
def test_vllm_computes_what_lorafold_does(tmp_path):
    """Its attention on CPUs has heads of 32 and more."""
    python, tokenizer = python_of("vllm"), make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base = with_tokenizer(model, tokenizer, tmp_path / "base")
    spec = lf.LoRA(rank=4, rslora=True)
    saved, out = noisy(in_fp32(base), spec, tmp_path / "adapter"), tmp_path / "out"
    check(lf.export(base, saved, out, to="vllm", engine_python=python, device="cpu"))
