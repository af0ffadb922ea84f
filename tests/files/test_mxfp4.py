"""gpt-oss in MXFP4: kept, trained over and merged; transformers' dequantization is the oracle."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Mxfp4Config

import lorafold as lf
from adapter_files import assert_same_tensors, json_of, tensors_of
from conftest import lorafold
from error_cases import refusal
from lorafold.api.merge import merge
from lorafold.core.expert_matrices import module_at
from lorafold.errors import LorafoldError
from lorafold.layers import layer_of, parameter_count
from lorafold.layers.expert_storage import MXFP4
from lorafold.layers.experts import Routed
from lorafold.memory.trace import Ledger
from lorafold.models.fingerprint import differences, of_model
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.models.weights import InMemory
from mxfp4_cases import SETTINGS, SITES, change_config, make_gpt_oss, make_mxfp4
from quantized_cases import (
    IDS,
    METHODS,
    adapted_alike,
    commands,
    moved,
    refused_everywhere,
    relative,
)

OWNER = "model.layers.0.mlp.experts"
FP32 = Storage(torch.float32, "mxfp4")
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Directory of a tiny gpt-oss in bf16. Read only."""
    return make_gpt_oss(tmp_path_factory.mktemp("plain") / "gpt-oss")


@pytest.fixture(scope="module")
def released(plain, tmp_path_factory):
    """Directory of the same with its experts in MXFP4, as gpt-oss is released. Read only."""
    return make_mxfp4(plain, tmp_path_factory.mktemp("released") / "gpt-oss")


def by_transformers(path, dtype=torch.float32):
    """The model as transformers dequantizes it while loading."""
    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config)


def experts(model):
    return [module for _, module in model.named_modules() if isinstance(module, Routed)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_what_transformers_dequantizes(released, dtype):
    ours, theirs = load_model(released, Storage(dtype, "mxfp4")), by_transformers(released, dtype)
    for site in SITES:
        layer, expected = layer_of(module_at(ours, site)), theirs.get_parameter(site).mT
        assert isinstance(layer.storage, MXFP4)
        assert layer.dense()[0].dtype == dtype
        assert torch.equal(layer.dense()[0], expected)
        assert torch.equal(layer.storage.matrix(2).to(dtype), expected[2])
        assert layer.dense_like()[0].shape == expected.shape
    for name, parameter in theirs.named_parameters():
        if name not in SITES:
            assert torch.equal(ours.get_parameter(name), parameter)
            assert ours.get_parameter(name).dtype == parameter.dtype
    tolerance = 1e-6 if dtype is torch.float32 else 4 * EPS
    assert relative(ours(IDS).logits, theirs(IDS).logits) < tolerance


def test_blocks_and_scales_are_in_memory_as_in_the_files(released):
    stored = load_file(released / "model.safetensors")
    for model in (load_model(released, FP32), lf.load_model(released)):
        assert len(experts(model)) == 2
        codes = {n: p for n, p in model.named_parameters() if n.endswith(("_blocks", "_scales"))}
        assert len(codes) == 2 * len(SITES)
        assert all(torch.equal(p, stored[n]) for n, p in codes.items())
        assert all(not p.requires_grad for p in codes.values())
        assert model.state_dict().keys() == stored.keys()
        matrices = [layer_of(module_at(model, site)) for site in SITES]
        weights = sum(4 * out * inn for out, inn in (m.shape for m in matrices))
        assert sum(p.nbytes for p in codes.values()) * 8 == 4.25 * weights
    plain = AutoModelForCausalLM.from_config(model.config)
    assert parameter_count(model) == sum(p.numel() for p in plain.parameters())


class WithValues(Ledger):
    """Counts tensors that are not on the meta device."""

    def _enter(self, t):
        if not t.is_meta:
            super()._enter(t)


def test_no_dequantized_parameter_is_made_while_loading(released):
    """The tensors that are read from files are not counted, those computed from them are."""
    peaks = []
    for load in (lambda: load_model(released, FP32), lambda: by_transformers(released)):
        with WithValues() as ledger:
            load()
        peaks.append(ledger.peak)
    one_matrix = 64 * 96 * 4  # of down_proj, in fp32
    assert peaks[0] < one_matrix
    assert peaks[1] > 4 * one_matrix


def test_one_expert_is_dequantized_at_a_time(released, monkeypatch):
    from lorafold.layers import expert_storage

    asked = []

    def seen(blocks, *others, own=expert_storage.dequantize):
        asked.append(blocks.dim())
        return own(blocks, *others)

    monkeypatch.setattr(expert_storage, "dequantize", seen)
    load_model(released, FP32)(IDS)
    assert set(asked) == {3}  # (out, in / 32, 16)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_moves_keep_the_codes(released, copied):
    model = load_model(released, FP32)
    y = model(IDS).logits
    moved(model)
    changed = model(IDS).logits
    twin = copied(model).to(torch.float32)
    assert torch.equal(twin(IDS).logits, changed)
    with lf.only(twin):
        assert torch.equal(twin(IDS).logits, y)
    half = twin.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16, torch.uint8}


