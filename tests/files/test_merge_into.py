"""Merging into dequantized, original or requantized weights, and into shared ones."""

import io
import re
from collections.abc import Callable
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, RobertaConfig, Zamba2Config, ZambaConfig

import lorafold as lf
from adapter_cases import differs, make_adapter, relative, resaved
from adapter_files import json_of, tensors_of
from conftest import fast_only, make_tokenizer
from fresh_models import fresh_model
from lorafold.api.merge import merge
from lorafold.errors import LorafoldError
from lorafold.identity import of_model
from lorafold.layers import layer_of
from lorafold.layers.bitsandbytes import Quantized
from lorafold.models.loading import load_model, unquantized_weights
from lorafold.models.quantizations import Storage
from lorafold.models.sources import resolve_model
from lorafold.recipe.recipe import Recipe

IDS = torch.arange(5, 25)[None]
METHODS = {
    "lora": lf.LoRA(rank=4, dropout=0.0),
    "dora": lf.DoRA(lf.LoRA(rank=4, dropout=0.0)),
    "loha": lf.LoHa(rank=4),
    "ia3": lf.IA3(),
    "part": lf.LoRA(rank=4, dropout=0.0),
}


def trained(base, path, kind="nf4", method="lora"):
    """Save an adapter on a packed base, as a run leaves it; the logits of the model with it."""
    storage = Storage(torch.float32, kind)
    model = load_model(base, storage)
    adapter = lf.attach(model, METHODS[method], ["q_proj", "up_proj"] if method == "part" else None)
    torch.manual_seed(1)
    for p in adapter.parameters():
        scales = method in ("dora", "ia3") and p.dim() == 1
        nn.init.normal_(p, mean=float(scales), std=0.05)
    weights = unquantized_weights(resolve_model(base), storage)
    record = {"recipe": Recipe(storage=kind).model_dump(mode="json")}
    adapter.save(path, base=weights, record=record)
    return model(IDS).logits.detach()


def logits(path, storage=torch.float32):
    return load_model(path, storage)(IDS).logits.detach()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("method", "kind"),
    fast_only(zip(METHODS, cycle(["nf4", "int8"])), product(METHODS, ["nf4", "int8"])),
)
def test_the_dequantized_base_is_the_default_and_gives_what_was_trained(
    tiny_model_dir, tmp_path, method, kind
):
    base = tiny_model_dir("llama-wide")
    expected = trained(base, tmp_path / "a", kind, method)
    merged = merge(base, [tmp_path / "a"], tmp_path / "out")
    assert (merged.into.target, merged.into.trained_on) == ("trained", kind)
    plain = load_model(tmp_path / "out", torch.float32)
    assert not any(isinstance(layer_of(m), Quantized) for m in plain.modules())
    # the unpacked numbers, embeddings and norms are of 16 bits in training
    bf16 = torch.finfo(torch.bfloat16).eps
    assert relative(plain(IDS).logits, expected) < 4 * bf16
    assert merged.gap.kl < 1e-4


