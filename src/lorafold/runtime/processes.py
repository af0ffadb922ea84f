"""The processes that compute one run together, and what they say to each other.

    with together(launched(), device) as processes:        one process alone: ALONE
        processes.add([p.grad for p in parameters])        summed over all, in place
        found = processes.once(measure)                    process 0 computes it, all have it

Each holds the whole model and computes its share of a step's rows. What one process decides by its
own clock, disk or memory is decided by process 0, or agreed on. An error in one ends all of them
(`lifeline`).

`launched` says how many processes a launcher started, and which one this is, by the environment
that it leaves:

    torchrun, accelerate launch     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun                            SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    mpirun                          OMPI_COMM_WORLD_* or PMI_*, and MASTER_ADDR on several machines

It imports and starts nothing, so that a command can ask before anything else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lorafold.errors import Interrupted, LorafoldError
from lorafold.runtime.lifeline import Lifeline

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
TOGETHER = timedelta(minutes=5)  # in which all have to come
PATIENT = timedelta(days=7)  # one may compute alone for long; the lifeline tells if it died
BUCKET = 1 << 26  # bytes that are sent at a time
CAUSE = 3.0  # seconds in which a connection that broke turns out to be a death
PORT = 29500  # torch's own, where a launcher names none
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(eq=False)
class Processes:
    """This process among those of a run; `index` counts from 0, and the `first` is the one that
    writes and prints.
    """

    index: int = 0
    count: int = 1
    lifeline: Lifeline | None = None

    def __post_init__(self) -> None:
        self.first = self.index == 0

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors, of any shapes and on one device, by their sums over all processes."""
        import torch.distributed as dist

        if self.count > 1:
            _at_once(tensors, dist.all_reduce)

    def largest(self, number: int) -> int:
        """The largest of the numbers of all processes."""
        import torch
        import torch.distributed as dist

        if self.count == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def same(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """Replace tensors, of any shapes and on one device, by those of one process."""
        import torch.distributed as dist

        if self.count > 1:
            _at_once(tensors, lambda flat: dist.broadcast(flat, source))

    def gather(self, value: T) -> list[T]:
        """The values of all processes in their order. It waits until all have come here."""
        import torch.distributed as dist

        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def once(self, compute: Callable[[], T]) -> T:
        """What process 0 computes; the others wait for it."""
        import torch.distributed as dist

        found = [compute() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(found, 0)
        return found[0]  # type: ignore[return-value]


ALONE = Processes()


@contextmanager
def together(here: Launched, device: str | None = None) -> Iterator[Processes]:
    """Join the processes that a launcher started, until the `with` block ends.

    An error in the block ends all of them with its exit code: that of a LorafoldError is 2.
    """
    if here.world == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    cuda = device is not None and device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    store, made = _met(here), not dist.is_initialized()
    lifeline = Lifeline(here.rank, here.world, here.address, store)
    if made:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=here.rank, world_size=here.world, timeout=PATIENT
        )
    try:
        yield Processes(here.rank, here.world, lifeline)
    except BaseException as error:
        code, expected = _code_of(error)
        if not expected:
            lifeline.wait(CAUSE)
        lifeline.failed(code, str(error) if expected else f"{type(error).__name__}: {error}")
        raise
    lifeline.left()
    if made:
        dist.destroy_process_group()


def _met(here: Launched) -> Any:
    """The store of these processes, for this run of them."""
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(here.rank), "WORLD_SIZE": str(here.world), "LOCAL_RANK": str(here.local_rank),
        "MASTER_ADDR": here.address, "MASTER_PORT": str(here.port),
    }  # fmt: skip
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=TOGETHER))
        number = store.add(f"runs of {here.rank}", 1)
        store.set_timeout(TOGETHER)
        return dist.PrefixStore(f"lorafold {number}", store)
    except (dist.DistError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:100]
        raise LorafoldError(
            f"process {here.rank} of {here.world}, started by {here.by}: found no way to process 0"
            f" at {here.address}:{here.port} ({first}); expected all to start within"
            f" {TOGETHER.seconds // 60} minutes"
        ) from None


def _code_of(error: BaseException) -> tuple[int, bool]:
    """The exit code that an error has, and whether its message says it all."""
    if isinstance(error, LorafoldError):
        return 2, True
    if isinstance(error, Interrupted):
        return error.code, True
    if isinstance(error, KeyboardInterrupt):
        return 130, True
    return 1, False


def _at_once(tensors: Sequence[torch.Tensor], do: Callable[[torch.Tensor], Any]) -> None:
    """Replace tensors by what an operation makes of them, many in one call."""
    import torch

    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():  # a large one, which needs no copy
            do(bucket[0].view(-1))
            continue
        flat = torch.cat([t.reshape(-1) for t in bucket])
        do(flat)
        for t, found in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(found.view_as(t))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in parts of one dtype each, in their order."""
    bucket: list[torch.Tensor] = []
    for t in tensors:
        full = bucket and sum(b.nbytes for b in bucket) + t.nbytes > BUCKET
        if full or (bucket and bucket[0].dtype != t.dtype):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


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
    """What the environment says."""
    for variable, of_launcher in LAUNCHERS.items():
        if variable in environment and (found := of_launcher(environment)):
            return found
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise LorafoldError(
            "accelerate launch started one process: on processors it takes --num_processes for"
            " mpirun alone; expected torchrun --nproc_per_node N -m lorafold ..., or accelerate"
            " launch with --num_processes 1"
        )
    return Launched()


def _of_torchrun(environment: Mapping[str, str]) -> Launched:
    names = ("RANK", "WORLD_SIZE")
    given = [name for name in names if name in environment]
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


# by a variable that a launcher sets
LAUNCHERS: dict[str, Callable[[Mapping[str, str]], Launched | None]] = {
    "RANK": _of_torchrun,
    "WORLD_SIZE": _of_torchrun,
    "SLURM_STEP_NUM_TASKS": _of_srun,
    "OMPI_COMM_WORLD_SIZE": _of_mpirun,
    "PMI_SIZE": _of_mpirun,
}


def first_node(nodes: str) -> str:
    """The first machine of a list as SLURM writes it, such as rack[03-07,11],login."""
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
    """A number of the environment."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text, re.ASCII):
        where = f" beside {beside}" if beside else ""
        raise LorafoldError(f"{name}: found {text or 'none'}{where}, expected a number")
    return int(text)
