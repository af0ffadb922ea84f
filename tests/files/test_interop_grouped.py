"""The grouped linears of DeepSeek-V4: in PEFT, in quantized files, and their dropout."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import lorafold as lf
from adapter_files import json_of
from lorafold.core.attach import selection_of
from lorafold.core.selection import Draws, drawing, named
from lorafold.core.spec import Spec
from lorafold.models.quantized_files import make_quantized
from more_architectures import FAMILIES
from peft_cases import CLOSE, gap, load_theirs, logits, move, moved

ROW = FAMILIES["deepseek-v4"]
TARGETS = ["o_a_proj", "o_b_proj"]


def adapted(spec: Spec) -> tuple[nn.Module, lf.Adapter]:
    model = ROW.model()
    return model, moved(model, spec, TARGETS)


def test_peft_computes_the_same_from_the_parameter(tmp_path: Path, caplog) -> None:
    model, adapter = adapted(lf.LoRA(rank=4, dropout=0.1))
    with caplog.at_level(logging.INFO, "lorafold"):
        adapter.save(tmp_path / "a")
    assert "grouped linears without dropout, so lora_dropout is 0" in caplog.text
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
    assert "grouped linears with LoRA alone" in caplog.text
    with pytest.raises(KeyError, match="LORAFOLD"):
        load_theirs(ROW.model(), tmp_path / "a")
    again = ROW.model()
    lf.load(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_what_takes_single_vectors_is_refused() -> None:
    with pytest.raises(lf.LorafoldError, match=r"o_a_proj: IA3.*groups of vectors"):
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
    names = named(torch.arange(2)[:, None], torch.arange(3))

    def outputs(rows: list[int], key: int = 5) -> torch.Tensor:
        with drawing(selection_of(root), Draws(key, names[rows])):
            return root(x[rows]).detach()

    both = outputs([0, 1])
    torch.testing.assert_close(both, torch.cat([outputs([0]), outputs([1])]))
    assert not torch.allclose(both, outputs([0, 1], 6))
