"""How many processes a launcher started, and which one this is, by the environment that it leaves.

    torchrun, accelerate launch     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun                            SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    mpirun                          OMPI_COMM_WORLD_* or PMI_*, and MASTER_ADDR on several machines

Nothing is imported or started here, so that a command can ask before anything else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorafold.errors import LorafoldError

PORT = 29500  # torch's own, where a launcher names none
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class Launched:
    """One of `world` processes, numbered from 0 by `rank`, and by `local_rank` on its machine;
    process 0 is at `address`. `by` is the launcher, empty for a process that is alone.
    """

    by: str = ""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = PORT

    @property
    def speaks(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """What the environment says. Raises LorafoldError where it says half of it, or where a launcher
    was asked for several processes and started one.
    """
    if found := _of_torchrun(environment) or _of_srun(environment) or _of_mpirun(environment):
        return found
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise LorafoldError(
            "accelerate launch started one process: on processors it takes --num_processes for"
            " mpirun alone; expected torchrun --nproc_per_node N -m lorafold ..., or accelerate"
            " launch with --num_processes 1"
        )
    return Launched()


def _of_torchrun(environment: Mapping[str, str]) -> Launched | None:
    names = ("RANK", "WORLD_SIZE")
    if not (given := [name for name in names if name in environment]):
        return None
    rank, world = (_number(environment, name, given[0]) for name in names)
    if not 0 <= rank < world:
        raise LorafoldError(f"RANK: found {rank}, expected one of the {world} of WORLD_SIZE")
    if world == 1:
        return Launched()
    by = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environment else "torchrun"
    local = _number(environment, "LOCAL_RANK", "RANK")
    if "MASTER_ADDR" not in environment:
        raise LorafoldError(f"MASTER_ADDR: found none beside RANK={rank}, expected the address of"
                            " process 0")  # fmt: skip
    return Launched(by, rank, world, local, environment["MASTER_ADDR"], _port(environment, PORT))


def _of_srun(environment: Mapping[str, str]) -> Launched | None:
    # the script of a job has the job's tasks in its environment, and is one process
    if _number(environment, "SLURM_STEP_NUM_TASKS", default=1) == 1:
        return None
    rank, world, local = (
        _number(environment, name, "SLURM_STEP_NUM_TASKS")
        for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_node(nodes)
    job, step = (
        _number(environment, name, default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    port = _port(environment, 20000 + (31 * job + step) % 20000)
    return Launched("srun", rank, world, local, address, port)


def _of_mpirun(environment: Mapping[str, str]) -> Launched | None:
    for names in MPI:
        if _number(environment, names[1], default=1) == 1:
            continue
        rank, world = (_number(environment, name, names[1]) for name in names[:2])
        local = _number(environment, names[2], default=rank)
        address = environment.get("MASTER_ADDR", "127.0.0.1")
        return Launched("mpirun", rank, world, local, address, _port(environment, PORT))
    return None


def first_node(nodes: str) -> str:
    """The first machine of a list as SLURM writes it, such as rack[03-07,11],login.

    Raises LorafoldError for an empty list.
    """
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise LorafoldError(
            f"SLURM_STEP_NODELIST: found {nodes!r}, expected machines; MASTER_ADDR names that of"
            " process 0"
        )
    return "".join(part or "" for part in found.groups())


def _port(environment: Mapping[str, str], default: int) -> int:
    return _number(environment, "MASTER_PORT", default=default)


def _number(
    environment: Mapping[str, str], name: str, beside: str = "", default: int | None = None
) -> int:
    """A number of the environment.

    Args:
        beside: What is there, so that this must be too.
        default: What it is where it is missing.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text, re.ASCII):
        where = f" beside {beside}" if beside else ""
        raise LorafoldError(f"{name}: found {text or 'none'}{where}, expected a number")
    return int(text)