OTHERS = [lf.PiSSA(rank=2), lf.OLoRA(rank=2), lf.VeRA(rank=8), lf.LoHa(rank=2), lf.IA3()]


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: type(spec).__name__)
def test_folding_then_calling_equals_calling(released, spec):
    model = load_model(released, FP32)
    bare = model(IDS).logits
    torch.manual_seed(1)
    adapter = lf.attach(model, spec)
    for p in adapter.parameters():
        p.data += 0.05 * torch.randn_like(p)
    y = model(IDS).logits
    assert relative(y, bare) > 1e-3
    adapter.merge()
    assert experts(model) == [] or isinstance(spec, lf.IA3)
    assert relative(model(IDS).logits, y) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_over_codes_is_one_over_the_dequantized_weights(released, method):
    over, plain = load_model(released, FP32), by_transformers(released)
    adapter = adapted_alike(over, plain, method)
    assert set(SITES) < set(adapter.matches.paths)
    adapter.merge()
    assert relative(over(IDS).logits, plain(IDS).logits) < 1e-5
    assert experts(over) == []
    assert {p.dtype for p in over.parameters()} == {torch.float32}
    assert not hasattr(over.config, "quantization_config")
    assert over.state_dict().keys() == by_transformers(released).state_dict().keys()


def test_merging_some_experts_leaves_the_others_in_codes(released, tmp_path):
    model = load_model(released, Storage(torch.bfloat16, "mxfp4"))
    adapter = moved(model, targets=[f"{OWNER}.gate_up_proj", f"{OWNER}.down_proj"])
    adapter.merge()
    assert len(experts(model)) == 1
    assert OWNER in model.config.quantization_config["modules_to_not_convert"]
    model.save_pretrained(tmp_path / "half")
    again = load_model(tmp_path / "half", Storage(torch.bfloat16, "mxfp4"))
    assert len(experts(again)) == 1
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_model_saves_as_it_was_loaded(released, tmp_path):
    load_model(released, Storage(torch.bfloat16, "mxfp4")).save_pretrained(tmp_path / "same")
    assert_same_tensors(released, tmp_path / "same")
    assert json_of(tmp_path / "same", "config.json")["quantization_config"] == SETTINGS


