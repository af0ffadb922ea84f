"""Every architecture of the table, adapted: the bare base stays what it is, every part of the
adapter matters, merging equals calling, and PEFT computes the same from the same files.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import lorafold as lf
from architectures import (
    ARCHITECTURES,
    ENCODERS,
    IDS,
    MIXTURES,
    RECURRENT,
    SEQ2SEQ,
    TEXT,
    moved,
    near,
    run,
)
from lorafold.core.anatomy import Anatomy
from lorafold.core.matrices import Matrices
from lorafold.training_step.packed_attention import isolates
from more_architectures import FAMILIES

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
def test_every_adapted_module_has_its_gradient(name: str) -> None:
    """A module whose forward the model bypasses would have none."""
    row = ARCHITECTURES[name]
    model = row.model()
    adapter = moved(model)
    y = run(model, row.inputs())
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    lost = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert lost == []


@pytest.mark.few(23)
@pytest.mark.parametrize("name", NAMES)
def test_merging_equals_calling(name: str) -> None:
    row = ARCHITECTURES[name]
    model, inputs = row.model(), row.inputs()
    adapter = moved(model)
    with torch.no_grad():
        y = run(model, inputs)
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
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        target_parameters=sorted(matrices) or None,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(row.model(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    lf.load(model, tmp_path / "theirs")
    with torch.no_grad():
        assert near(run(model, inputs), run(theirs, inputs))


# --- the loops of those that are no language models ----------------------------------------------


@pytest.mark.parametrize("name", [n for n, row in ENCODERS.items() if row.trains])
def test_a_loop_of_its_own_learns(name: str) -> None:
    row = ENCODERS[name]
    assert row.trains is not None
    model, inputs = row.model(), row.inputs() | row.trains()
    adapter = lf.attach(model, lf.LoRA(rank=4, dropout=0.0))
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_encoders_keep_all_their_blocks() -> None:
    """A pair of encoders and an encoder-decoder are one model, and neither half is a tower."""
    for name, row in ENCODERS.items():
        model = row.model()
        anatomy = Anatomy.of(model)
        assert (anatomy.language, anatomy.encoders, anatomy.beside) == ("", {}, ()), name
        adapted = {site.rsplit(".", 1)[0] for site in lf.attach(model, lf.LoRA(rank=2)).sites}
        assert all(any(f"{s}.".startswith(f"{b}.") for s in adapted) for b in anatomy.blocks), name


def test_presets_of_an_encoder_decoder() -> None:
    """T5's attentions have capital letters, and its encoder lies outside the decoder, as the head
    does.
    """
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


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TEXT, *RECURRENT, *MIXTURES])
def test_what_mixes_documents_trains_padded(name: str) -> None:
    """Recurrent and hybrid models among them: their code in torch carries the state on."""
    model = ARCHITECTURES[name].model()
    assert isolates(model) == (name not in RECURRENT and name not in MIX_DOCUMENTS)


@pytest.mark.parametrize(
    ("name", "packs"), [("mpt", False), ("dbrx", True), ("deepseek-v4", False)]
)
def test_attention_set_in_another_way_stays_what_it_was(name: str, packs: bool) -> None:
    """Parts of a configuration without an attention of their own, and keys beside those of the
    documents: each was a traceback of `lf.train`.
    """
    model = FAMILIES[name].model()

    def set_to() -> list[str | None]:
        parts = [getattr(model.config, part) for part in model.config.sub_configs]
        return [config._attn_implementation for config in (model.config, *parts)]

    before = set_to()
    assert isolates(model) == packs
    assert set_to() == before
