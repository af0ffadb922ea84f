"""Bases packed by bitsandbytes: what is packed, what a step keeps, and that nothing else changes.

(The laws: lib/laws.py.)
"""

import gc
import json
import weakref

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from rich.console import Console
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lorafold as lf
from conftest import ALIKE
from lorafold.api.merge import merge
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.layers import layer_of, parameter_count
from lorafold.layers.bitsandbytes import Quantized
from lorafold.methods import METHODS, known_options, make_spec
from lorafold.models import fingerprint
from lorafold.models.loading import load_model, weights_of
from lorafold.models.quantizations import STORAGES, Storage, choose_storage
from lorafold.models.sources import resolve_model
from lorafold.ops import nf4
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.request import RunRequest
from lorafold.training.run import train
from lorafold.training_step.fused_modules import fused

KINDS = ["nf4", "int8"]
IDS = torch.arange(5, 25)[None]


def held(kind: str, dtype: torch.dtype = torch.float32) -> Storage:
    return Storage(dtype, kind)


def packed_paths(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(layer_of(m), Quantized)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-wide", "gpt2-wide"])
def test_the_linears_of_the_blocks_are_packed_and_nothing_else(tiny_model_dir, name, kind):
    plain, model = (
        load_model(tiny_model_dir(name), torch.bfloat16),
        load_model(tiny_model_dir(name), held(kind, torch.bfloat16)),
    )
    inside = list(lf.attach(plain, lf.LoRA()).matches.paths)
    assert packed_paths(model) == inside
    assert {
        p.dtype
        for n, p in model.named_parameters()
        if n.rsplit(".", 1)[0] not in inside or n.endswith("bias")
    } == {torch.bfloat16}
    assert parameter_count(model) == parameter_count(plain)
    for path in inside:
        w, q = layer_of(plain.get_submodule(path)).dense()[0], layer_of(model.get_submodule(path))
        assert q.shape == w.shape
        step = w.float().abs().amax() * (0.16 if kind == "nf4" else 1 / 127)
        assert (q.dense()[0].float() - w.float()).abs().max() <= step
    assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
    assert model.name_or_path == str(tiny_model_dir(name))
    assert not model.training


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_an_answer_between_steps_leaves_gradients_as_they_were(tiny_model_dir, method):
    """bitsandbytes reorders its codes for answers where the CPU has bf16 in AVX512, and gives no
    gradients from that order.
    """
    model = load_model(tiny_model_dir("llama-wide"), held("nf4", torch.bfloat16))
    for p in lf.attach(
        model, make_spec(method), "attention" if method == "lora" else None
    ).parameters():
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
    plain, model = (
        load_model(tiny_model_dir("llama-wide"), torch.bfloat16),
        load_model(tiny_model_dir("llama-wide"), held("nf4")),
    )
    for path in packed_paths(model):
        w = plain.get_submodule(path).weight.detach()
        expected = nf4.dequantize(nf4.quantize(w), torch.bfloat16).float()
        found = layer_of(model.get_submodule(path)).dense()[0]
        # constants that lie between two of 256 levels
        assert (found - expected).norm() <= 1e-3 * expected.norm()
    unpacked = load_model(tiny_model_dir("llama-wide"), torch.float32)
    for path in packed_paths(model):
        unpacked.get_submodule(path).weight.data.copy_(
            layer_of(model.get_submodule(path)).dense()[0]
        )
    # of the embeddings and norms, which a packed model holds in 16 bits
    bf16 = torch.finfo(torch.bfloat16).eps
    assert (model(IDS).logits - unpacked(IDS).logits).norm() <= 4 * bf16 * unpacked(
        IDS
    ).logits.norm()


@pytest.mark.few(24)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "linear-probe")])
def test_a_step_keeps_no_matrix_of_the_base(tiny_model_dir, method, kind):
    """Of what autograd saves between forward and backward nothing has the shape of a packed weight,
    but what is the model's own.
    """
    model = load_model(tiny_model_dir("llama-wide"), held(kind, torch.bfloat16)).train()
    small = {name: 3 for name in ("rank", "size") if name in known_options(method)}
    lf.attach(model, make_spec(method, **small))
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    weights = {
        shape for p in packed_paths(model) for shape in (layer_of(model.get_submodule(p)).shape,)
    }
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
    adapter = lf.attach(model, lf.LoRA(dropout=0.0))
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.05)
    expected = model(IDS).logits
    adapter.merge()
    assert packed_paths(model) == []
    assert (model(IDS).logits - expected).norm() <= 1e-5 * expected.norm()
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (
        load_model(tmp_path / "plain", torch.float32)(IDS).logits - expected
    ).norm() <= 1e-5 * expected.norm()


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
    with pytest.raises(LorafoldError, match=f"stored as {kind}, so it can't be loaded as {other}"):
        load_model(tmp_path / "packed", held(other))
    with pytest.raises(LorafoldError, match=f"stored as {kind}; expected the base {kind}"):
        load_model(tmp_path / "packed", torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_under_any_dtype(tiny_model_dir, tmp_path, stored, dtype):
    """As checkpoints for FSDP are (`bnb_4bit_quant_storage`): bf16 codes were converted to fp32."""
    base, found = tiny_model_dir("llama-wide"), []
    for storage in (torch.uint8, stored):
        made = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage
        )
        path = tmp_path / str(storage)
        LlamaForCausalLM.from_pretrained(
            base, quantization_config=made, dtype=torch.bfloat16, device_map={"": "cpu"}
        ).save_pretrained(path)
        model = load_model(path, held("nf4", dtype))
        lf.attach(model, lf.LoRA())
        found.append(model(IDS).logits)
    assert found[1].dtype == dtype
    assert torch.equal(*found)


