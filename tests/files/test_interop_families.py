"""PEFT's files for other families: text parts, grouped linears, buffers, experts, refusals."""

from __future__ import annotations

import json
import logging
import warnings
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft.tuners import tuners_utils
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import lorafold as lf
from adapter_files import assert_same_tensors, change, configure, json_of, tensors_of
from architectures import near, run
from conftest import make_tokenizer
from lorafold.core.active_adapters import RandomSource, seeded_dropout, token_names
from lorafold.core.attach import selection_of
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.models.loading import load_model
from lorafold.models.prequantized import make_quantized
from lorafold.peft.form import UNSUPPORTED_TARGETS, UNSUPPORTING_TYPES
from mixtures import FORMS, mixture
from more_architectures import FAMILIES
from peft_cases import CLOSE, gap, load_theirs, logits, made_by_peft, move, moved, save_theirs

WHOLE = ("qwen3.5", "qwen3.5-moe", "mllama")  # mllama's tower has q_proj and others of the text's


def written(name: str, path: Path) -> Path:
    FAMILIES[name].model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.few(2)
@pytest.mark.parametrize("name", WHOLE)
def test_peft_reads_the_adapter_on_the_class_of_the_configuration(name: str, tmp_path) -> None:
    """PEFT found no key of it there, and computed the bare model."""
    cls, base = FAMILIES[name].cls, written(name, tmp_path / "base")
    model = load_model(base, torch.float32)
    assert type(model) is not cls
    spec = lf.LoRA(rank=2, dropout=0.0)
    moved(model, spec, modules_to_save=["lm_head"]).save(tmp_path / "adapter")
    theirs = load_theirs(cls.from_pretrained(base), tmp_path / "adapter")
    assert gap(logits(theirs), logits(model)) < 1e-5
    for again in (load_model(base, torch.float32), cls.from_pretrained(base)):
        lf.load(again, tmp_path / "adapter")
        assert gap(logits(again), logits(model)) < 1e-6
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoModelForMultimodalLM.from_pretrained" in card


def test_adapters_of_earlier_versions_and_of_peft_are_read(tmp_path: Path) -> None:
    """Earlier ones have the module paths of the part; PEFT has regular expressions too."""
    base, old = written("mllama", tmp_path / "base"), tmp_path / "adapter"
    model = load_model(base, torch.float32)
    moved(model, lf.LoRA(rank=2, dropout=0.0), ["q_proj"]).save(old)
    whole = "model.language_model."
    state, targets = tensors_of(old), json_of(old)["target_modules"]
    assert all(whole in key for key in state)
    assert all(target.startswith(whole) for target in targets)

    def read() -> Any:
        again = load_model(base, torch.float32)
        lf.load(again, old)
        return again

    configure(old, target_modules=r"model\.language_model\.layers\.\d+\.\w+_attn\.q_proj")
    assert torch.equal(logits(read()), logits(model))
    for key in state:
        change(old, lambda t, key=key: t.update({key.replace(whole, "model."): t.pop(key)}))
    configure(old, target_modules=[target.replace(whole, "model.") for target in targets])
    assert torch.equal(logits(read()), logits(model))


@pytest.mark.slow
def test_it_is_trained_and_merged(tmp_path: Path) -> None:
    base = written("qwen3.5", tmp_path / "base")
    rows = [{"prompt": "a", "completion": " fox"}]
    recipe = lf.Recipe(steps=1, batch=1, storage="fp32", lr=0.1)
    lf.train(recipe, model=base, data=rows, out=tmp_path / "adapter")
    more = recipe.model_copy(update={"steps": 2})
    lf.train(more, model=base, data=rows, out=tmp_path / "over", over=tmp_path / "adapter")
    model = load_model(base, torch.float32)
    lf.load(model, tmp_path / "adapter")
    lf.merge(base, tmp_path / "adapter", tmp_path / "merged", storage="fp32")
    merged = load_model(tmp_path / "merged", torch.float32)
    assert gap(logits(merged), logits(model)) < 1e-5


