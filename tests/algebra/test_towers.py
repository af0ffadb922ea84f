"""Models with encoders for images and sounds, and every architecture under the laws."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import ViTForImageClassification

import lorafold as lf
from architectures import (
    ARCHITECTURES,
    ENCODERS,
    GROUPED,
    IDS,
    MIXTURES,
    MULTIMODAL,
    RECURRENT,
    SEQ2SEQ,
    TEXT,
    TOWER,
    Architecture,
    moved,
    near,
    run,
)
from lorafold.adapter.coverage import encoder_targets_note, unreached
from lorafold.core.anatomy import Anatomy
from lorafold.core.expert_matrices import Matrices
from lorafold.core.targets import PRESETS
from lorafold.layers import is_linear
from lorafold.training_step.packed_attention import isolates
from more_architectures import FAMILIES
from multimodal_cases import write
from typed_commands import done, write_rows

HAVE_EXPERTS = {*MIXTURES, "jamba", "granite-hybrid", "qwen3-next"}


def learned(model: Any, adapter: lf.Adapter, row: Architecture, steps: int) -> list[torch.Tensor]:
    """The losses of steps by the model's own loss."""
    inputs, losses = row.inputs() | row.trains(), []
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    for _ in range(steps):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", list(MULTIMODAL))
def test_the_tower_stays_out_and_byte_for_byte_the_same(name: str) -> None:
    row = MULTIMODAL[name]
    model, labels = row.model(), {"labels": row.inputs()["input_ids"]}
    assert tuple(Anatomy.of(model).encoders) == row.towers
    adapter = lf.attach(model, lf.LoRA(rank=4, dropout=0.0))
    inner = Anatomy.of(model).language
    assert all(site.startswith(f"{inner}.layers.") for site in adapter.sites)
    before = {n: p.clone() for n, p in model.named_parameters() if n.startswith(row.towers)}
    assert before
    losses = learned(model, adapter, replace(row, trains=lambda: labels), 3)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.few(14)
@pytest.mark.parametrize("preset", ["attention", "mlp", "sublayers", "biases", "parameters"])
@pytest.mark.parametrize("name", list(MULTIMODAL))
def test_no_preset_but_the_tower_s_own_takes_it(name: str, preset: str) -> None:
    model = MULTIMODAL[name].model()
    beside = tuple(f"{path}." for path in Anatomy.of(model).encoders_and_connectors)
    paths = PRESETS[preset](model, is_linear)
    assert paths
    assert not [path for path in paths if f"{path}.".startswith(beside)]
    assert PRESETS["head"](model, is_linear) == ["lm_head"]


@pytest.mark.parametrize("name", list(MULTIMODAL))
def test_the_tower_is_adapted_on_request(name: str, tmp_path: Path) -> None:
    row = MULTIMODAL[name]
    model, inputs = row.model(), row.inputs()
    (tower,) = row.towers
    preset = f"{Anatomy.of(model).encoders[tower]}-linear"
    modules = Anatomy.of(model).modules
    linears = {p for p, m in modules if is_linear(m) and p.startswith(f"{tower}.")}
    adapter = moved(model, targets=preset)
    assert set(adapter.sites) <= linears
    assert len(adapter.sites) >= 8
    assert encoder_targets_note(model, adapter.matches) is None
    with torch.no_grad():
        y = run(model, inputs)
        adapter.save(tmp_path / "tower")
        theirs = peft.PeftModel.from_pretrained(row.model(), tmp_path / "tower").eval()
        assert near(run(theirs, inputs), y)
        adapter.merge()
        assert near(run(model, inputs), y)


@pytest.mark.parametrize("preset", ["vision-linear", "audio-linear"])
def test_a_model_without_a_tower_refuses_its_preset(preset: str) -> None:
    with pytest.raises(lf.LorafoldError, match=f"targets '{preset}': .* has no modules of this"):
        lf.attach(ARCHITECTURES["llama"].model(), lf.LoRA(), preset)


def test_a_tower_inside_the_language_model_stays_out_too() -> None:
    """Phi-4-multimodal's configuration is that of its text, with parts for the towers."""
    config = tf.Phi4MultimodalConfig(
        **GROUPED,
        vision_config=TOWER | {"crop_size": 8},
        audio_config={"hidden_size": 32, "intermediate_size": 48, "num_blocks": 2},
    )
    with torch.device("meta"):
        model = tf.Phi4MultimodalForCausalLM(config)
    assert Anatomy.of(model).language == ""
    assert sorted(Anatomy.of(model).encoders.values()) == ["audio", "vision"]
    assert {p.split(".")[1] for p in PRESETS["all-linear"](model, is_linear)} == {"layers"}
    assert PRESETS["vision-linear"](model, is_linear)
    assert PRESETS["audio-linear"](model, is_linear)


