"""Bases packed by bitsandbytes: what is packed, what a step keeps, and what stays as it was."""

import gc
import json
import weakref
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lorafold as lf
import nf4_reference as nf4
from lorafold.api.merge import merge
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.layers import layer_of, parameter_count
from lorafold.layers.bitsandbytes import Quantized
from lorafold.methods import METHODS, known_options, make_spec
from lorafold.models import fingerprint
from lorafold.models.loading import load_model, unquantized_weights
from lorafold.models.quantizations import STORAGES, Storage, choose_storage
from lorafold.models.sources import resolve_model
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train
from lorafold.training_step.fused_modules import fused
from noise import moved
from quantized_cases import ROWS
from training_cases import quiet, trained

KINDS = ["nf4", "int8"]
IDS = torch.arange(5, 25)[None]


def held(kind: str, dtype: torch.dtype = torch.float32) -> Storage:
    return Storage(dtype, kind)


def packed_paths(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(layer_of(m), Quantized)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-wide", "gpt2-wide"])
def test_the_linears_of_the_blocks_are_packed_and_nothing_else(tiny_model_dir, name, kind):
    path, bf16 = tiny_model_dir(name), torch.bfloat16
    plain, model = load_model(path, bf16), load_model(path, held(kind, bf16))
    inside = list(lf.attach(plain, lf.LoRA()).matches.paths)
    assert packed_paths(model) == inside
    named = model.named_parameters()
    others = [p for n, p in named if n.rsplit(".", 1)[0] not in inside or n.endswith("bias")]
    assert {p.dtype for p in others} == {bf16}
    assert parameter_count(model) == parameter_count(plain)
    for site in inside:
        w, q = layer_of(plain.get_submodule(site)).dense()[0], layer_of(model.get_submodule(site))
        assert q.shape == w.shape
        step = w.float().abs().amax() * (0.16 if kind == "nf4" else 1 / 127)
        assert (q.dense()[0].float() - w.float()).abs().max() <= step
    assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
    assert model.name_or_path == str(path)
    assert not model.training


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_an_answer_between_steps_leaves_gradients_as_they_were(tiny_model_dir, method):
    """bitsandbytes reorders its codes for inference with AVX512, and loses the gradients."""
    model = load_model(tiny_model_dir("llama-wide"), held("nf4", torch.bfloat16))
    targets = "attention" if method == "lora" else None
    for p in lf.attach(model, make_spec(method), targets).parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))

    def gradients() -> torch.Tensor:
        torch.manual_seed(0)
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def near(found: torch.Tensor) -> bool:
        return (found - before).norm() < 0.02 * before.norm()

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert near(gradients())
    for module in model.modules():  # as it comes from elsewhere
        if isinstance(layer_of(module), Quantized):
            module.support_avx512bf16_for_cpu = has_avx512bf16()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    with fused(model):
        assert near(gradients())


def test_rows_that_are_no_whole_blocks_stay_in_16_bits(tiny_model_dir):
    # 32 wide, 64 in the MLP
    model = load_model(tiny_model_dir("llama"), held("nf4", torch.bfloat16))
    assert packed_paths(model) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_what_is_computed_is_the_specification(tiny_model_dir):
    path = tiny_model_dir("llama-wide")
    plain, model, unpacked = (
        load_model(path, how) for how in (torch.bfloat16, held("nf4"), torch.float32)
    )
    for path in packed_paths(model):
        w = plain.get_submodule(path).weight.detach()
        expected = nf4.dequantize(nf4.quantize(w), torch.bfloat16).float()
        found = layer_of(model.get_submodule(path)).dense()[0]
        # constants that lie between two of 256 levels
        assert (found - expected).norm() <= 1e-3 * expected.norm()
        unpacked.get_submodule(path).weight.data.copy_(found)
    # of the embeddings and norms, which a packed model holds in 16 bits
    bf16, expected = torch.finfo(torch.bfloat16).eps, unpacked(IDS).logits
    assert (model(IDS).logits - expected).norm() <= 4 * bf16 * expected.norm()


