"""NaN, infinities and kills at 60 places of a run: no bad file is left, and it can be resumed."""

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import unestimating
from lorafold.errors import LorafoldError
from lorafold.files.atomic import verify
from lorafold.training import loop
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.finish import Trained
from lorafold.training.run import train
from lorafold.training_step.param_groups import parameters
from training_cases import ROWS, beginning, quiet, request

METHODS = ("lora", "dora", "full")
KILLS = 36
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.fsync"}
STEP = loop.train_step


def run(model: Path, out: Path, method: str, held_out: bool, resume: bool = False) -> Trained:
    rows = ROWS[:4] if held_out else None
    fields = {"method": method, "steps": 4, "save_every": 2, "keep": 1, "eval_rows": rows}
    with unestimating():
        return train(request(model, out, resume=resume, **fields), quiet())


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: t for file in files for key, t in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_left(out: Path) -> None:
    """Whatever is there under its name is whole and finite."""
    kept = RunDirectory(out).checkpoints().values()
    for folder in (out, out.with_name(f"{out.name}.best"), *kept):
        if folder.exists():
            assert verify(folder) == []
            assert all(t.isfinite().all() for t in weights(folder).values())


def killed_at(place: int, told: Path, *of: Any) -> None:
    """A run that is killed before its n-th change of the file system, or counts them."""
    changes, sync = [0], os.fsync

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in WRITES or writes:
            if changes[0] == place:
                os.kill(os.getpid(), signal.SIGKILL)
            changes[0] += 1

    def synced(file: int) -> None:
        count("os.fsync", ())
        sync(file)

    sys.addaudithook(count)
    os.fsync = synced
    run(*of)
    told.write_text(str(changes[0]))


def ended(*of: Any) -> int | None:
    process = beginning(*of)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def straight(tiny_model_dir, tmp_path_factory) -> Callable[[str, bool], tuple[Path, int]]:
    """A run that nothing happens to, and how often it changes the file system."""

    @cache
    def made(method: str, held_out: bool) -> tuple[Path, int]:
        folder = tmp_path_factory.mktemp("straight")
        told, out = folder / "told", folder / "new" / "out"
        assert ended(killed_at, -1, told, tiny_model_dir("llama"), out, method, held_out) == 0
        return out, int(told.read_text())

    return made


@pytest.mark.few(2)
@pytest.mark.parametrize("place", range(KILLS))
def test_a_kill(place: int, straight, tiny_model_dir, tmp_path: Path) -> None:
    method, held_out = METHODS[place % 3], place // 3 % 2 == 1
    whole, changes = straight(method, held_out)
    # one half over the whole run, the other over its end
    share = (place + 1) / KILLS
    at = int(2 * share * changes) if share < 0.5 else changes - 1 - 2 * (KILLS - 1 - place)
    of = tiny_model_dir("llama"), tmp_path / "new" / "out", method, held_out
    assert ended(killed_at, at, tmp_path / "told", *of) == -signal.SIGKILL
    check_left(of[1])
    assert ended(run, *of, True) == 0
    assert same(of[1], whole)
    assert ended(run, *of, True) == 0  # it is finished
    kept = {"out", "out.best"} if (whole.parent / "out.best").exists() else {"out"}
    assert {path.name for path in of[1].parent.iterdir()} == kept


def injecting(kind: str, value: float, at: int) -> Callable[..., tuple[float, float]]:
    """A step of training in which a number is not finite."""

    def step(plan: loop.Plan, examples: Any, i: int) -> tuple[float, float]:
        if i != at:
            return STEP(plan, examples, i)
        p, hook = parameters(plan.optimizer.param_groups)[-1], None
        if kind == "loss":
            hook = plan.loss.register_forward_hook(lambda module, given, loss: loss * value)
        elif kind == "gradient":
            hook = p.register_hook(lambda g: g * value)
        else:
            found = p.detach() if kind == "weight" else plan.optimizer.state[p][kind]
            found.view(-1)[0] = value
        try:
            return STEP(plan, examples, i)
        finally:
            if hook is not None:
                hook.remove()

    return step


@pytest.mark.few(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("kind", ["loss", "gradient", "weight", "exp_avg"])
def test_a_number_not_finite(kind, value, method, straight, tiny_model_dir, tmp_path) -> None:
    held_out = (value > 0) != (method == "dora")
    of = tiny_model_dir("llama"), tmp_path / "out", method, held_out
    with mock.patch.object(loop, "train_step", injecting(kind, value, 2)):
        if kind in ("loss", "gradient"):
            found = run(*of)
            assert found.skipped == [3]
            check_left(of[1])
            return
        with pytest.raises(LorafoldError, match=r"; the last good checkpoint is .*step-000002"):
            run(*of)
    assert not of[1].exists()
    check_left(of[1])
    run(*of, True)
    assert same(of[1], straight(method, held_out)[0])