def test_a_name_matches_in_the_tower_too_and_one_line_says_so() -> None:
    """PEFT's rule for names, so that the files mean the same."""
    model = MULTIMODAL["gemma3"].model()
    theirs = peft.get_peft_model(
        MULTIMODAL["gemma3"].model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    adapter = lf.attach(model, lf.LoRA(rank=2), ["q_proj", "v_proj"])
    assert set(adapter.sites) == set(theirs.base_model.targeted_module_names)
    assert "  q_proj: 4 modules, 2 of them in an encoder\n" in repr(adapter)
    told = encoder_targets_note(model, adapter.matches)
    assert told is not None
    assert told.startswith(
        "targets in the vision encoder: 2 of the 4 modules of q_proj, 2 of the 4 modules of v_proj;"
    )
    only = told.rpartition(" ")[2]
    adapter.detach()
    again = lf.attach(model, lf.LoRA(rank=2), only)
    assert len(again.sites) == 4
    assert encoder_targets_note(model, again.matches) is None
    again.detach()
    for meant in (r".*vision_tower.*\.q_proj", ["model.vision_tower.encoder.layers.0.mlp.fc1"]):
        adapter = lf.attach(model, lf.LoRA(rank=2), meant)
        assert encoder_targets_note(model, adapter.matches) is None
        adapter.detach()


def test_all_linear_in_peft_s_file_keeps_peft_s_meaning(tmp_path: Path) -> None:
    row = MULTIMODAL["gemma3"]
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(row.model(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) | {"target_modules": "all-linear"}
    file.write_text(json.dumps(told), encoding="utf-8")
    model, inputs = row.model(), row.inputs()
    adapter = lf.load(model, tmp_path / "theirs")
    assert set(adapter.sites) == set(theirs.base_model.targeted_module_names)
    assert any(site.startswith(row.towers) for site in adapter.sites)
    with torch.no_grad():
        assert near(run(model, inputs), run(theirs, inputs))


@pytest.mark.few(16)
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_what_is_reached_and_what_is_not_are_all_of_the_blocks(name: str) -> None:
    model = ARCHITECTURES[name].model()
    beside = tuple(f"{path}." for path in Anatomy.of(model).encoders_and_connectors)
    inside = tuple(f"{b}." for b in Anatomy.of(model).blocks if not f"{b}.".startswith(beside))
    adapter = lf.attach(model, lf.LoRA(rank=2))
    base = [(n, p) for n, p in model.named_parameters() if ".deltas." not in n]
    left = [(n, p.numel()) for n, p in base if not {n, n.rpartition(".")[0]} & set(adapter.sites)]
    found = adapter.unreached
    assert sum(found.blocks.values()) == sum(n for name, n in left if name.startswith(inside))
    assert found.of_blocks == sum(p.numel() for n, p in base if n.startswith(inside))
    assert sum(found.beside.values()) == sum(p.numel() for n, p in base if n.startswith(beside))
    assert "linears" not in found.blocks
    assert ("experts" in unreached(model, ()).blocks) == (name in HAVE_EXPERTS)
    assert ("router" in found.blocks) == (name in HAVE_EXPERTS)
    assert any(f"{kind} tower" in found.beside for kind in ("vision", "audio")) == bool(beside)


def test_the_kinds_and_the_line() -> None:
    model = ARCHITECTURES["gpt-oss"].model()
    adapter = lf.attach(model, lf.LoRA(rank=2), ["q_proj", "o_proj"])
    block = model.model.layers[0]
    expected = {
        "linears": 2 * sum(p.numel() for p in block.self_attn.k_proj.parameters()),
        "experts": sum(p.numel() for p in block.mlp.experts.parameters()),
        "router": sum(p.numel() for p in block.mlp.router.parameters()),
        "norms": 2 * 32,
        "other": block.self_attn.sinks.numel(),
    }
    whole = sum(p.numel() for p in block.parameters() if p.dim() and not p.requires_grad)
    found = adapter.unreached
    assert found.blocks == {kind: 2 * n for kind, n in expected.items()}
    assert list(found.blocks) == list(expected)
    shares = [f"{kind} {n / whole:.1%}" for kind, n in expected.items() if kind != "other"]
    assert str(found) == (
        f"frozen in the transformer blocks: {', '.join(shares)}, other under 0.1% of their"
        f" {2 * whole:,} parameters"
    )
    assert found.as_json()["blocks"]["experts"] == pytest.approx(expected["experts"] / whole)


def test_a_parameter_that_is_a_site_is_reached() -> None:
    """The paths of experts name the parameter, not the module that has it."""
    model = ARCHITECTURES["mixtral"].model()
    sites = {f"model.layers.{n}.mlp.experts.gate_up_proj" for n in range(2)}
    found = unreached(model, sites)
    down = [m.down_proj.numel() for m in (layer.mlp.experts for layer in model.model.layers)]
    assert found.blocks["experts"] == sum(down)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantized_weight_counts_out_times_in(storage: str, tiny_model_dir) -> None:
    models = (lf.load_model(tiny_model_dir("llama-wide"), storage=s) for s in ("fp32", storage))
    plain, quantized = (lf.attach(m, lf.LoRA(rank=2), ["q_proj"]).unreached for m in models)
    assert quantized == plain


def test_the_run_says_what_is_in_a_tower_and_what_stays_frozen(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": f"{n + 1}"} for n in range(4)]
    data, model = write_rows(tmp_path / "rows.jsonl", rows), write("gemma3", tmp_path / "model")
    asked = f"train --model {model} --data {data} --out {tmp_path / 'out'} --storage fp32"
    told = done(f"{asked} --epochs 1 --json --verbose --targets q_proj --targets v_proj")
    frozen = json.loads(told.stdout.splitlines()[-1])["frozen"]
    shares = frozen["blocks"]
    assert set(shares) == {"linears", "norms"}
    assert 0 < shares["norms"] < 0.05 < shares["linears"] < 1
    assert set(frozen["beside"]) == {"vision tower", "connector"}
    blocks = f"frozen in the transformer blocks: linears {shares['linears']:.1%}, norms"
    assert blocks in told.stderr
    assert "targets in the vision encoder: 2 of the 4 modules of q_proj, 2 of" in told.stderr


def vit() -> Any:
    return ARCHITECTURES["vit"].model()


def classes_of(model: ViTForImageClassification) -> Tensor:
    with torch.no_grad():
        return model(**ARCHITECTURES["vit"].inputs()).logits


@pytest.mark.parametrize("saved", [(), ("classifier",)])
@pytest.mark.parametrize("spec", [lf.LoRA(rank=2), lf.DoRA(), lf.LoHa()], ids=repr)
def test_it_trains_saves_loads_and_merges(spec, saved: tuple[str, ...], tmp_path: Path) -> None:
    model = vit()
    bare = classes_of(model)
    adapter = lf.attach(model, spec, modules_to_save=saved)
    assert not Anatomy.of(model).vocabulary_ends
    assert torch.allclose(classes_of(model), bare, atol=1e-6)
    losses = learned(model, adapter, ARCHITECTURES["vit"], 5)
    assert losses[-1] < losses[0]
    y = classes_of(model)
    adapter.save(tmp_path / "adapter")
    other = vit()
    again = lf.load(other, tmp_path / "adapter")
    assert torch.equal(classes_of(other), y)
    again.merge()
    assert (classes_of(other) - y).norm() <= 1e-5 * y.norm()
    with lf.only(model):
        assert torch.equal(classes_of(model), bare)


def test_ids_of_tokens_are_refused_by_what_has_no_vocabulary() -> None:
    with pytest.raises(lf.LorafoldError, match="does not define its embedding module"):
        lf.attach(vit(), lf.LoRA(rank=2), tokens=(1, 2))


NAMES = list(ARCHITECTURES)
MIX_DOCUMENTS = {"bloom", "gpt-oss", "opt"}


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_changes_nothing_and_the_base_stays_bit_for_bit(name: str) -> None:
    row = ARCHITECTURES[name]
    # frozen from the first: torch's own multi-head attention rounds otherwise if its weights train
    model, inputs = row.model().requires_grad_(False), row.inputs()
    with torch.no_grad():
        bare = run(model, inputs)
        assert bare.std() > 0.01
        adapter = lf.attach(model, lf.LoRA(rank=4))
        assert near(run(model, inputs), bare)
        adapter.detach()
        moved(model)
        assert (run(model, inputs) - bare).norm() > 1e-2 * bare.norm()
        with lf.only(model):
            assert torch.equal(run(model, inputs), bare)


@pytest.mark.few(23)
@pytest.mark.parametrize("name", NAMES)
def test_every_adapted_module_has_its_gradient_and_merging_equals_calling(name: str) -> None:
    """A module whose forward the model bypasses would have no gradient."""
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    adapter = moved(model)
    y = run(model, inputs)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        adapter.merge()
        assert near(run(model, inputs), y)
    assert not [n for n, _ in model.named_parameters() if "deltas" in n]


# where there are experts, PEFT takes these names of modules for theirs, whatever has them
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")


def peft_has(name: str, model: nn.Module) -> list[str]:
    """The default targets, without those that PEFT does not adapt in this model."""
    adapter = lf.attach(model, lf.LoRA(rank=1))
    sites = sorted(adapter.sites)
    adapter.detach()
    return [p for p in sites if p.rsplit(".", 1)[-1] not in ARCHITECTURES[name].not_in_peft]


@pytest.mark.few(15)
@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_same_from_our_file(name: str, tmp_path: Path) -> None:
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    adapter = moved(model, targets=peft_has(name, model))
    with torch.no_grad():
        y = run(model, inputs)
        adapter.save(tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(row.model(), tmp_path / "ours").eval()
        assert near(run(theirs, inputs), y)


@pytest.mark.few(15)
@pytest.mark.parametrize("name", NAMES)
def test_we_compute_the_same_from_peft_s_file(name: str, tmp_path: Path) -> None:
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    matrices = {path for path, m in Anatomy.of(model).modules if isinstance(m, Matrices)}
    left_out = OF_EXPERTS if matrices else ()
    targets = [p for p in peft_has(name, model) if p.rsplit(".", 1)[-1] not in left_out]
    matrices &= set(peft_has(name, model))
    where = {"target_modules": targets, "target_parameters": sorted(matrices) or None}
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **where)
    theirs = peft.get_peft_model(row.model(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    lf.load(model, tmp_path / "theirs")
    with torch.no_grad():
        assert near(run(model, inputs), run(theirs, inputs))


@pytest.mark.parametrize("name", [n for n, row in ENCODERS.items() if row.trains])
def test_a_loop_of_its_own_learns(name: str) -> None:
    row = ENCODERS[name]
    model = row.model()
    losses = learned(model, lf.attach(model, lf.LoRA(rank=4, dropout=0.0)), row, 8)
    assert losses[-1] < 0.9 * losses[0]


def test_encoders_keep_all_their_blocks() -> None:
    """A pair of encoders and an encoder-decoder are one model, and neither half is a tower."""
    for name, row in ENCODERS.items():
        model = row.model()
        anatomy = Anatomy.of(model)
        found = anatomy.language, anatomy.encoders, anatomy.encoders_and_connectors
        assert found == ("", {}, ()), name
        adapted = {site.rsplit(".", 1)[0] for site in lf.attach(model, lf.LoRA(rank=2)).sites}
        assert all(any(f"{s}.".startswith(f"{b}.") for s in adapted) for b in anatomy.blocks), name


def test_presets_of_an_encoder_decoder() -> None:
    """T5's attentions have capital letters, and its encoder and head are no decoder's."""
    model = ARCHITECTURES["t5"].model()
    attention = lf.attach(model, lf.LoRA(rank=2), "attention", name="attention").sites
    assert {path.rsplit(".", 2)[1] for path in attention} == {"SelfAttention", "EncDecAttention"}
    assert list(lf.attach(model, lf.LoRA(rank=2), "head", name="head").sites) == ["lm_head"]


def test_a_vision_encoder_under_a_text_decoder_is_one_model() -> None:
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ARCHITECTURES["vit"].config(), tf.TrOCRConfig(**SEQ2SEQ | IDS)
    )
    model = tf.VisionEncoderDecoderModel(config)
    assert Anatomy.of(model).encoders == {}
    sites = lf.attach(model, lf.LoRA(rank=2)).sites
    assert {site.split(".")[0] for site in sites} == {"encoder", "decoder"}


@pytest.mark.parametrize("name", [*TEXT, *RECURRENT, *MIXTURES])
def test_what_mixes_documents_trains_padded(name: str) -> None:
    """Recurrent and hybrid models among them: their code in torch carries the state on."""
    model = ARCHITECTURES[name].model()
    assert isolates(model) == (name not in RECURRENT and name not in MIX_DOCUMENTS)


@pytest.mark.parametrize(
    ("name", "packs"), [("mpt", False), ("dbrx", True), ("deepseek-v4", False)]
)
def test_attention_set_in_another_way_stays_what_it_was(name: str, packs: bool) -> None:
    """Configurations whose parts have no attention of their own."""
    model = FAMILIES[name].model()

    def set_to() -> list[str | None]:
        parts = [getattr(model.config, part) for part in model.config.sub_configs]
        return [config._attn_implementation for config in (model.config, *parts)]

    before = set_to()
    assert isolates(model) == packs
    assert set_to() == before
