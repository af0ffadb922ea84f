"""Requests for short runs on a tiny model."""

from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from lorafold.opening import Base
from lorafold.recipe.recipe import Recipe
from lorafold.training.request import Request

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(24)]


def request(model: Path, out: Path, **fields) -> Request:
    extra = {
        k: fields.pop(k)
        for k in ("resume", "overwrite", "eval_rows", "init_adapter")
        if k in fields
    }
    recipe = Recipe(**{"steps": 6, "batch": 4, "storage": "fp32"} | fields)
    return Request(Base(model, device="cpu"), out, recipe, ROWS, "rows", **extra)


def quiet() -> Console:
    return Console(quiet=True)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


KILLED = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/lib")
from training_cases import quiet, request
from lorafold.training import loop
step = loop.train_step
def killing(job, rows, i):
    if i == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(job, rows, i)
loop.train_step = killing
loop.fit.__globals__["train_step"] = killing
from lorafold.training.run import train
train(request(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3])), quiet())
"""
