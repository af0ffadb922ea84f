"""Data-parallel processes of one run, and their communication.

    with process_group(detect_launch(), device) as processes:    for one process: SINGLE_PROCESS
        processes.add([p.grad for p in parameters])        all-reduce, in place
        found = processes.once(measure)                    rank 0 computes, all receive

Rank 0 makes the decisions that depend on a clock, disk or memory, or all processes agree on them.
An error in one process ends all: through its `Lifeline`, each process keeps a connection to rank 0,
which the system closes when a process dies. Keepalive probes detect that a machine is gone, so a
long computation is not taken for a failure. Rank 0 reports the failed process; if rank 0 failed,
rank 1 does.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

from lorafold.errors import Interrupted, LorafoldError

if TYPE_CHECKING:
    import torch

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # 20 seconds in all
SAME_ERROR_SECONDS = 2.0  # seconds in which rank 0 may raise the same error as another process
EXIT_SECONDS = 15.0  # seconds for which a process waits for rank 0 to end


class Lifeline:
    """The connections of a process to rank 0, or of rank 0 to all others. `progress()` describes
    the run's progress, for the message if another process dies.
    """

    def __init__(self, rank: int, world: int, address: str, store: Any) -> None:
        self.rank, self.host = rank, socket.gethostname()
        self.progress: Callable[[], str] = lambda: "at the start"
        self._lock = threading.Lock()
        self._ending, self._main_gone = threading.Event(), threading.Event()  # main: rank 0
        self._code: int | None = None  # rank 0's exit code
        self._finished = set[int]()  # processes that are done
        self._peers: dict[int, socket.socket] = {}
        self._readers: dict[int, TextIO] = {}
        self._hosts: dict[int, str] = {}
        if rank == 0:
            self._accept(world, address, store)
        else:
            port, token, host = store.get("lifeline").decode().split(" ", 2)
            first = socket.create_connection((address, int(port)), EXIT_SECONDS)
            self._add(0, host, first, first.makefile())
            self._send(0, token=token, rank=rank, host=self.host)
        os.register_at_fork(after_in_child=self._close_peers)  # children must not keep them open
        for peer in self._peers:
            threading.Thread(None, self._listen, "lifeline", (peer,), daemon=True).start()

    def _accept(self, world: int, address: str, store: Any) -> None:
        token = secrets.token_hex(16)
        where = "127.0.0.1" if address in ("127.0.0.1", "localhost") else ""
        with socket.create_server((where, 0), backlog=world) as server:
            store.set("lifeline", f"{server.getsockname()[1]} {token} {self.host}")
            while len(self._peers) < world - 1:
                peer, _ = server.accept()
                with suppress(ValueError, KeyError, OSError):  # not a peer of this run
                    peer.settimeout(EXIT_SECONDS)
                    reader = peer.makefile()
                    hello = json.loads(reader.readline())
                    if hello["token"] == token:
                        self._add(hello["rank"], hello["host"], peer, reader)

    def _add(self, rank: int, host: str, peer: socket.socket, reader: TextIO) -> None:
        self._peers[rank], self._hosts[rank], self._readers[rank] = peer, host, reader
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if (option := getattr(socket, name, None)) is not None:
                peer.setsockopt(socket.IPPROTO_TCP, option, value)

    def announce_failure(self, code: int, message: str) -> None:
        """Announces an error of this process. Rank 0 prints the message, unless it fails in the
        same way. Another rank waits until rank 0 ends, because a launcher that sees one process end
        may kill the others first.
        """
        self._ending.set()
        if self.rank == 0:
            with self._lock:
                self._end_others(code)
            return
        if threading.current_thread() is threading.main_thread():
            # a launcher sends SIGTERM after rank 0 has ended
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
        self._send(0, failed=code, told=message)
        self._main_gone.wait(EXIT_SECONDS)

    def wait(self, seconds: float) -> None:
        """Waits for a message from another process, which may end this process."""
        self._ending.wait(seconds)

    def announce_end(self) -> None:
        self._ending.set()
        for peer in self._peers:
            self._send(peer, left=True)

    def _listen(self, peer: int) -> None:
        with suppress(OSError):
            for line in self._readers[peer]:
                message = json.loads(line)
                if "left" in message:
                    self._finished.add(peer)
                elif "over" in message:
                    self._code = message["over"]
                    self._peers[peer].settimeout(EXIT_SECONDS)
                elif not self._ending.wait(SAME_ERROR_SECONDS):
                    self._end(message["failed"], peer, f": {message['told']}")
        if peer == 0:
            self._main_gone.set()
        if peer in self._finished or self._ending.is_set():
            return
        if self._code is not None:
            os._exit(self._code)
        how = "it printed no error; it may have been killed for lack of memory"
        self._end(1, peer, f" died {self.progress()}; {how}" if self.rank <= 1 else "")

    def _end(self, code: int, peer: int, problem: str) -> NoReturn:
        with self._lock:
            if problem:
                line = f"error: rank {peer} on {self._hosts[peer]}{problem}"
                print(line, file=sys.__stderr__, flush=True)
            self._end_others(code)
            os._exit(code)

    def _end_others(self, code: int) -> None:
        if self.rank == 0:
            for peer in self._peers:
                self._send(peer, over=code)

    def _send(self, peer: int, **message: Any) -> None:
        with suppress(OSError):
            self._peers[peer].sendall(json.dumps(message).encode() + b"\n")

    def _close_peers(self) -> None:
        for peer in self._peers.values():
            peer.close()


T = TypeVar("T")
START_TIMEOUT = timedelta(minutes=5)  # for all processes to start
NO_TIMEOUT = timedelta(days=7)  # `Lifeline` detects failures
BUCKET_BYTES = 1 << 26  # bytes per collective call
CAUSE_SECONDS = 3.0  # seconds in which `Lifeline` reports a death that broke a connection
DEFAULT_PORT = 29500  # torch's default
ACCELERATE_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`


@dataclass(eq=False)
class Processes:
    """This process among the `count` processes of a run. `index` is its rank; only the `first`,
    rank 0, writes and prints.
    """

    index: int = 0
    count: int = 1
    lifeline: Lifeline | None = None

    def __post_init__(self) -> None:
        self.first = self.index == 0

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sums tensors, of any shapes and on one device, over all processes, in place."""
        import torch.distributed as dist

        if self.count > 1:
            _apply_flat(tensors, dist.all_reduce)

    def largest(self, number: int) -> int:
        import torch
        import torch.distributed as dist

        if self.count == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def same(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """Replaces tensors, of any shapes and on one device, by those of the process `source`."""
        import torch.distributed as dist

        if self.count > 1:
            _apply_flat(tensors, lambda flat: dist.broadcast(flat, source))

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes by rank. This is also a barrier."""
        import torch.distributed as dist

        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def once(self, compute: Callable[[], T]) -> T:
        """Calls `compute` in rank 0 only, and returns its result in all processes."""
        import torch.distributed as dist

        result = [compute() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(result, 0)
        return result[0]  # type: ignore[return-value]


SINGLE_PROCESS = Processes()


@contextmanager
def process_group(launch: Launch, device: str | None = None) -> Iterator[Processes]:
    """Connects the launched processes in a process group until the block ends. An error in the
    block ends all processes with its exit code, which is 2 for LorafoldError.
    """
    if launch.world == 1:
        yield SINGLE_PROCESS
        return
    import torch
    import torch.distributed as dist

    cuda = device is not None and device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    store, created = _rendezvous(launch), not dist.is_initialized()
    lifeline = Lifeline(launch.rank, launch.world, launch.address, store)
    if created:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world, timeout=NO_TIMEOUT
        )
    try:
        yield Processes(launch.rank, launch.world, lifeline)
    except BaseException as error:
        codes = {LorafoldError: 2, KeyboardInterrupt: 130}
        code = next((n for kind, n in codes.items() if isinstance(error, kind)), 1)
        code = error.code if isinstance(error, Interrupted) else code
        if code == 1:  # the death of another process may be the cause
            lifeline.wait(CAUSE_SECONDS)
        kind = f"{type(error).__name__}: " * (code == 1)
        lifeline.announce_failure(code, f"{kind}{error}")
        raise
    lifeline.announce_end()
    if created:
        dist.destroy_process_group()


def _rendezvous(launch: Launch) -> Any:
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(launch.rank), "WORLD_SIZE": str(launch.world), "MASTER_ADDR": launch.address,
        "LOCAL_RANK": str(launch.local_rank), "MASTER_PORT": str(launch.port),
    }  # fmt: skip
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        number = store.add(f"runs of {launch.rank}", 1)
        store.set_timeout(START_TIMEOUT)
        return dist.PrefixStore(f"lorafold {number}", store)
    except (dist.DistError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:100]
        raise LorafoldError(
            f"rank {launch.rank} of {launch.world}, started by {launch.by}: can't connect to"
            f" rank 0 at {launch.address}:{launch.port} ({first}); start all processes within"
            f" {START_TIMEOUT.seconds // 60} minutes"
        ) from None


def _apply_flat(tensors: Sequence[torch.Tensor], function: Callable[[torch.Tensor], Any]) -> None:
    """Applies an operation to tensors of any shapes in place, many per call."""
    import torch

    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():  # no copy needed
            function(bucket[0].view(-1))
            continue
        flat = torch.cat([t.reshape(-1) for t in bucket])
        function(flat)
        for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(part.view_as(t))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for t in tensors:
        full = bucket and sum(b.nbytes for b in bucket) + t.nbytes > BUCKET_BYTES
        if full or (bucket and bucket[0].dtype != t.dtype):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


@dataclass(frozen=True)
class Launch:
    """The launch of one of `world` processes. `rank` and `local_rank` (on its machine) count from
    0, and rank 0 is at `address`. `by` is the launcher, empty for a single process.
    """

    by: str = ""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# launcher, and its variables for the rank, the number of processes and the rank on the machine
LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def detect_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Reads this process's rank from the launcher's environment variables."""
    number = partial(_number, environment)
    for name, rank_name, world_name, local_name in LAUNCHERS:
        given = rank_name if rank_name in environment else world_name
        if (given if name == "torchrun" else world_name) not in environment:
            continue
        world = number(world_name, given)
        # the script of a SLURM job is a single process in spite of the job's variables
        if world == 1 and name != "torchrun":
            continue
        rank = number(rank_name, given)
        if not 0 <= rank < world:
            raise LorafoldError(
                f"{rank_name}: found {rank}, expected 0 to {world - 1} ({world_name} is {world})"
            )
        if world == 1:
            return Launch()
        local = number(local_name, given, rank if name == "mpirun" else None)
        address, port = environment.get("MASTER_ADDR", ""), DEFAULT_PORT
        if name == "srun":
            nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
            address = address or first_node(nodes or "")
            job, step = (number(f"SLURM_{of}_ID", default=0) for of in ("JOB", "STEP"))
            port = 20000 + (31 * job + step) % 20000
        elif name == "torchrun":
            name = "accelerate launch" if ACCELERATE_VARIABLE in environment else name
            if not address:
                raise LorafoldError(
                    f"MASTER_ADDR: not set, but RANK={rank} is; set it to the address of rank 0"
                )
        port = number("MASTER_PORT", default=port)
        return Launch(name, rank, world, local, address or "127.0.0.1", port)
    if ACCELERATE_VARIABLE in environment and "MASTER_PORT" in environment:
        raise LorafoldError(
            "accelerate launch started only one process, because on CPUs it uses --num_processes"
            " only with mpirun; use torchrun --nproc_per_node N -m lorafold ..., or accelerate"
            " launch with --num_processes 1"
        )
    return Launch()


def first_node(nodes: str) -> str:
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if first is None:
        raise LorafoldError(
            f"SLURM_STEP_NODELIST: found {nodes!r}, expected a list of hosts; set MASTER_ADDR to"
            " the host of rank 0"
        )
    return "".join(part or "" for part in first.groups())


def _number(
    environment: Mapping[str, str], name: str, beside: str = "", default: int | None = None
) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text, re.ASCII):
        where = f" although {beside} is set" if beside else ""
        raise LorafoldError(f"{name}: found {text or 'none'}{where}, expected a number")
    return int(text)