def test_the_fingerprint_is_that_of_the_base_before_it_was_packed(tiny_model_dir, tmp_path):
    path = tiny_model_dir("llama-wide")
    source, plain = resolve_model(path), load_model(path, torch.float32)
    model = load_model(path, held("nf4"))
    weights = weights_of(source, held("nf4"))
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
    with pytest.raises(LorafoldError, match="not the base it was trained on"):
        lf.load(
            other, tmp_path / "a", base=weights_of(resolve_model(tmp_path / "other"), held("nf4"))
        )


def test_a_deep_base_is_known_by_what_is_not_packed(tiny_model_dir, tmp_path):
    """With more linears than a fingerprint has room for, none of its weights might be left to
    compare.
    """
    config = load_model(tiny_model_dir("llama-wide"), torch.float32).config
    config.num_hidden_layers = 8
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "deep")
    weights = weights_of(resolve_model(tmp_path / "deep"), held("nf4"))
    model = load_model(tmp_path / "deep", held("nf4"))
    assert len(packed_paths(model)) > fingerprint.TENSORS
    lf.attach(model, lf.LoRA()).save(tmp_path / "a", base=weights)
    lf.load(load_model(tmp_path / "deep", held("nf4")), tmp_path / "a")
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "other")
    with pytest.raises(LorafoldError, match="not the base it was trained on"):
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
    with pytest.raises(
        LorafoldError,
        match=(
            "Full trains floating-point weights in place; "
            "Linear4bit has quantized parameters: weight"
        ),
    ):
        lf.attach(load_model(tiny_model_dir("llama-wide"), held("nf4")), lf.Full())
    request = RunRequest(
        Base(tiny_model_dir("llama-wide")),
        tmp_path / "out",
        Recipe(method="full", storage="nf4"),
        ROWS,
        "rows",
    )
    with pytest.raises(
        LorafoldError,
        match=(
            "storage nf4: full trains the base's own weights, which can't be quantized; expected"
            " fp32 or bf16"
        ),
    ):
        train(request, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]


@pytest.mark.slow
def test_training_takes_nf4_unless_it_is_told_otherwise(tiny_model_dir, tmp_path):
    model = str(tiny_model_dir("llama-wide"))
    lines = Console(record=True, quiet=True)
    train(RunRequest(Base(model), tmp_path / "a", Recipe(steps=2, batch=4), ROWS, "rows"), lines)
    assert SavedAdapter.open(tmp_path / "a").record["recipe"]["storage"] == "nf4"
    train(
        RunRequest(
            Base(model), tmp_path / "b", Recipe(steps=1, batch=4, storage="int8"), ROWS, "rows"
        ),
        lines,
    )
    train(
        RunRequest(
            Base(model),
            tmp_path / "c",
            Recipe(steps=1, batch=4),
            ROWS,
            "rows",
            init_adapter=tmp_path / "b",
        ),
        lines,
    )
    assert SavedAdapter.open(tmp_path / "c").record["recipe"]["storage"] == "int8"
    train(
        RunRequest(
            Base(model), tmp_path / "d", Recipe(steps=1, batch=4, method="full"), ROWS, "rows"
        ),
        lines,
    )
    record = json.loads((tmp_path / "d" / "lorafold.json").read_text())
    assert record["recipe"]["storage"] == "fp32"


def test_loftq_starts_nearer_to_the_weights_that_were_packed(tiny_model_dir):
    path = tiny_model_dir("llama-wide")
    weights = weights_of(resolve_model(path), held("nf4"))
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
    assert choose_storage("nf4", "cpu").why.startswith("nf4, computed in ")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[pytest.mark.slow] if m in ALIKE else [])
        for m in METHODS
        if m not in ("full", "linear-probe")
    ],
)
def test_every_method_trains_and_merges_on_nf4(tiny_model_dir, tmp_path, method):
    """By the same command, and the merged model is what was trained; or the method says that it has
    no form in weight space.
    """
    model = str(tiny_model_dir("llama-wide"))
    options = {"lt-sft": {"dense_steps": 2}, "fish": {"samples": 4}}.get(method, {})
    recipe = Recipe(method=method, steps=3, batch=4, options=options)
    train(RunRequest(Base(model), tmp_path / "a", recipe, ROWS, "rows"), Console(quiet=True))
    try:
        merged = merge(model, [tmp_path / "a"], tmp_path / "out")
    except NotMergeable:
        assert not (tmp_path / "out").exists()
        assert method in ("houlsby", "pfeiffer", "prompt", "prefix")
    else:
        assert merged.into.target == "trained"
        assert merged.gap.kl < 1e-4
