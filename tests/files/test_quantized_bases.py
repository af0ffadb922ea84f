"""Quantized files of compressed-tensors are read, trained over and merged, or refused."""

import itertools
import json
import logging
import shutil
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

import lorafold as lf
from adapter_files import assert_same_tensors, json_of
from error_cases import refusal
from lorafold.api.merge import merge
from lorafold.errors import LorafoldError
from lorafold.layers import layer_of, parameter_count
from lorafold.layers.compressed import CompressedLinear, QuantizationFormat
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.ops.float8 import is_nan, to_fp32
from lorafold.ops.mxfp4 import dequantize as mxfp4
from quantized_cases import (
    IDS,
    KINDS,
    METHODS,
    adapted_alike,
    commands,
    compressor_of,
    edit,
    make_compressed,
    make_fine_grained,
    moved,
    plain_of,
    refused_everywhere,
    relative,
    rows_at,
)

SITE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory):
    """Directory of the model that the others are quantized from, in bf16."""
    path = tmp_path_factory.mktemp("plain") / "llama"
    shutil.copytree(tiny_model_dir("llama-wide"), path)
    edit(path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    return path


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory):
    """Directory of the model in a format. Read only."""
    return cache(lambda kind: make_compressed(base, tmp_path_factory.mktemp("q") / kind, kind))


def loaded(path, kind="fp8", dtype=torch.float32):
    return load_model(path, Storage(dtype, KINDS[kind][3]))