ROW = FAMILIES["deepseek-v4"]
TARGETS = ["o_a_proj", "o_b_proj"]


def adapted(spec: Spec) -> tuple[nn.Module, lf.Adapter]:
    model = ROW.model()
    return model, moved(model, spec, TARGETS)


def test_peft_computes_the_same_from_the_parameter(tmp_path: Path, caplog) -> None:
    model, adapter = adapted(lf.LoRA(rank=4, dropout=0.1))
    with caplog.at_level(logging.INFO, "lorafold"):
        adapter.save(tmp_path / "a")
    assert "grouped linear layers, so the config has lora_dropout 0" in caplog.text
    assert json_of(tmp_path / "a")["target_parameters"] == ["o_a_proj.weight"]
    expected = logits(model)
    assert gap(logits(load_theirs(ROW.model(), tmp_path / "a")), expected) < CLOSE
    again = ROW.model()
    loaded = lf.load(again, tmp_path / "a")
    assert loaded.spec == adapter.spec
    assert torch.equal(logits(again), expected)
    loaded.merge()
    assert gap(logits(again), expected) < CLOSE


def test_methods_that_peft_has_for_modules_alone_are_told(tmp_path: Path, caplog) -> None:
    model, adapter = adapted(lf.LoHa(rank=2))
    adapter.save(tmp_path / "a")
    assert "only LoRA on experts and grouped linear layers" in caplog.text
    with pytest.raises(KeyError, match="LORAFOLD"):
        load_theirs(ROW.model(), tmp_path / "a")
    again = ROW.model()
    lf.load(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_what_takes_single_vectors_is_refused() -> None:
    with pytest.raises(lf.LorafoldError, match=r"o_a_proj: .*IA3.*groups of vectors"):
        lf.attach(ROW.model(), lf.IA3(feedforward=["o_a_proj"]), ["o_a_proj"])


def test_files_that_quantize_it_are_refused() -> None:
    config = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    with pytest.raises(lf.LorafoldError, match="o_a_proj, of class DeepseekV4GroupedLinear"):
        make_quantized(ROW.model(), config, "model x")


def test_dropout_follows_from_the_token() -> None:
    torch.manual_seed(0)
    root = nn.Sequential(DeepseekV4GroupedLinear(16, 8, n_groups=2)).train()
    move(lf.attach(root, lf.LoRA(rank=2, dropout=0.5), ["0"]).parameters())
    x = torch.randn(2, 3, 2, 16)
    names = token_names(torch.arange(2)[:, None], torch.arange(3))

    def outputs(rows: list[int], key: int = 5) -> torch.Tensor:
        with seeded_dropout(selection_of(root), RandomSource(key, names[rows])):
            return root(x[rows]).detach()

    both = outputs([0, 1])
    torch.testing.assert_close(both, torch.cat([outputs([0]), outputs([1])]))
    assert not torch.allclose(both, outputs([0, 1], 6))


# the module, and its buffer in the file: floats beside a linear, floats of its own, integers
ROUTERS = {
    "longcat": ("router", "model.layers.0.mlp.router.e_score_correction_bias"),
    "deepseek-v3": ("gate", "model.layers.1.mlp.gate.e_score_correction_bias"),
    "deepseek-v4": ("gate", "model.layers.0.mlp.gate.tid2eid"),
}


@pytest.fixture(params=ROUTERS)
def given(request, tmp_path) -> tuple[Any, Path, str, str]:
    """The row of a family, the directory of its model, a router's name and that of its buffer."""
    row = FAMILIES[request.param]
    row.model().save_pretrained(tmp_path / "base")
    return row, tmp_path / "base", *ROUTERS[request.param]


@torch.no_grad()
def outputs(model: Any, row: Any) -> torch.Tensor:
    return run(model, row.inputs())


def merged(row: Any, base: Path, adapter: Path) -> Any:
    out = adapter.with_name("merged")
    lf.merge(base, adapter, out, storage="fp32", certificate=False)
    return row.cls.from_pretrained(out).eval()


def test_peft_reads_a_router_of_ours_and_merged_files_have_it(given, tmp_path):
    row, base, name, buffer = given
    model = lf.load_model(base, storage="fp32")
    adapter = moved(model, lf.LoRA(rank=4), ["q_b_proj"], modules_to_save=[name])
    expected = outputs(model, row)
    adapter.save(tmp_path / "ours")
    assert f"base_model.model.{buffer}" in tensors_of(tmp_path / "ours")
    again = lf.load_model(base, storage="fp32")
    lf.load(again, tmp_path / "ours")
    assert torch.equal(outputs(again, row), expected)
    theirs = load_theirs(row.cls.from_pretrained(base), tmp_path / "ours").eval()
    assert near(outputs(theirs, row), expected)
    assert near(outputs(merged(row, base, tmp_path / "ours"), row), expected)


def test_a_router_of_pefts_is_read_unless_its_buffer_is_another_bases(given, tmp_path):
    row, base, name, buffer = given
    config = peft.LoraConfig(
        r=4, target_modules=["q_b_proj"], modules_to_save=[name], init_lora_weights=False
    )
    theirs = made_by_peft(row.cls.from_pretrained(base), config).eval()
    expected = outputs(theirs, row)
    save_theirs(theirs, tmp_path / "theirs")
    model = lf.load_model(base, storage="fp32")
    lf.load(model, tmp_path / "theirs")
    assert near(outputs(model, row), expected)
    assert near(outputs(merged(row, base, tmp_path / "theirs"), row), expected)

    key = f"base_model.model.{buffer}"
    change(tmp_path / "theirs", lambda t: t.update({key: t[key] + 1}))
    with pytest.raises(LorafoldError, match=rf"{key}: a b.* that differs from this base's"):
        lf.load(lf.load_model(base, storage="fp32"), tmp_path / "theirs")


ROWS = [{"prompt": f"Copy {i}", "completion": f"{i} is {i}"} for i in range(8)]
# PEFT's names of the parameters; for those of two dimensions it has no form
PARAMETERS = {
    "llama4": ["experts.gate_up_proj", "experts.down_proj"],
    "longcat": ["experts.gate_up_proj", "experts.down_proj"],
    "jetmoe": ["input_linear.weight", "output_linear.weight"],
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


@pytest.mark.parametrize("spec", [lf.LoRA(rank=3, dropout=0.0), lf.PiSSA(rank=3)], ids=type)
@pytest.mark.parametrize("name", FORMS)
def test_peft_reads_ours(name: str, spec: Spec, tmp_path: Path) -> None:
    base = mixture(name)
    model = deepcopy(base)
    adapter = moved(model, spec)
    expected, bare = logits(model), logits(base)
    assert gap(bare, expected) > CLOSE
    adapter.save(tmp_path / "a")
    again = deepcopy(base)
    lf.load(again, tmp_path / "a")
    assert torch.equal(logits(again), expected)
    if name in PARAMETERS:
        assert gap(logits(load_theirs(base, tmp_path / "a")), expected) < CLOSE
    else:
        assert json_of(tmp_path / "a")["peft_type"] == "LORAFOLD_EXPERTS_LORA"
        with pytest.raises(KeyError, match="LORAFOLD_EXPERTS_LORA"):
            peft.PeftModel.from_pretrained(base, tmp_path / "a")


@pytest.mark.parametrize("name", PARAMETERS)
def test_ours_reads_peft(name: str, tmp_path: Path) -> None:
    base = mixture(name)
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=PARAMETERS[name])
    theirs = made_by_peft(deepcopy(base), config)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    lf.load(base, tmp_path / "theirs").save(tmp_path / "ours")
    assert gap(logits(base), expected) < CLOSE
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_what_peft_takes_for_one_matrix_is_refused(tmp_path: Path) -> None:
    base = mixture("dbrx")
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["mlp.w1"])
    peft.get_peft_model(deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    expected = "target_parameters: found .*0.ffn.experts.mlp.w1, .*, expected 3-dimensional"
    with pytest.raises(lf.LorafoldError, match=expected):
        lf.load(base, tmp_path / "theirs")


@pytest.mark.few(3)
@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", FORMS)
def test_trained_then_merged_is_adapted(name: str, storage: str, tmp_path: Path) -> None:
    model, tokenizer, base = mixture(name), make_tokenizer(), tmp_path / "base"
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = lf.Recipe(epochs=2, batch=4, storage=storage, rank=2, lr=1e-2)
    lf.train(recipe, data=ROWS, out=tmp_path / "a", model=str(base))
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"text": "Row 1 of a few"}) + "\n")
    result = lf.merge(base, tmp_path / "a", out=tmp_path / "merged", probe=probe)
    assert result.gap is not None
    assert result.gap.kl < (1e-8 if storage == "fp32" else 1e-2)  # bitsandbytes rounds products
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert gap(logits(merged), logits(model)) > CLOSE
    if storage == "fp32":
        lf.load(model, tmp_path / "a")
        assert gap(logits(merged), logits(model)) < CLOSE


