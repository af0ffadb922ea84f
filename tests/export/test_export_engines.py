"""Adapters for mlx-lm, vLLM and SGLang: the factors in the files are the update, multiplied out on
both sides; the command lines have what the engines need; the engines compute what lorafold does.
"""

import json
import shlex

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import lorafold as lf
from conftest import make_tokenizer
from export_cases import changes, noisy, python_of, tensors_in, with_tokenizer
from lorafold.errors import LorafoldError
from lorafold.exporting.servers import ToSglang
from lorafold.exporting.target import Subject
from lorafold.exporting.to_mlx import keys_of, older_config
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


def exported(base, saved, out, to, **how):
    """Export without a proof."""
    return lf.export(base, saved, out, to=to, device="cpu", prove=False, **how)


def in_fp32(base):
    """The model of a directory."""
    return lf.load_model(base, storage="fp32")


def mlx_config(out):
    """What mlx-lm reads of the configuration."""
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    return config, config["lora_parameters"]


def test_mlx_factors_are_the_update(tiny_model, tiny_model_dir, tmp_path):
    """Of rsLoRA with differing ranks and alphas: one rank, one scale."""
    ranks, alphas = {"q_proj": 3}, {"down_proj": 40.0}
    spec = lf.LoRA(rank=5, alpha=16, rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    saved = noisy(tiny_model("llama"), spec, tmp_path / "adapter")
    exported(tiny_model_dir("llama"), saved, tmp_path / "out", "mlx")
    config, parameters = mlx_config(tmp_path / "out")
    assert config["fine_tune_type"] == "lora"
    assert parameters["scale"] == 1
    assert parameters["rank"] == 5
    assert "self_attn.q_proj" in parameters["keys"]
    tensors = tensors_in(tmp_path / "out" / "adapter" / "adapters.safetensors")
    sites = sorted({key.rsplit(".", 1)[0] for key in tensors})
    assert len(sites) == 14
    model, merged = tiny_model("llama"), tiny_model("llama")
    lf.load(merged, saved, "one").merge()
    for site, change in changes(model, merged, sites).items():
        a, b = tensors[f"{site}.lora_a"], tensors[f"{site}.lora_b"]
        assert a.shape[1] == b.shape[0] == 5
        torch.testing.assert_close(change, (a @ b).t(), **CLOSE)


def test_mlx_has_dora(tiny_model, tiny_model_dir, tmp_path):
    saved = noisy(tiny_model("llama"), lf.DoRA(), tmp_path / "adapter")
    exported(tiny_model_dir("llama"), saved, tmp_path / "out", "mlx")
    assert mlx_config(tmp_path / "out")[0]["fine_tune_type"] == "dora"
    tensors = tensors_in(tmp_path / "out" / "adapter" / "adapters.safetensors")
    model, merged = tiny_model("llama"), tiny_model("llama")
    lf.load(merged, saved, "one").merge()
    sites = [key.removesuffix(".m") for key in tensors if key.endswith(".m")]
    assert len(sites) == 14
    for site in sites:
        a, b, m = (tensors[f"{site}.{leaf}"] for leaf in ("lora_a", "lora_b", "m"))
        v = model.get_submodule(site).weight.detach() + (a @ b).t()
        folded = (m / v.norm(dim=1))[:, None] * v
        torch.testing.assert_close(merged.get_submodule(site).weight.detach(), folded, **CLOSE)


def test_mlx_has_no_dora_over_loha(tiny_model, tiny_model_dir, tmp_path):
    spec = lf.DoRA(over=lf.LoHa())
    saved = noisy(tiny_model("llama"), spec, tmp_path / "adapter", targets=["q_proj"])
    with pytest.raises(LorafoldError, match="DoRADelta is no product"):
        exported(tiny_model_dir("llama"), saved, tmp_path / "out", "mlx")


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_mlx_experts_are_apart(name, tiny_mixture, tmp_path):
    base = tiny_mixture(name)
    saved = noisy(in_fp32(base), lf.LoRA(rank=3), tmp_path / "adapter")
    exported(base, saved, tmp_path / "out", "mlx")
    tensors = tensors_in(tmp_path / "out" / "adapter" / "adapters.safetensors")
    model, merged = in_fp32(base), in_fp32(base)
    lf.load(merged, saved, "one").merge()
    site = "model.layers.1.mlp.experts"
    found = changes(model, merged, [f"{site}.gate_up_proj", f"{site}.down_proj"])
    both, down = found[f"{site}.gate_up_proj"], found[f"{site}.down_proj"]
    if name == "gpt-oss":  # stored transposed, gates and ups in turns
        both, down = both.mT, down.mT
        gate, up = both[:, ::2], both[:, 1::2]
    else:
        gate, up = both.chunk(2, 1)
    switch = {
        "qwen3-moe": "mlp.switch_mlp",
        "mixtral": "block_sparse_moe.switch_mlp",
        "gpt-oss": "mlp.experts",
    }[name]
    for leaf, change in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        path = f"model.layers.1.{switch}.{leaf}"
        product = tensors[f"{path}.lora_b"] @ tensors[f"{path}.lora_a"]
        torch.testing.assert_close(change, product, **CLOSE)


def test_mlx_keys_are_those_of_the_tensors():
    every = [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    assert keys_of([*every, "lm_head"], 3) == ["lm_head", "self_attn.q_proj"]
    assert keys_of(every[1:], 3) == every[1:]


def test_configs_of_transformers_5_are_told_in_the_older_words():
    """Their positions would be another model's for mlx-lm."""
    plain = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    assert older_config(plain) == {**plain, "rope_theta": 1e5}
    scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    older = older_config(scaled)
    assert older is not None
    assert older["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    local = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}
    older = older_config({"rope_parameters": local})
    assert older is not None
    assert (older["rope_theta"], older["rope_local_base_freq"]) == (1e6, 1e4)
    assert older_config({"num_local_experts": 8}) == {"num_local_experts": 8, "num_experts": 8}
    assert older_config({"rope_theta": 1e4, **plain}) is None
    assert older_config({}) is None
    kinds = ["sliding_attention", "full_attention"] * 2
    layers = {"model_type": "gemma3_text", "layer_types": kinds}
    assert older_config(layers) == {**layers, "sliding_window_pattern": 2}
    assert older_config({**layers, "layer_types": kinds[:1] * 5 + kinds[1:2]}) is None


def test_vllm_line_and_files(tiny_model, tiny_model_dir, tmp_path):
    base, spec = tiny_model_dir("llama"), lf.LoRA(rank=9, rslora=True)
    saved = noisy(tiny_model("llama"), spec, tmp_path / "facts")
    done = exported(base, saved, tmp_path / "out", "vllm")
    assert shlex.split(done.launch[0]) == [
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "16", "--lora-modules",
        f"facts={tmp_path / 'out' / 'adapter'}",
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
    done = exported(base, saved, tmp_path / "out", "vllm")
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


def test_sglang_gets_zeros_for_what_it_packs(tiny_model, tiny_model_dir, tmp_path):
    saved = noisy(tiny_model("llama"), lf.LoRA(rank=4), tmp_path / "adapter", targets=["q_proj"])
    done = lf.export(tiny_model_dir("llama"), saved, tmp_path / "out", to="sglang", device="cpu")
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
    model, merged = in_fp32(base), in_fp32(base)
    lf.load(merged, saved, "one").merge()
    site = "model.layers.0.mlp.experts"
    change = changes(model, merged, [f"{site}.gate_up_proj"])[f"{site}.gate_up_proj"]
    gate, up = change.chunk(2, 1)
    for e in range(8):
        for name, part in (("gate_proj", gate[e]), ("up_proj", up[e])):
            key = f"{ROOT}{site}.{e}.{name}"
            product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            torch.testing.assert_close(part, product, **CLOSE)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert {"gate_proj", "up_proj", "down_proj"} <= set(config["target_modules"])


def test_sglang_reads_back_what_is_there(tiny_model, tiny_model_dir, tmp_path):
    """A scale that is lost, a tensor too many and one that is not there are found."""
    base = tiny_model_dir("llama")
    saved = noisy(tiny_model("llama"), lf.LoRA(rank=4), tmp_path / "adapter")
    exported(base, saved, tmp_path / "out", "sglang")
    subject, target = Subject(Base(base), (SavedAdapter.open(saved),)), ToSglang()
    assert "14 modules" in target.read_back(subject, tmp_path / "out")
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    whole = tensors_in(file)
    key = f"{ROOT}model.layers.1.mlp.up_proj.lora_B.weight"
    damaged = {
        "differ by 5": {**whole, key: whole[key] / 2},
        "has no module": {**whole, key.replace("layers.1", "layers.7"): whole[key].clone()},
        "not in the file": {k: t for k, t in whole.items() if k != key},
    }
    for said, tensors in damaged.items():
        save_file(tensors, file)
        with pytest.raises(LorafoldError, match=said):
            target.read_back(subject, tmp_path / "out")


REFUSED = {
    "mlx, names": ("mlx", "gpt2", {}, "found none of mlx-lm's names"),
    "mlx, tied": ("mlx", "gemma", {"targets": ["embed_tokens"]}, "embedding and head are tied"),
    "vllm, head": ("vllm", "gemma", {"targets": ["embed_tokens"]}, "adapts no embedding"),
    "vllm, norms": ("vllm", "llama", {"modules_to_save": ["norm"]}, "can't say"),
    "vllm, none": ("vllm", "gpt2", {}, "vLLM has no LoRA for models of type gpt2"),
    "sglang, names": ("sglang", "gpt2", {}, "SGLang adapts no module of that name"),
    "sglang, tied": ("sglang", "gemma", {"targets": ["embed_tokens"]}, "are tied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_has_not_is_refused(case, tiny_model, tiny_model_dir, tmp_path):
    to, kind, beside, said = REFUSED[case]
    saved = noisy(tiny_model(kind), lf.LoRA(rank=2), tmp_path / "adapter", **beside)
    with pytest.raises(LorafoldError, match=said) as refused:
        exported(tiny_model_dir(kind), saved, tmp_path / "out", to)
    assert len(str(refused.value)) < 300
    assert not (tmp_path / "out").exists()


def test_vllm_refuses_a_rank_that_it_has_not(tiny_model, tiny_model_dir, tmp_path):
    spec = lf.LoRA(rank=513, alpha=1)
    saved = noisy(tiny_model("llama"), spec, tmp_path / "adapter", targets=["q_proj"])
    with pytest.raises(LorafoldError, match="rank 513: vLLM takes at most 512; --as-lora 512"):
        exported(tiny_model_dir("llama"), saved, tmp_path / "out", "vllm")


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_experts_of_unknown_families_are_refused(to, tiny_mixture, tmp_path):
    """vLLM would pass over them without a word."""
    base = tiny_mixture("deepseek-v3" if to == "vllm" else "gpt-oss")
    targets = r".*experts\.down_proj"
    saved = noisy(in_fp32(base), lf.LoRA(rank=2), tmp_path / "adapter", targets=targets)
    with pytest.raises(LorafoldError, match=r"known of .*, not of"):
        exported(base, saved, tmp_path / "out", to)


def check(done):
    """The engine computes what lorafold does, and took all of the files."""
    proof = done.proof
    assert proof is not None
    assert proof.share is not None
    assert proof.share < 1e-3
    assert proof.top == proof.prompts
    assert proof.greedy + proof.near == proof.prompts
    assert proof.changed == pytest.approx(proof.distance, rel=0.02)
    assert not proof.unused


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama, DoRA"])
def test_mlx_computes_what_lorafold_does(kind, tiny_model, tiny_model_dir, tmp_path):
    python = python_of("mlx")
    kind, _, dora = kind.partition(", ")
    spec = lf.DoRA() if dora else lf.LoRA(rank=4, rslora=True)
    saved = noisy(tiny_model(kind), spec, tmp_path / "adapter")
    base, out = tiny_model_dir(kind), tmp_path / "out"
    check(lf.export(base, saved, out, to="mlx", engine_python=python, device="cpu"))


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