@pytest.mark.slow
def test_the_original_and_the_requantized_base_are_what_they_say(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama-wide")
    expected = trained(base, tmp_path / "a")
    gaps = {
        into: merge(base, [tmp_path / "a"], tmp_path / into, into=into).gap.kl
        for into in ("original", "dequantized", "nf4", "int8")
    }
    assert gaps["dequantized"] < min(gaps["original"], gaps["nf4"], gaps["int8"])
    on_original = fresh_model(base)
    lf.load(on_original, tmp_path / "a")
    assert relative(logits(tmp_path / "original"), on_original(IDS).logits.detach()) < 1e-5
    assert relative(logits(tmp_path / "original"), expected) > 1e-2
    assert [p.name for p in (tmp_path / "nf4").glob("*.safetensors")] == ["model.safetensors"]
    settings = json_of(tmp_path / "nf4", "config.json")["quantization_config"]
    assert settings["bnb_4bit_quant_type"] == "nf4"
    packed = tensors_of(tmp_path / "nf4")["model.layers.0.mlp.up_proj.weight"]
    assert packed.dtype == torch.uint8
    again = load_model(tmp_path / "nf4", Storage(torch.float32, "nf4"))
    original = load_model(tmp_path / "original", torch.float32)
    site = "model.layers.1.mlp.gate_proj"
    w, q = original.get_submodule(site).weight, layer_of(again.get_submodule(site)).dense()[0]
    assert 0.01 < relative(q, w) < 0.15
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")  # without us
    assert plain.get_submodule(site).weight.dtype == torch.uint8


def test_a_small_update_survives_in_the_dequantized_base(tiny_model_dir, tmp_path):
    """Against the original weights the packing itself would pass for the update."""
    base = resaved(tiny_model_dir("llama-wide"), tmp_path / "base", torch.bfloat16)
    stored = Storage(torch.bfloat16, "nf4")
    model = load_model(base, stored)
    adapter = lf.attach(model, METHODS["lora"])
    for p in adapter.parameters():
        nn.init.normal_(p, std=2e-3)
    weights = unquantized_weights(resolve_model(base), stored)
    record = {"recipe": {"storage": "nf4"}}
    adapter.save(tmp_path / "a", base=weights, record=record)
    auto, nearest = (
        merge(base, [tmp_path / "a"], tmp_path / how, rounding=how, certificate=False)
        for how in ("auto", "nearest")
    )
    assert auto.folded.stats.survival == pytest.approx(1, abs=0.05)
    assert nearest.folded.stats.survival < 0.9


def test_targets_that_make_no_sense_are_refused_before_anything_is_written(
    tiny_model_dir, tmp_path
):
    base = tiny_model_dir("llama-wide")
    trained(base, tmp_path / "a")
    trained(base, tmp_path / "b", "int8")
    plain = fresh_model(base)
    adapter = lf.attach(plain, METHODS["lora"])
    for name, recorded in (("unrecorded", None), ("fp4", {"storage": "fp4", "dtype": "bf16"})):
        adapter.save(tmp_path / name, record={"trained_on": recorded})
    for adapters, asked, message in [
        (["a"], {"into": "fp8"}, "into: found fp8, expected one of trained, original, nf4, int8"),
        (["unrecorded"], {"into": "trained"}, "into trained: the adapters do not record how"),
        (["fp4"], {"into": "trained"}, "into trained: the adapter was trained on fp4 weights"),
        (["a", "b"], {}, "trained on bases with different quantization"),
    ]:
        with pytest.raises(LorafoldError, match=message):
            merge(base, [tmp_path / name for name in adapters], tmp_path / "d" / "out", **asked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "fp4", "unrecorded"]
    asked = {"storage": "nf4", "certificate": False}
    said = merge(base, [tmp_path / "unrecorded"], tmp_path / "out", **asked)
    assert said.into.target == "trained"
    other = merge(base, [tmp_path / "fp4"], tmp_path / "other", certificate=False)
    assert "fp4 weights can't be made from these files" in other.summary()


@pytest.mark.parametrize("kind", ["nf4", "int8", "bf16", "fp32"])
def test_an_adapter_that_was_attached_by_hand_is_merged_into_what_it_was_trained_on(
    tiny_model_dir, tmp_path, kind
):
    """Without a run there is no recipe, but a record of how the model stored its weights."""
    base = tiny_model_dir("llama-wide")
    model = lf.load_model(base, storage=kind)
    adapter = lf.attach(model, METHODS["dora"])
    torch.manual_seed(1)
    for p in adapter.parameters():
        p.data += 0.05 * torch.randn_like(p)
    quantization = kind if kind in ("nf4", "int8") else None
    stored = Storage(torch.float32, quantization)
    adapter.save(tmp_path / "a", base=unquantized_weights(resolve_model(base), stored))
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[model.dtype]
    record = json_of(tmp_path / "a", "lorafold.json")
    assert record["trained_on"] == {"storage": kind, "dtype": dtype}
    assert record["base_identity"] == of_model(resolve_model(base))
    merged = merge(base, [tmp_path / "a"], tmp_path / "out")
    assert merged.gap.kl < 1e-4
    if quantization:
        into = merge(base, [tmp_path / "a"], tmp_path / "original", into="original")
        assert into.gap.kl == pytest.approx(merged.from_original.kl, rel=1e-3)
        assert into.gap.kl > 3 * merged.gap.kl
    else:
        assert merged.from_original is None
    assert f"trained on {base} in {kind}" in merged.summary()
    assert "the model you trained -> the merged model: KL" in merged.summary()


def test_what_it_is_merged_into_is_said_before_it_is_done(tiny_model_dir, tmp_path, capsys):
    base = tiny_model_dir("llama-wide")
    trained(base, tmp_path / "a")
    console = Console(record=True, width=200)
    merge(base, [tmp_path / "a"], tmp_path / "out", into="nf4", certificate=False, console=console)
    assert (
        "merging into the original weights (the adapter was trained on nf4), quantized to nf4"
        in console.export_text()
    )


def test_gpt2_is_unpacked_in_its_own_orientation(tiny_model_dir, tmp_path):
    base = tiny_model_dir("gpt2-wide")
    expected = trained(base, tmp_path / "a")
    merge(base, [tmp_path / "a"], tmp_path / "out", certificate=False)
    assert relative(logits(tmp_path / "out"), expected) < 4 * torch.finfo(torch.bfloat16).eps


def test_the_storage_that_was_asked_for_is_known_and_told(tiny_model_dir, tmp_path):
    base, adapter = tiny_model_dir("llama-wide"), tmp_path / "a"
    trained(base, adapter)
    with pytest.raises(LorafoldError, match="storage foo: unknown; expected auto, bf16"):
        merge(base, [adapter], tmp_path / "deep" / "out", storage="foo")
    said = Console(file=io.StringIO(), width=400)
    merge(base, [adapter], tmp_path / "out", storage="fp32", certificate=False, console=said)
    assert said.file.getvalue() == (
        "merging into the original weights; storage fp32 as requested, although the adapter records"
        " nf4\n"
    )


def test_a_quantization_that_is_not_read_is_recorded_by_its_name(tiny_model_dir, tmp_path):
    model = lf.load_model(tiny_model_dir("llama"))
    adapter = lf.attach(model, lf.LoRA(rank=2))
    model.config.quantization_config = {"quant_method": "quanto"}
    adapter.save(tmp_path / "a")
    assert json_of(tmp_path / "a", "lorafold.json")["trained_on"]["storage"] == "quanto"


SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "mamba_d_state": 8, "use_mamba_kernels": False,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS = {
    "zamba": lambda: ZambaConfig(**SIZE, n_mamba_heads=2, attention_hidden_size=64),
    "zamba2": lambda: Zamba2Config(**SIZE, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8),
}
HEAD = {name: SIZE[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
CONFIGS["roberta"] = lambda: RobertaConfig(
    **HEAD, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, is_decoder=True
)
SHARED = {"zamba": "shared_transf", "zamba2": "shared_transformer"}


@pytest.fixture(scope="module")
def shared_blocks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model whose attention is one for several of its blocks."""

    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        return path

    return cache(make)


@pytest.mark.parametrize(("kind", "tokens"), [("zamba", ()), ("zamba2", (7, 300))])
def test_what_stays_equal_is_written_where_nothing_is_shared_any_more(
    kind, tokens, shared_blocks, tmp_path
):
    """The rows of tokens change the embedding and the head alike."""
    base, shared = shared_blocks(kind), SHARED[kind]
    targets = rf".*layers\.1\.{shared}\..*q_proj"
    adapter = make_adapter(base, tmp_path / "adapter", targets=targets, tokens=tokens)
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert differs(tmp_path / "merged", base, adapter) < 1e-5
    assert f"model.layers.3.{shared}.self_attn.q_proj.weight" in result.folded.untied
    assert "lm_head.weight" in result.folded.untied
    said = result.summary()
    assert "weights are no longer tied: " in said
    assert re.search(r", .*,? and \d+ more were added", said)

    model = fresh_model(base)
    lf.load(model, adapter).merge(untie_weights=True)
    model.save_pretrained(tmp_path / "saved")
    assert differs(tmp_path / "saved", base, adapter) < 1e-5


@pytest.mark.parametrize("kind", SHARED)
def test_what_no_block_changes_alone_stays_shared(kind, shared_blocks, tmp_path):
    base = shared_blocks(kind)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["in_proj"])
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert result.folded.untied == ()
    assert differs(tmp_path / "merged", base, adapter) < 1e-5


def test_a_bias_that_was_tied_like_the_weight_beside_it_is_written(shared_blocks, tmp_path):
    base = shared_blocks("roberta")
    adapter = make_adapter(base, tmp_path / "adapter", targets=["decoder"])
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert result.folded.untied == ("lm_head.decoder.weight", "lm_head.decoder.bias")
    assert differs(tmp_path / "merged", base, adapter) < 1e-5