@pytest.mark.few(24)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "linear-probe")])
def test_a_step_keeps_no_matrix_of_the_base(tiny_model_dir, method, kind):
    """Nothing that autograd saves has the shape of a packed weight, but what is the model's own."""
    model = load_model(tiny_model_dir("llama-wide"), held(kind, torch.bfloat16)).train()
    small = {name: 3 for name in ("rank", "size") if name in known_options(method)}
    lf.attach(model, make_spec(method, **small))
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    weights = {layer_of(model.get_submodule(p)).shape for p in packed_paths(model)}
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept.append(tuple(t.shape))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(IDS[:, :3], use_cache=False).logits.float().square().mean()
    assert kept
    assert [shape for shape in kept if shape in weights or shape[::-1] in weights] == []
    loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_memory_leaves_a_plain_model(tiny_model_dir, tmp_path, kind):
    model = load_model(tiny_model_dir("llama-wide"), held(kind))
    adapter = moved(lf.attach(model, lf.LoRA(dropout=0.0)), 0.05)
    expected = model(IDS).logits
    adapter.merge()
    assert packed_paths(model) == []
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    for found in (model, load_model(tmp_path / "plain", torch.float32)):
        assert (found(IDS).logits - expected).norm() <= 1e-5 * expected.norm()


def test_merging_a_part_leaves_the_rest_packed(tiny_model_dir, tmp_path):
    model = load_model(tiny_model_dir("llama-wide"), held("nf4", torch.bfloat16))
    adapter = lf.attach(model, lf.LoRA(dropout=0.0), ["q_proj"])
    adapter.merge()
    assert not any("q_proj" in path for path in packed_paths(model))
    assert len(packed_paths(model)) == 12
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "part")
    again = load_model(tmp_path / "part", held("nf4", torch.bfloat16))
    assert packed_paths(again) == packed_paths(model)
    assert torch.equal(again(IDS).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_packed_loads_as_it_is(tiny_model_dir, tmp_path, kind):
    model = load_model(tiny_model_dir("llama-wide"), held(kind, torch.bfloat16))
    model.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", held(kind, torch.bfloat16))
    assert packed_paths(again) == packed_paths(model)
    for path in packed_paths(model):
        assert torch.equal(*(layer_of(m.get_submodule(path)).dense()[0] for m in (model, again)))
    other = next(k for k in KINDS if k != kind)
    with pytest.raises(LorafoldError, match=f"as {kind}, so they can't be loaded as {other}"):
        load_model(tmp_path / "packed", held(other))
    with pytest.raises(LorafoldError, match=f"stored as {kind}; load them as {kind}"):
        load_model(tmp_path / "packed", torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_under_any_dtype(tiny_model_dir, tmp_path, stored, dtype):
    """As checkpoints for FSDP are (`bnb_4bit_quant_storage`): bf16 codes were converted to fp32."""
    base, found = tiny_model_dir("llama-wide"), []
    for storage in (torch.uint8, stored):
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": storage}
        how: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
        path = tmp_path / str(storage)
        LlamaForCausalLM.from_pretrained(base, **how).save_pretrained(path)
        model = load_model(path, held("nf4", dtype))
        lf.attach(model, lf.LoRA())
        found.append(model(IDS).logits)
    assert found[1].dtype == dtype
    assert torch.equal(*found)


def test_the_fingerprint_is_that_of_the_base_before_it_was_packed(tiny_model_dir, tmp_path):
    path = tiny_model_dir("llama-wide")
    source, plain = resolve_model(path), load_model(path, torch.float32)
    model = load_model(path, held("nf4"))
    weights = unquantized_weights(source, held("nf4"))
    lf.attach(model, lf.LoRA()).save(tmp_path / "a", base=weights)
    assert fingerprint.differences(SavedAdapter.open(tmp_path / "a").record["base"], weights) == []
    lf.load(plain, tmp_path / "a")
    lf.load(load_model(path, held("int8")), tmp_path / "a", base=weights)
    lf.load(load_model(path, held("int8", torch.bfloat16)), tmp_path / "a")  # by what is not packed
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.up_proj.weight.mul_(1.1)
    plain.save_pretrained(tmp_path / "other")
    other = load_model(tmp_path / "other", held("nf4"))
    weights = unquantized_weights(resolve_model(tmp_path / "other"), held("nf4"))
    with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
        lf.load(other, tmp_path / "a", base=weights)


def test_a_deep_base_is_known_by_what_is_not_packed(tiny_model_dir, tmp_path):
    """It has more linears than a fingerprint has room for."""
    config = load_model(tiny_model_dir("llama-wide"), torch.float32).config
    config.num_hidden_layers = 8
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "deep")
    weights = unquantized_weights(resolve_model(tmp_path / "deep"), held("nf4"))
    model = load_model(tmp_path / "deep", held("nf4"))
    assert len(packed_paths(model)) > fingerprint.MAX_TENSORS
    lf.attach(model, lf.LoRA()).save(tmp_path / "a", base=weights)
    lf.load(load_model(tmp_path / "deep", held("nf4")), tmp_path / "a")
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "other")
    with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
        lf.load(load_model(tmp_path / "other", held("nf4")), tmp_path / "a")


