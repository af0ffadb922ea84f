"""What the quickstart holds its base in: the faster of bf16 and fp32, as the processor is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from shlex import quote

import pytest
import torch
from rich.console import Console

from lorafold.cli.other_commands import this_command
from lorafold.models.quantizations import Storage
from lorafold.ops.arithmetic import multiplying
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.quickstart import story as module
from lorafold.quickstart.story import RECIPE, Story, computing, fastest, quickstart
from lorafold.runtime.processor import processor_name

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
    assert SavedAdapter.open(found.adapter).record["recipe"]["storage"] == "bf16"
    text = console.file.getvalue()  # type: ignore[attr-defined]
    first, second, third, *_ = text.splitlines()
    assert first.startswith(f"processor: {processor_name()}, ")
    assert first.endswith(", multiplying in bf16")
    assert second == "base: bf16: this CPU has AMX"
    assert third.startswith("C++ operations: ")


def test_a_processor_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "use", lambda _: "found no C++ compiler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    told = [*computing(CPU, Storage(torch.float32, None, "fp32: as asked"))]
    assert ", 1 thread on " in told[0]
    assert told[0].endswith("multiplying in fp32")
    assert told[1:] == [
        "base: fp32: as asked", f"C++ operations: found no C++ compiler; {module.UNCOMPILED}"
    ]  # fmt: skip


def test_each_figure_is_said_and_judged() -> None:
    def said(after: float, kl: float | None) -> str:
        lost = None if kl is None else 1e-4
        story = Story(0.0, after, 60, 90, "a", "m", 10**6, 10**8, kl, "g", lost, "fp32")
        return "\n".join(story.meaning())

    assert "99.0% after: the share of" in said(0.99, 1e-6)
    assert "to the letter; good" in said(0.99, 1e-6)
    assert "no difference but rounding: good" in said(0.99, 1e-6)
    assert "middling" in said(0.7, 1e-6)
    assert "poor" in said(0.1, 1e-2)
    assert "more than rounding" in said(0.1, 1e-2)
    assert "costs 1.0% of a model" in said(0.1, None)
    assert "0.01% lost in llama.cpp" in said(0.1, 1e-6)
    assert "KL" not in said(0.1, None)
    assert "llama.cpp" not in said(0.1, None)


@pytest.mark.parametrize("there", ["on the path", "elsewhere", "as a module"])
def test_its_commands_run_from_where_it_ran(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_ = tmp_path / "a b" / "bin"
    bin_.mkdir(parents=True)
    script = bin_ / "lorafold"
    script.write_text(f"#!{sys.executable}\nprint('ran')\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = [str(bin_)] if there == "on the path" else []
    monkeypatch.setenv("PATH", os.pathsep.join([*path, "/usr/bin", "/bin"]))
    module_run = there == "as a module"
    typed = str(tmp_path / "lorafold" / "__main__.py") if module_run else "a b/bin/lorafold"
    monkeypatch.setattr(sys, "argv", [typed])
    run = this_command()
    if there == "as a module":
        assert run == f"{quote(sys.executable)} -m lorafold"
        return
    assert run == ("lorafold" if there == "on the path" else "'a b/bin/lorafold'")
    done = subprocess.run(run, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "ran\n"