def by_transformers(path, config):
    """The model as transformers dequantizes it while loading, in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config(dequantize=True)
    )


def compressed(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, CompressedLinear)}


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_compressed_tensors_decompresses(quantized, kind):
    model = lf.load_model(quantized(kind))
    settings = json_of(quantized(kind), "config.json")["quantization_config"]
    compressor, scheme = compressor_of(settings)
    assert len(compressed(model)) == 14
    for module in compressed(model).values():
        own = {n: p.detach() for n, p in module.named_parameters()}
        expected = compressor.decompress(own, scheme)["weight"]
        assert expected.dtype == torch.bfloat16
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(layer_of(module).read(dtype), expected.to(dtype))


@pytest.mark.parametrize("kind", ["fp8", "fp8-block", "int4", "int4-channel", "int8"])
def test_the_bare_base_computes_what_transformers_does(quantized, kind):
    ours = loaded(quantized(kind), kind)
    theirs = by_transformers(quantized(kind), CompressedTensorsConfig)
    assert relative(ours(IDS).logits, theirs(IDS).logits) < 1e-6


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_in_memory_as_in_the_files(quantized, kind):
    stored = load_file(quantized(kind) / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = loaded(quantized(kind), kind, dtype)
        for path, module in compressed(model).items():
            for name, parameter in module.named_parameters():
                assert parameter.dtype == stored[f"{path}.{name}"].dtype
                assert torch.equal(parameter, stored[f"{path}.{name}"])
        model(IDS)  # after which a model of transformers has plain weights
        assert len(compressed(model)) == 14
        codes = sum(p.nbytes for m in compressed(model).values() for p in m.parameters())
        share = codes / sum(2 * m.in_features * m.out_features for m in compressed(model).values())
        assert share < {"fp8": 0.52, "int8": 0.54, "int4": 0.32}[KINDS[kind][3]]
    plain = AutoModelForCausalLM.from_config(model.config)
    assert parameter_count(model) == sum(p.numel() for p in plain.parameters())


def test_scales_in_fp32_stay_so(quantized, tmp_path):
    path = tmp_path / "q"
    shutil.copytree(quantized("int4"), path)
    edit(path, lambda t: t.update({n: x.float() * 1.001 for n, x in t.items() if "scale" in n}))
    scale = loaded(path, "int4", torch.bfloat16).get_submodule(SITE).weight_scale
    assert torch.equal(scale, load_file(path / "model.safetensors")[f"{SITE}.weight_scale"])


@pytest.mark.few(4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_over_codes_is_one_over_the_dequantized_weights(base, quantized, kind, method):
    over, plain = loaded(quantized(kind), kind), plain_of(quantized(kind), base)
    adapter = adapted_alike(over, plain, method)
    codes = [p for m in compressed(over).values() for p in m.parameters(recurse=False)]
    assert all(p.grad is None for p in codes)
    adapter.merge()
    assert not compressed(over)
    assert relative(over(IDS).logits, plain(IDS).logits) < 1e-5


def test_fine_grained_fp8_is_what_transformers_dequantizes(base, tmp_path):
    path = make_fine_grained(base, tmp_path / "q")
    model = loaded(path)
    assert len(compressed(model)) == 14
    theirs = by_transformers(path, FineGrainedFP8Config)
    w = layer_of(model.get_submodule(SITE)).dense()[0]
    assert torch.equal(w, theirs.get_submodule(SITE).weight)
    moved(model).save(tmp_path / "a", record={"recipe": {"storage": "fp8"}})
    expected = model(IDS).logits
    done = merge(path, [tmp_path / "a"], tmp_path / "merged")
    assert done.gap.kl < 1e-4
    assert relative(load_model(tmp_path / "merged", torch.float32)(IDS).logits, expected) < 1e-5


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["fp8", "fp8-block", "int4", "int4-asymmetric", "int8"])
def test_merging_gives_a_plain_model_and_says_how_near(base, quantized, tmp_path, kind):
    model, storage = loaded(quantized(kind), kind), KINDS[kind][3]
    adapter = moved(model, targets=["q_proj", "up_proj"])
    adapter.save(tmp_path / "a", record={"recipe": {"base": storage}})
    done = merge(quantized(kind), [tmp_path / "a"], tmp_path / "out")
    assert (done.into.target, done.into.trained_on) == ("trained", storage)
    assert done.gap.kl < 1e-4
    assert done.folded.stats.survival == pytest.approx(1, abs=0.01)
    assert "quantization_config" not in json_of(tmp_path / "out", "config.json")
    plain = plain_of(quantized(kind), base)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == plain.state_dict().keys()
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    # a weight that no adapter changes is the dequantized one, rounded once
    site = "model.layers.1.mlp.down_proj"
    assert torch.equal(written[f"{site}.weight"], plain.get_submodule(site).weight.bfloat16())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    eps = torch.finfo(torch.bfloat16).eps
    assert relative(merged(IDS).logits, model(IDS).logits) < 4 * eps


def test_targets_in_which_the_update_would_be_lost_are_refused(base, quantized, tmp_path):
    moved(loaded(quantized("fp8"))).save(tmp_path / "a", record={"recipe": {"storage": "fp8"}})
    for asked, said in [
        ({"into": "fp8"}, "into fp8: the model's files have fp8 weights, in which the update"),
        ({"into": "original"}, "into original: the model's files have fp8 weights, and no orig"),
        ({"into": "nf4"}, "into nf4: .* merge into trained, or pass the unquantized model"),
        ({"storage": "nf4"}, "storage nf4: the model's files are stored as fp8; expected fp8"),
    ]:
        with pytest.raises(LorafoldError, match=said):
            merge(quantized("fp8"), [tmp_path / "a"], tmp_path / "out", **asked)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    # the model that it was quantized from counts as the same base, and another one does not
    done = merge(base, [tmp_path / "a"], tmp_path / "out", certificate=False)
    assert done.into.target == "original"
    other = load_model(base, torch.float32)
    nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
        lf.load(other, tmp_path / "a")


@pytest.mark.parametrize("kind", ["fp8", "int4-asymmetric"])
def test_peft_s_files_both_ways(base, quantized, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = loaded(quantized(kind), kind)
    moved(model).save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain_of(quantized(kind), base), tmp_path / "ours")
    assert relative(theirs(IDS).logits, model(IDS).logits) < 1e-5
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    made = peft.get_peft_model(plain_of(quantized(kind), base), config)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    made.save_pretrained(tmp_path / "theirs")
    fresh = loaded(quantized(kind), kind)
    lf.load(fresh, tmp_path / "theirs")
    assert relative(fresh(IDS).logits, made(IDS).logits) < 1e-5


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_the_model_saves_as_it_was_loaded_and_half_merged(quantized, tmp_path, kind):
    model = loaded(quantized(kind), kind, torch.bfloat16)
    model.save_pretrained(tmp_path / "same")
    assert_same_tensors(tmp_path / "same", quantized(kind))
    theirs = by_transformers(tmp_path / "same", CompressedTensorsConfig)
    assert relative(theirs(IDS).logits, loaded(tmp_path / "same", kind)(IDS).logits) < 1e-6
    lf.attach(model, METHODS["lora"], ["q_proj"]).merge()
    model.save_pretrained(tmp_path / "half")
    again = loaded(tmp_path / "half", kind, torch.bfloat16)
    assert len(compressed(again)) == 12
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["fp8-dynamic", "int4"])
def test_the_command_trains_evaluates_and_merges(quantized, tmp_path, kind):
    said = commands(quantized(kind), KINDS[kind][3], tmp_path)
    assert ("also quantizes activations" in said) == (kind == "fp8-dynamic")


def test_activations_that_the_files_quantize_are_said_to_be_unquantized(quantized, caplog):
    with caplog.at_level(logging.WARNING, "lorafold"):
        lf.load_model(quantized("fp8"))
        assert caplog.messages == []
        lf.load_model(quantized("fp8-dynamic"))
    assert len(caplog.messages) == 1
    assert "also quantizes activations, which lorafold leaves" in caplog.messages[0]


def replaced(name, change):
    return lambda t: t.update({f"{SITE}.{name}": change(t[f"{SITE}.{name}"]).contiguous()})


def drop(name):
    return lambda tensors: tensors.pop(f"{SITE}.{name}")


def at_start(value):
    def change(scale):
        scale.view(-1)[0] = value
        return scale

    return replaced("weight_scale", change)


# the format, the change, and the refusal
MISTAKES = {
    "no scale": (
        "fp8", drop("weight_scale"),
        "weight_scale: missing in the weight files, expected F32 or F16 or BF16 [1]",
    ),
    "no codes": ("int4", drop("weight_packed"), "weight_packed: missing in the weight files"),
    "no zero points": (
        "int4-asymmetric", drop("weight_zero_point"),
        "weight_zero_point: missing in the weight files",
    ),
    "scale's shape": (
        "int4", replaced("weight_scale", lambda t: t[:, :1]),
        "weight_scale: found BF16 [64, 1], expected F32 or F16 or BF16 [64, 2]",
    ),
    "codes' shape": (
        "int4", replaced("weight_packed", lambda t: t[:, :4]),
        "weight_packed: found I32 [64, 4], expected I32 [64, 8]",
    ),
    "codes' dtype": (
        "fp8", replaced("weight", lambda t: t.bfloat16()),
        "q_proj.weight: found BF16 [64, 64], expected F8_E4M3 [64, 64]",
    ),
    "recorded shape": (
        "int4", replaced("weight_shape", lambda t: t - 4),
        "weight_shape: found [60, 60], expected [64, 64]",
    ),
    "nan": ("fp8", at_start(torch.nan), "weight_scale: found nan (1 such scales)"),
    "a code that is nan": (
        "fp8", replaced("weight", lambda t: torch.full_like(t, torch.nan)),
        "q_proj.weight: found 4096 NaN values",
    ),
    "infinite": ("int4", at_start(torch.inf), "weight_scale: found inf (1 such scales)"),
    "zero": ("int8", at_start(0.0), "weight_scale: found 0 (1 such scales), expected finite"),
    "order of columns": (
        "int4", lambda t: t.update({f"{SITE}.weight_g_idx": torch.arange(64)}),
        "weight_g_idx: found in the files, but not expected by quantization_config",
    ),
    "a plain one among them": (
        "fp8", lambda t: t.update({"model.norm.weight_scale": torch.ones(1)}),
        "model.norm.weight_scale: found in the files",
    ),
}  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_files_that_do_not_fit_are_refused_by_the_tensor_s_name(quantized, tmp_path, mistake):
    kind, change, said = MISTAKES[mistake]
    moved(loaded(quantized(kind), kind)).save(tmp_path / "a")
    refused_everywhere(quantized(kind), change, said, tmp_path)


def with_settings(source, path, change):
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gptq", "quantized with gptq (package gptqmodel"),
        ("awq", "quantized with awq (package gptqmodel"),
        ("hqq", "unsupported quantization hqq; supported: compressed-tensors (int8, fp8, int4)"),
        ("quanto", "unsupported quantization quanto"),
    ],
)
def test_other_quantizations_are_refused_in_one_line(base, tmp_path, method, said):
    settings = {"quant_method": method, "bits": 4, "group_size": 32}
    path = with_settings(base, tmp_path / "q", lambda c: c.update(quantization_config=settings))
    for storage in ("auto", "nf4", "bf16"):
        told = refusal(lf.load_model, path, storage)
        assert said in told
        assert told.endswith("use the unquantized model instead")
    with pytest.raises(LorafoldError, match="quantized"):
        lf.estimate(str(path), "lora")


def first(settings):
    return settings["config_groups"]["group_0"]


FP8_VALUES = {
    "targets": ["re:.*v_proj"], "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("fp8", lambda s: first(s)["weights"].update(num_bits=4),
         "found weights in the format naive-quantized (4-bit float"),
        ("fp8", lambda s: s.update(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
         "transform_config: found"),
        ("int4", lambda s: s.update(quantization_status="frozen"),
         "quantization_status: found frozen, which lorafold does not support"),
        ("int4", lambda s: s["config_groups"].update(other=FP8_VALUES),
         "stored in 2 quantizations (fp8, int4)"),
        ("fp8", lambda s: s.update(ignore=[]), "includes lm_head, the head; expected only linear"),
        ("fp8", lambda s: first(s).update(targets=["Embedding"]),
         "includes model.embed_tokens, of class Embedding"),
        ("fp8", lambda s: first(s).update(targets=["re:nothing"]), "matches no linear layer of"),
        ("fp8", lambda s: s.update(config_groups=3), "quantization_config: "),
    ],
)  # fmt: skip
def test_configs_that_are_not_read_are_refused(quantized, tmp_path, kind, change, said):
    path = with_settings(
        quantized(kind), tmp_path / "q", lambda c: change(c["quantization_config"])
    )
    assert said in refusal(lf.load_model, path)


def test_without_the_package_one_line_names_it(quantized, monkeypatch):
    path = quantized("int4")
    for name in [n for n in sys.modules if n.startswith("compressed_tensors")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LorafoldError, match=r"not installed; install lorafold\[quantized\]"):
        lf.load_model(path)


def test_a_storage_that_the_files_do_not_have_is_refused(base, quantized, tmp_path):
    with pytest.raises(LorafoldError, match="files are not quantized; lorafold"):
        lf.load_model(base, "fp8")
    for asked in ("nf4", "int4"):
        with pytest.raises(LorafoldError, match=r"stored as fp8, .* load them as fp8"):
            lf.load_model(quantized("fp8"), asked)
    with pytest.raises(LorafoldError, match="stored as fp8; load them as fp8"):
        lf.load_model(quantized("fp8"), "bf16")
    recipe = lf.Recipe(method="full", storage="fp8", steps=1)
    rows = rows_at(tmp_path)
    with pytest.raises(LorafoldError, match="full trains the base's own weights"):
        lf.train(recipe, model=str(quantized("fp8")), data=str(rows), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *itertools.product(["lora"], ["fp8", "fp8-block", "int4", "int4-asymmetric", "int8"]),
        *itertools.product(["inference"], ["fp8", "int4", "int8"]),
    ],
)
def test_an_estimate_is_of_the_files_as_they_are_stored(quantized, kind, mode):
    path = str(quantized(kind))
    found = lf.estimate(path, mode, batch=2, max_length=64, measure=True, device="cpu")
    assert found.setting.base.quantization == KINDS[kind][3]
    assert found.total == pytest.approx(found.measured, rel=0.05)


def test_an_estimate_that_does_not_fit_the_files_is_refused(base, quantized):
    path = str(quantized("fp8"))
    with pytest.raises(LorafoldError, match="fp8, but a trained base can't be"):
        lf.estimate(path, "full")
    with pytest.raises(LorafoldError, match="stored as fp8, but the estimate is for nf4"):
        lf.estimate(path, "lora", recipe=lf.Recipe(storage="nf4"))
    with pytest.raises(LorafoldError, match="not quantized, but the estimate is for int4"):
        lf.estimate(str(base), "lora", recipe=lf.Recipe(storage="int4"))


def test_every_fp8_code_has_torch_s_value():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.float()
    assert torch.equal(is_nan(codes), expected.isnan())
    assert torch.equal(to_fp32(codes)[~expected.isnan()], expected[~expected.isnan()])
    assert to_fp32(codes)[128].signbit()


@pytest.mark.parametrize(
    "codes",
    [QuantizationFormat("float", 24, 20), QuantizationFormat("int", 24, 20, symmetric=False)],
    ids=["fp8", "int8-asymmetric"],
)
def test_blocks_may_be_cut_short_at_both_edges(codes):
    module = CompressedLinear(nn.Linear(50, 70), codes, torch.float32)
    numbers = torch.randint(-9, 9, (70, 50))
    scale, zero = torch.rand(3, 3) + 0.1, torch.randint(-3, 3, (3, 3))
    module.weight.data = numbers.to(module.weight.dtype)
    module.weight_scale.data = scale
    if not codes.symmetric:
        module.weight_zero_point.data = zero.to(torch.int8)
    else:
        zero = torch.zeros(3, 3)
    w = layer_of(module).dense()[0]
    for i, j in itertools.product(range(70), range(50)):
        at = i // 24, j // 20
        assert w[i, j] == (numbers[i, j] - zero[at]) * scale[at]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_mxfp4_is_what_transformers_unpacks(dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 16, 4, 16), dtype=torch.uint8, generator=generator)
    blocks[0].view(-1)[:256] = torch.arange(256)  # every pair of codes
    scales = torch.randint(0, 252, (3, 16, 4), dtype=torch.uint8, generator=generator)
    scales[0, 0] = torch.tensor([0, 127, 251, 1])
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert expected.isfinite().all()
    assert torch.equal(mxfp4(blocks, scales, dtype), expected)
    assert torch.equal(mxfp4(blocks, scales, dtype), mxfp4(blocks, scales, torch.float64).to(dtype))
    scales[1, 2, 3] = 255
    nans = mxfp4(blocks, scales, dtype).isnan()
    assert nans[1, 2, 96:].all()
    assert nans.sum() == 32
