"""Runs the engines that verify an export. Each engine has its own process, possibly in another
Python environment, so `program.py` imports nothing from lorafold. To add an engine, add a function
to `program.py` and a row to `ENGINES`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from lorafold.errors import LorafoldError, truncate_middle
from lorafold.exporting.proof import EngineAnswers
from lorafold.exporting.target import Job


@dataclass(frozen=True)
class ExternalEngine:
    title: str
    module: str
    install: str

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None


ENGINES = {
    "mlx": ExternalEngine("mlx-lm", "mlx_lm", "pip install mlx-lm; on Linux also mlx-cpu"),
    "peft": ExternalEngine("PEFT", "peft", "pip install peft"),
    "llamacpp": ExternalEngine("llama.cpp", "xllamacpp", "pip install xllamacpp"),
    "vllm_url": ExternalEngine("vLLM", "numpy", "vllm serve"),
    "vllm": ExternalEngine("vLLM", "vllm", "pip install vllm, or --engine-python"),
}


def run_engine(name: str, job: Job, python: str | None = None) -> EngineAnswers:
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        file, out = Path(scratch, "job.json"), Path(scratch, "answers.npz")
        file.write_text(json.dumps({**job, "out": str(out)}), encoding="utf-8")
        program = str(Path(__file__).with_name("program.py"))
        command = [python or sys.executable, program, name, str(file)]
        option, engine = f"--engine-python {python}" if python else "", ENGINES[name]
        try:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        except OSError as error:
            used = option or command[0]
            raise LorafoldError(f"{used}: can't be run: {error.strerror}") from error
        if code or not out.is_file():
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
            ended = f"the engine exited with code {code} without answers"
            last = truncate_middle(lines[-1], 160) if code and lines else ended
            if last == ended or last.startswith("ModuleNotFoundError"):
                last += f"; use a Python environment with {engine.module}"
            raise LorafoldError(f"{option and option + ': '}{engine.title}: {last}")
        with np.load(out) as arrays:
            about = json.loads(str(arrays["about"]))
            greedy = tuple(tuple(int(t) for t in row if t >= 0) for row in arrays["greedy"])
            tensors = {k: torch.from_numpy(arrays[k]) for k in ("adapted", "base") if k in arrays}
    lists = (tuple(about.get(key, ())) for key in ("unused", "other_tokens", "other_texts"))
    return EngineAnswers(
        tensors["adapted"], tensors.get("base"), greedy, engine.title, about["version"], *lists
    )