@pytest.mark.parametrize("name", ["falcon-h1", "nemotron-h"])
def test_an_adapter_that_peft_refuses_says_so(name: str, tmp_path: Path, caplog) -> None:
    cls = FAMILIES[name].cls
    FAMILIES[name].model().save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    adapter = moved(model, lf.LoRA(rank=2, dropout=0.0))
    with caplog.at_level(logging.WARNING):
        adapter.save(tmp_path / "all")
    [told] = caplog.messages
    assert "does not support the targets out_proj in models of this type" in told
    card = (tmp_path / "all" / "README.md").read_text()
    assert "PEFT does not support this type of adapter" in card
    with pytest.raises(ValueError, match="out_proj"):
        peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "all")
    again = cls.from_pretrained(tmp_path / "base")
    lf.load(again, tmp_path / "all")
    assert torch.equal(logits(again), logits(model))
    others = sorted({path.rpartition(".")[2] for path in adapter.deltas} - {"out_proj"})
    adapter.detach()
    other = moved(model, lf.LoRA(rank=2, dropout=0.0), others)
    caplog.clear()
    other.save(tmp_path / "others")
    assert caplog.messages == []
    theirs = load_theirs(cls.from_pretrained(tmp_path / "base"), tmp_path / "others")
    assert gap(logits(theirs), logits(model)) < 1e-5


