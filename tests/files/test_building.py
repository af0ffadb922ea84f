"""An adapter is read without being laid on the model, from the bytes that were verified."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorafold as lf
from engine_cases import METHODS, save_adapters
from lorafold.adapter.attaching import read_adapter
from lorafold.core.attach import adapted_modules
from lorafold.core.delta import SETTINGS
from lorafold.core.shared_tensors import skip_init
from lorafold.errors import LorafoldError
from lorafold.files.contents import Contents
from lorafold.peft.adapter_directory import FILES
from lorafold.peft.config import WEIGHTS


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_is_what_is_loaded_and_the_model_stays_as_it_is(model, paths, method) -> None:
    trainable = [p.requires_grad for p in model.parameters()]
    deltas = {at: one for at, (one,) in read_adapter(model, paths[method]).parts.items()}
    assert not [*adapted_modules(model)]
    assert [p.requires_grad for p in model.parameters()] == trainable
    adapter = lf.load(model, paths[method])
    state = adapter.state_dict()
    expected = {name: t for name, t in state.items() if not name.endswith(f".{SETTINGS}")}
    adapter.detach()
    found = {f"{at}.{n}": t for at, delta in deltas.items() for n, t in delta.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_files_that_change_after_they_were_read_change_nothing(model, paths, tmp_path) -> None:
    where = tmp_path / "it"
    shutil.copytree(paths["lora"], where)
    contents = Contents(where, FILES)
    before = contents.named
    weights = where / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    assert contents.named == before == Contents(paths["lora"], FILES).named
    assert read_adapter(model, contents).parts
    with pytest.raises(LorafoldError, match=f"{WEIGHTS}: 100 bytes, expected"):
        read_adapter(model, where)
    assert Contents(where, FILES).named != before


def test_draws_without_a_generator_of_their_own_are_left_out() -> None:
    torch.manual_seed(0)
    state, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    with skip_init(most=8 * 8 + 8 + 4 + 4):
        layer = nn.Linear(8, 8)
        nn.init.normal_(layer.weight, std=2.0)
        drawn = nn.init.normal_(torch.zeros(4), generator=generator)
        constant = nn.init.ones_(torch.zeros(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.all()
    assert constant.all()
    assert nn.Linear(8, 8).weight.any()
    assert not torch.equal(torch.get_rng_state(), state)
