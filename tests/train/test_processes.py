"""Several processes of one run compute what one process does, and one alone speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafold.methods import METHODS
from process_cases import apart, rows, together

RUN = ("--device", "cpu", "--set", "storage=fp32", "--set", "steps=8", "--set", "batch=8")
FEW = ("lora", "adalora", "full", "prompt")
CLOSE = 1e-5
DROPS = {"lora", "rslora", "pissa", "olora", "dora", "adalora", "loha", "lokr", "vera"}


@pytest.fixture(scope="module")
def command(tiny_model_dir, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run but for its method and its directory."""
    data = rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    return ("train", "--model", str(tiny_model_dir("llama-wide")), "--data", str(data), *RUN)


@pytest.mark.parametrize("method", FEW)
def test_two_processes_train_what_one_does(
    method: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    dropped = ("--set", "dropout=0.1") if method in DROPS else ()
    command = (*command, "--method", method, *dropped)
    [one] = together(1, tmp_path, *command, "--out", str(tmp_path / "one"))
    two = together(2, tmp_path, *command, "--out", str(tmp_path / "two"), "--json")
    assert [p.code for p in (one, *two)] == [0, 0, 0], two[0].stderr
    assert apart(tmp_path / "one", tmp_path / "two") < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {*FEW, "linear-probe"}))
def test_every_method_in_two_processes_and_four(
    method: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    for dropout in ("0", "0.1") if method in DROPS else (None,):
        dropped = () if dropout is None else ("--set", f"dropout={dropout}")
        asked, outs = (*command, "--method", method, *dropped, "--overwrite"), []
        for n in (1, 2, 4):
            outs.append(out := tmp_path / str(n))
            done = together(n, tmp_path, *asked, "--out", str(out))
            assert [p.code for p in done] == [0] * n, done[0].stderr
        assert max(apart(outs[0], out) for out in outs[1:]) < CLOSE
