"""Requests for short runs on a tiny model."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import lorafold
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training import loop
from lorafold.training.finish import Trained
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(24)]


def request(
    model: Path, out: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any
) -> RunRequest:
    extra = {
        k: fields.pop(k)
        for k in ("resume", "overwrite", "eval_rows", "init_adapter")
        if k in fields
    }
    recipe = Recipe(**{"steps": 6, "batch": 4, "storage": "fp32"} | fields)
    return RunRequest(Base(model, device="cpu"), out, recipe, rows, "rows", **extra)


def quiet() -> Console:
    return Console(quiet=True)


def trained(model: Path, out: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any) -> Trained:
    return train(request(model, out, rows, **fields), quiet())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def beginning(run: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that runs something: a fork, unless a GPU's threads forbid that."""
    kind = "spawn" if torch.cuda.is_available() else "fork"
    process: BaseProcess = get_context(kind).Process(target=afresh, args=(run, *arguments))
    process.start()
    return process


def afresh(run: Callable[..., object], *arguments: object) -> None:
    # a fork renews torch's thread pool at the first call, during which another thread finds none
    torch.set_num_threads(torch.get_num_threads())
    run(*arguments)


def killed(run: Callable[..., object], *arguments: object) -> None:
    """Run something that kills its process, in one of its own."""
    process = beginning(run, *arguments)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def command(told: Path, *arguments: str) -> None:
    """The command, until this process ends with its exit code; what it tells goes into a file."""
    done = lorafold(*arguments)
    told.write_text(done.stderr)
    sys.exit(done.returncode)


@contextmanager
def stopping(at: int, error: BaseException | None = None) -> Iterator[None]:
    """Runs fail in step `at`, by KeyboardInterrupt or an error; their checkpoints stay."""
    step = loop.train_step

    def failing(plan: loop.Plan, rows: Any, i: int) -> Any:
        if i == at:
            raise error or KeyboardInterrupt
        return step(plan, rows, i)

    with mock.patch.object(loop, "train_step", failing):
        yield


def train_until_killed(model: Path, out: Path, fields: dict[str, Any]) -> None:
    """A run whose process is killed in step 12."""
    step = loop.train_step

    def killing(plan: loop.Plan, rows: list[int], i: int) -> float:
        if i == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(plan, rows, i)

    loop.train_step = killing
    train(request(model, out, **fields), quiet())