def shards(path, limit):
    """Divide a directory's file of weights into several, the scales apart from their blocks."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda n: (n.endswith("_scales"), n))
    where = {}
    for i in range(0, len(names), limit):
        file = f"model-{i // limit:05}.safetensors"
        save_file({n: tensors[n] for n in names[i : i + limit]}, path / file, {"format": "pt"})
        where |= dict.fromkeys(names[i : i + limit], file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.few(1)
@pytest.mark.parametrize("sharded", [False, True])
def test_merging_gives_a_plain_model_and_says_how_near(released, plain, tmp_path, sharded):
    path = tmp_path / "released"
    shutil.copytree(released, path)
    if sharded:
        shards(path, 7)
    model = load_model(path, FP32)
    moved(model, targets=["q_proj", f"{OWNER}.gate_up_proj"]).save(
        tmp_path / "a", record={"recipe": {"storage": "mxfp4"}}
    )
    done = merge(path, [tmp_path / "a"], tmp_path / "out")
    assert (done.into.target, done.into.trained_on) == ("trained", "mxfp4")
    assert done.gap.kl < 1e-4
    assert done.folded.stats.survival == pytest.approx(1, abs=0.01)
    assert "quantization_config" not in json_of(tmp_path / "out", "config.json")
    written, source = tensors_of(tmp_path / "out"), tensors_of(plain)
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in source.items()}
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    # a weight that no adapter changes is the dequantized one
    expected = by_transformers(path, torch.bfloat16).state_dict()
    for name in (f"{OWNER}.down_proj", "model.layers.1.mlp.experts.gate_up_proj"):
        assert torch.equal(written[name], expected[name])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(merged(IDS).logits, model(IDS).logits) < 4 * EPS


def test_targets_that_the_files_do_not_have_are_refused(released, tmp_path):
    moved(load_model(released, FP32)).save(tmp_path / "a", record={"recipe": {"storage": "mxfp4"}})
    for asked, said in [
        ({"into": "original"}, "into original: the model's files have mxfp4 weights, and no orig"),
        ({"into": "nf4"}, "into nf4: the model's files have mxfp4 weights, and no original"),
        ({"into": "int8"}, "into int8: .* merge into trained, or pass the unquantized model"),
        ({"storage": "nf4"}, "storage nf4: the model's files are stored as mxfp4; expected mxfp4"),
    ]:
        with pytest.raises(LorafoldError, match=said):
            merge(released, [tmp_path / "a"], tmp_path / "out", **asked)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_peft_reads_the_adapter_on_the_dequantized_model(released, tmp_path):
    peft = pytest.importorskip("peft")
    model = load_model(released, FP32)
    moved(model).save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(by_transformers(released), tmp_path / "a")
    assert relative(theirs(IDS).logits, model(IDS).logits) < 1e-5


def test_the_dequantized_model_counts_as_the_same_base(released, tmp_path):
    over, plain = load_model(released, FP32), by_transformers(released)
    found = of_model(over)
    assert not any(name.endswith(("_blocks", "_scales")) for name in found)
    assert any(name.startswith(OWNER) for name in found)  # a bias
    assert differences(found, InMemory.of_model(plain)) == []
    assert differences(of_model(plain), InMemory.of_model(over)) == []
    moved(plain).save(tmp_path / "a")
    lf.load(over, tmp_path / "a")
    assert relative(over(IDS).logits, plain(IDS).logits) < 1e-5
    nn.init.normal_(over.model.embed_tokens.weight)
    assert differences(found, InMemory.of_model(over)) != []


@pytest.mark.slow
def test_the_command_trains_evaluates_inspects_and_merges(released, tmp_path):
    commands(released, "mxfp4", tmp_path)
    done = lorafold("inspect", "--model", str(released), str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    assert "Of 16 matrices of experts" in done.stdout


def at(name, change):
    return lambda t: t.update({f"{OWNER}.{name}": change(t[f"{OWNER}.{name}"]).contiguous()})


def with_nan(scales):
    scales[1, 2, 0] = 255
    return scales


MISTAKES = {
    "no scales": (
        lambda t: t.pop(f"{OWNER}.gate_up_proj_scales"),
        "gate_up_proj_scales: missing in the weight files, expected U8 [4, 192, 2]",
    ),
    "no blocks": (
        lambda t: t.pop(f"{OWNER}.down_proj_blocks"),
        "down_proj_blocks: missing in the weight files, expected U8 [4, 64, 3, 16]",
    ),
    "blocks' shape": (
        at("down_proj_blocks", lambda t: t[:, :, :2]),
        "down_proj_blocks: found U8 [4, 64, 2, 16], expected U8 [4, 64, 3, 16]",
    ),
    "scales' shape": (
        at("down_proj_scales", lambda t: t[:3]),
        "down_proj_scales: found U8 [3, 64, 3], expected U8 [4, 64, 3]",
    ),
    "scales' dtype": (
        at("down_proj_scales", lambda t: t.bfloat16()),
        "down_proj_scales: found BF16 [4, 64, 3], expected U8 [4, 64, 3]",
    ),
    "not a number": (
        at("down_proj_scales", with_nan),
        "down_proj_scales: found 255, which encodes NaN (1 such scales)",
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_files_that_do_not_fit_are_refused_by_the_tensor_s_name(released, tmp_path, mistake):
    change, said = MISTAKES[mistake]
    moved(load_model(released, FP32)).save(tmp_path / "a")
    refused_everywhere(released, change, f"{OWNER}.{said}", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["quantization_config"].update(modules_to_not_convert=["mlp.experts"]),
         "quantization_config matches no experts of the model"),
        (lambda c: c["quantization_config"].update(modules_to_not_convert=[OWNER]),
         f"{OWNER}.down_proj_blocks: found in the files, but not expected by quantization_config"),
        (lambda c: c.update(intermediate_size=80),
         f"{OWNER}.down_proj: found rows of 80 weights, expected a multiple of 32"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(released, tmp_path, change, said):
    shutil.copytree(released, tmp_path / "q")
    change_config(tmp_path / "q", change)
    assert said in refusal(lf.load_model, tmp_path / "q")


def test_a_storage_that_the_files_do_not_have_is_refused(released, plain):
    with pytest.raises(LorafoldError, match=r"files are not quantized; .* not to mxfp4"):
        lf.load_model(plain, "mxfp4")
    for asked in ("nf4", "int8", "fp8"):
        with pytest.raises(LorafoldError, match=r"stored as mxfp4, .* load them as mxfp4"):
            lf.load_model(released, asked)
    with pytest.raises(LorafoldError, match="stored as mxfp4; load them as mxfp4"):
        lf.load_model(released, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "inference"])
def test_an_estimate_is_of_the_files_as_they_are_stored(released, mode):
    found = lf.estimate(str(released), mode, batch=2, max_length=64, measure=True, device="cpu")
    assert found.setting.base.quantization == "mxfp4"
    assert found.total == pytest.approx(found.measured, rel=0.05)


def test_an_estimate_that_does_not_fit_the_files_is_refused(released, plain):
    with pytest.raises(LorafoldError, match="mxfp4, but a trained base can't be"):
        lf.estimate(str(released), "full")
    with pytest.raises(LorafoldError, match="not quantized, but the estimate is for mxfp4"):
        lf.estimate(str(plain), "lora", recipe=lf.Recipe(storage="mxfp4"))
