"""Modules that are trained whole and have buffers: PEFT's file has the buffers too, and ours."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from architectures import near, run
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from more_architectures import FAMILIES
from peft_cases import load_theirs, move, save_theirs

# the module, and its buffer in the file: floats beside a linear, floats of its own, integers
ROUTERS = {
    "longcat": ("router", "model.layers.0.mlp.router.e_score_correction_bias"),
    "deepseek-v3": ("gate", "model.layers.1.mlp.gate.e_score_correction_bias"),
    "deepseek-v4": ("gate", "model.layers.0.mlp.gate.tid2eid"),
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=ROUTERS)
def given(request, tmp_path) -> tuple[Any, Path, str, str]:
    """The row of a family, the directory of its model, a router's name and that of its buffer."""
    row = FAMILIES[request.param]
    row.model().save_pretrained(tmp_path / "base")
    return row, tmp_path / "base", *ROUTERS[request.param]


@torch.no_grad()
def outputs(model: Any, row: Any) -> torch.Tensor:
    return run(model, row.inputs())


def test_peft_reads_a_router_of_ours_and_merged_files_have_it(given, tmp_path):
    row, base, name, buffer = given
    model = lf.load_model(base, storage="fp32")
    adapter = lf.attach(model, lf.LoRA(rank=4), ["q_b_proj"], modules_to_save=[name])
    move(adapter.parameters())
    expected = outputs(model, row)
    adapter.save(tmp_path / "ours")
    assert f"base_model.model.{buffer}" in load_file(tmp_path / "ours" / WEIGHTS)
    again = lf.load_model(base, storage="fp32")
    lf.load(again, tmp_path / "ours")
    assert torch.equal(outputs(again, row), expected)
    theirs = load_theirs(row.cls.from_pretrained(base), tmp_path / "ours").eval()
    assert near(outputs(theirs, row), expected)
    lf.merge(base, tmp_path / "ours", tmp_path / "merged", storage="fp32", certificate=False)
    merged = row.cls.from_pretrained(tmp_path / "merged").eval()
    assert near(outputs(merged, row), expected)


def test_a_router_of_pefts_is_read_unless_its_buffer_is_another_bases(given, tmp_path):
    row, base, name, buffer = given
    config = peft.LoraConfig(
        r=4, target_modules=["q_b_proj"], modules_to_save=[name], init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(row.cls.from_pretrained(base), config).eval()
    move(p for n, p in theirs.named_parameters() if "modules_to_save" in n)
    expected = outputs(theirs, row)
    save_theirs(theirs, tmp_path / "theirs")
    model = lf.load_model(base, storage="fp32")
    lf.load(model, tmp_path / "theirs")
    assert near(outputs(model, row), expected)
    lf.merge(base, tmp_path / "theirs", tmp_path / "merged", storage="fp32", certificate=False)
    merged = row.cls.from_pretrained(tmp_path / "merged").eval()
    assert near(outputs(merged, row), expected)

    tensors, key = load_file(tmp_path / "theirs" / WEIGHTS), f"base_model.model.{buffer}"
    save_file(tensors | {key: tensors[key] + 1}, tmp_path / "theirs" / WEIGHTS)
    (tmp_path / "theirs" / MANIFEST).unlink(missing_ok=True)
    with pytest.raises(LorafoldError, match=rf"{key}: a b.* that differs from this base's"):
        lf.load(lf.load_model(base, storage="fp32"), tmp_path / "theirs")
