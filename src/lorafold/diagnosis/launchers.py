"""How many processes a launcher started of this command, or would start here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lorafold.diagnosis.finding import Finding
from lorafold.errors import LorafoldError
from lorafold.machine.cores import usable_cores
from lorafold.machine.devices import gpus
from lorafold.machine.processes import launched

HF_HOME = "~/.cache/huggingface"
CONFIG = "accelerate/default_config.yaml"


def findings() -> Iterator[Finding]:
    """What started this process, and what torchrun, accelerate and srun would start."""
    yield _this()
    cuda = [gpu for gpu in gpus() if gpu.device.startswith("cuda")]
    where = f"each a GPU, of which there are {len(cuda)}" if cuda else "all on the processor"
    auto = len(cuda) or usable_cores()
    yield Finding("torchrun", f"--nproc_per_node N starts N, {where}; auto starts {auto}", auto)
    yield _accelerate(len(cuda))
    tasks = os.environ.get("SLURM_NTASKS")
    text = "no job of SLURM here" if tasks is None else f"{tasks} in this job, or -n of them"
    yield Finding("srun", text, tasks and int(tasks))


def _this() -> Finding:
    try:
        here = launched()
    except LorafoldError as error:
        return Finding("this process", "half started by a launcher", problem=str(error))
    if here.world == 1:
        return Finding("this process", "alone, no launcher started it", 1)
    at = f"process 0 is at {here.address}:{here.port}"
    return Finding("this process", f"{here.rank} of {here.world} of {here.by}; {at}", here.world)


def _accelerate(cuda: int) -> Finding:
    """One on processors, whatever it is asked for, but where mpirun starts them."""
    import yaml

    if not cuda:
        return Finding("accelerate launch", "1 on processors, whatever --num_processes says", 1)
    file = Path(os.environ.get("HF_HOME", HF_HOME)).expanduser() / CONFIG
    try:
        asked = yaml.safe_load(file.read_text())["num_processes"]
        told = f"{asked}, as {file} has it"
    except (OSError, TypeError, KeyError, yaml.YAMLError):
        asked, told = cuda, f"{cuda}, without a configuration"
    return Finding("accelerate launch", f"{told}; --num_processes N starts N", asked)
