"""Target modules that PEFT refuses, or leaves out silently, in models with state spaces."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners import tuners_utils

import lorafold as lf
from lorafold.peft.form import REFUSED, REFUSING
from more_architectures import FAMILIES
from peft_cases import gap, load_theirs, logits, moved


@pytest.mark.parametrize("name", ["falcon-h1", "nemotron-h"])
def test_an_adapter_that_peft_refuses_says_so(name: str, tmp_path: Path, caplog) -> None:
    cls = FAMILIES[name].cls
    FAMILIES[name].model().save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    adapter = moved(model, lf.LoRA(rank=2, dropout=0.0))
    with caplog.at_level(logging.WARNING):
        adapter.save(tmp_path / "all")
    [told] = caplog.messages
    assert "PEFT refuses out_proj as targets of a model of this type" in told
    assert "lorafold alone reads them" in (tmp_path / "all" / "README.md").read_text()
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
    for kind in (*REFUSING, "llama", "jamba", "bamba"):
        model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        for target in (*REFUSED, "in_proj"):
            try:
                tuners_utils._check_lora_target_modules_mamba(
                    SimpleNamespace(peft_type="LORA"), model, target
                )
            except ValueError:
                assert (kind in REFUSING, target in REFUSED) == (True, True)
            else:
                assert kind not in REFUSING or target not in REFUSED


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
    assert f"the weights of {', '.join(past)} themselves" in told
    expected = logits(model)
    theirs = load_theirs(row.model().eval(), tmp_path / "a")
    assert gap(logits(theirs), expected) > 1e-3
    merged = load_theirs(row.model().eval(), tmp_path / "a").merge_and_unload()
    assert gap(logits(merged), expected) < 1e-4
    adapter.detach()
    caplog.clear()
    lf.attach(model, lf.LoRA(rank=2), [other]).save(tmp_path / "other")
    assert caplog.messages == []
