"""Modules that are trained whole and have buffers: PEFT's file has the buffers too, and ours."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorafold as lf
from adapter_files import change, tensors_of
from architectures import near, run
from lorafold.errors import LorafoldError
from more_architectures import FAMILIES
from peft_cases import load_theirs, made_by_peft, moved, save_theirs

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