def test_the_types_are_those_of_peft() -> None:
    for kind in (*UNSUPPORTING_TYPES, "llama", "jamba", "bamba"):
        model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        for target in (*UNSUPPORTED_TARGETS, "in_proj"):
            try:
                tuners_utils._check_lora_target_modules_mamba(
                    SimpleNamespace(peft_type="LORA"), model, target
                )
            except ValueError:
                assert (kind in UNSUPPORTING_TYPES, target in UNSUPPORTED_TARGETS) == (True, True)
            else:
                assert kind not in UNSUPPORTING_TYPES or target not in UNSUPPORTED_TARGETS


@pytest.mark.parametrize(
    ("name", "past", "other"),
    [("jamba", ["dt_proj"], "in_proj"), ("rwkv", ["output", "value"], "receptance")],
)
def test_where_peft_leaves_its_update_out_is_told(name, past, other, tmp_path, caplog) -> None:
    row = FAMILIES[name]
    model = row.model().eval()
    adapter = moved(model, lf.LoRA(rank=2, dropout=0.0), [*past, other])
    adapter.save(tmp_path / "a")
    [told] = caplog.messages
    assert f"the weights of {', '.join(past)} directly" in told
    expected = logits(model)
    theirs = load_theirs(row.model().eval(), tmp_path / "a")
    assert gap(logits(theirs), expected) > 1e-3
    merged = load_theirs(row.model().eval(), tmp_path / "a").merge_and_unload()
    assert gap(logits(merged), expected) < 1e-4
    adapter.detach()
    caplog.clear()
    lf.attach(model, lf.LoRA(rank=2), [other]).save(tmp_path / "other")
    assert caplog.messages == []
