"""What the quickstart holds its base in: the faster of bf16 and fp32, as the processor is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lorafold.ops.arithmetic import multiplying
from lorafold.peft.saved import Saved
from lorafold.quickstart import story as module
from lorafold.quickstart.story import RECIPE, fastest, quickstart

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "widened", "dtype", "why"),
    [
        (True, True, False, torch.bfloat16, "bf16: this CPU has AMX"),
        (False, True, False, torch.bfloat16, "bf16: this CPU has avx512_bf16"),
        (False, True, True, torch.float32, "fp32: this CPU has avx512_bf16, and is faster in fp32"),
        (False, False, True, torch.float32, "fp32: this CPU has neither AMX nor avx512_bf16"),
        (False, False, False, torch.float32, "fp32: this CPU has neither AMX nor avx512_bf16"),
    ],
    ids=["amx", "amd", "intel", "avx2", "neither"],
)
def test_the_faster_one_is_taken_and_said(
    amx: bool,
    avx512: bool,
    widened: bool,
    dtype: torch.dtype,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    with multiplying(widened=widened):
        assert fastest(CPU) == (dtype, None, why)


def test_what_other_commands_measure_with_its_recipe_is_the_same_everywhere() -> None:
    assert RECIPE.storage == "fp32"


@pytest.mark.slow
def test_the_whole_story_is_told_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(module, "RECIPE", RECIPE.model_copy(update={"steps": 1, "batch": 1}))
    monkeypatch.setattr(module, "UNSEEN", 1)
    console = Console(file=io.StringIO(), width=400)
    with multiplying(widened=False):
        found = quickstart(tmp_path / "out", console, device="cpu")
    assert found.base == "bf16"
    assert Saved.open(found.adapter).record["recipe"]["storage"] == "bf16"
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("base: bf16: this CPU has AMX\n")