def test_weights_that_bitsandbytes_repacked_are_read_all_the_same():
    module = STORAGES["nf4"].pack(torch.randn(64, 128)).eval()
    expected = layer_of(module).dense()[0]
    with torch.no_grad():
        # some CPUs get another layout, with constants in bf16
        module(torch.randn(2, 128).bfloat16())
    found = layer_of(module).dense()[0]
    assert (found.float() - expected.float()).norm() <= 0.01 * expected.float().norm()


def test_full_fine_tuning_refuses_a_packed_base(tiny_model_dir, tmp_path):
    told = "Full trains floating-point weights in place; Linear4bit has quantized parameters: w"
    with pytest.raises(LorafoldError, match=told):
        lf.attach(load_model(tiny_model_dir("llama-wide"), held("nf4")), lf.Full())
    told = "storage nf4: full trains the base's own weights, which can't be quantized; expected fp"
    with pytest.raises(LorafoldError, match=told):
        trained(tiny_model_dir("llama-wide"), tmp_path / "out", method="full", storage="nf4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_takes_nf4_unless_it_is_told_otherwise(tiny_model_dir, tmp_path):
    base = Base(tiny_model_dir("llama-wide"))
    for name, storage, asked, start in (
        ("a", "nf4", {}, None),
        ("b", "int8", {"storage": "int8"}, None),
        ("c", "int8", {}, tmp_path / "b"),
        ("d", "fp32", {"method": "full"}, None),
    ):
        recipe = Recipe(batch=4, steps=1 + (name == "a"), **asked)
        where = tmp_path / name, recipe, ROWS, "rows"
        train(RunRequest(base, *where, init_adapter=start), quiet())
        record = json.loads((tmp_path / name / "lorafold.json").read_text())
        assert record["recipe"]["storage"] == storage


def test_loftq_starts_nearer_to_the_weights_that_were_packed(tiny_model_dir):
    path = tiny_model_dir("llama-wide")
    weights = unquantized_weights(resolve_model(path), held("nf4"))
    plain, model = load_model(path, torch.float32), load_model(path, held("nf4"))
    spec = lf.LoRA(rank=4, init="loftq", dropout=0.0)
    with pytest.raises(LorafoldError, match="the weight before quantization is needed"):
        lf.attach(model, spec)
    adapter = lf.attach(model, spec, base=weights)
    for site, delta in adapter.deltas.items():
        w, q = (layer_of(m.get_submodule(site)).dense()[0] for m in (plain, model))
        values = torch.linalg.svdvals(w - q)
        # Eckart and Young: no change of rank 4 comes nearer
        assert (w - q - delta.delta()).norm() <= 1.001 * values[4:].norm()
    whole = lf.attach(load_model(path, torch.float32), spec)
    assert all(not delta.delta().any() for delta in whole.deltas.values())


def test_packing_is_freed_with_the_model(tiny_model_dir):
    model = load_model(tiny_model_dir("llama-wide"), held("nf4"))
    lf.attach(model, lf.LoRA(dropout=0.0))
    model(IDS).logits.sum().backward()
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model
    gc.collect()
    assert weight() is None


def test_storage_is_named_with_its_reason():
    assert choose_storage("nf4", "cpu").reason.startswith("nf4, computed in ")


@pytest.mark.few(2)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "linear-probe")])
def test_every_method_trains_and_merges_on_nf4(tiny_model_dir, tmp_path, method):
    """The merged model is what was trained, or the method has no form in weight space."""
    model = tiny_model_dir("llama-wide")
    options = {"lt-sft": {"dense_steps": 2}, "fish": {"samples": 4}}.get(method, {})
    fields = {"method": method, "steps": 3, "storage": "nf4", "options": options}
    trained(model, tmp_path / "a", ROWS, **fields)
    try:
        merged = merge(str(model), [tmp_path / "a"], tmp_path / "out")
    except NotMergeable:
        assert not (tmp_path / "out").exists()
        assert method in ("houlsby", "pfeiffer", "prompt", "prefix")
    else:
        assert merged.into.target == "trained"
        assert merged.gap.kl < 1e-4
