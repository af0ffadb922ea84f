"""The processor, GPUs and memory, measured for about a second, and what lorafold uses of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafold.diagnosis.finding import Finding, gigabytes
from lorafold.kernels.table import TRAINING, use
from lorafold.machine.devices import AMPERE, Gpu
from lorafold.ops.demands import FLASH, Place, as_on, groups_at_once, takes

if TYPE_CHECKING:
    import torch

SHAPE = (1024, 576, 1536)  # rows, in, out: an MLP's product of the embedded model
GPU_SHAPE = (4096, 4096, 4096)


def gflops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """The rate of a product x W^T, in GFLOP/s.

    It is that of the fastest product, since other processes can only slow one down.

    Args:
        dtype: The dtype of x (rows, in) and W (out, in).
        device: Where it is computed; a GPU gets larger matrices (`GPU_SHAPE`).
        seconds: How long products are timed, after one to warm up.
    """
    import torch

    rows, width, out = SHAPE if device.type == "cpu" else GPU_SHAPE
    x = torch.ones(rows, width, dtype=dtype, device=device)
    w = torch.ones(out, width, dtype=dtype, device=device)
    fastest, end = float("inf"), 0.0
    with torch.inference_mode():
        torch.nn.functional.linear(x, w)[0, 0].item()
        begin = time.perf_counter()
        while end < begin + seconds:
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)[0, 0].item()  # a GPU has finished once it answers
            end = time.perf_counter()
            fastest = min(fastest, end - start)
    return 2 * rows * width * out / fastest / 1e9


def paths(capability: tuple[int, int]) -> str:
    """What such a card computes with, as a line.

    Args:
        capability: Its compute capability, major and minor.
    """
    native = capability >= AMPERE
    x = torch.empty(1, FLASH.head_unit, dtype=torch.bfloat16 if native else torch.float32)
    with as_on(Place("cuda", capability)):
        flash, at_once = takes(FLASH, x, x), groups_at_once(x)
    missing = use(TRAINING, "cuda")
    parts = (
        f"weights and products in {'bf16' if native else 'fp32'}",
        f"attention of packed rows {'by flash attention' if flash else 'in tiles of plain torch'}",
        f"experts {'in one product' if at_once else 'one after the other'}",
        f"dropout and gains in {f'plain torch ({missing})' if missing else 'Triton'}",
    )
    return f"compute capability {'.'.join(map(str, capability))}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Hardware:
    """What was found. Memory is in bytes, rates in GFLOP/s on `device`, the one that lorafold
    chooses where none is named.
    """

    processor: str
    cores: int  # that this process may use
    threads: int  # that torch uses
    instructions: tuple[str, ...]
    busy: float  # cores that other processes keep busy
    free: int
    total: int
    gpus: tuple[Gpu, ...]
    unused_driver: str  # why torch uses no GPU although there is a driver for one; else empty
    device: str
    fp32: float
    bf16: float
    native_bf16: bool
    native_why: str
    widened: bool  # are 16-bit matrices multiplied in fp32?
    kernels: bool | None  # has bitsandbytes a library for this machine? None: it is not there

    @property
    def rate(self) -> float:
        """GFLOP/s in the numbers that lorafold computes in with `--storage auto`."""
        return self.fp32 if self.widened or not self.native_bf16 else self.bf16


def examine() -> Hardware:
    """Look at this machine, and measure for about a second."""
    import psutil
    import torch

    from lorafold.machine.cores import (
        busy_elsewhere,
        instruction_sets,
        processor_name,
        usable_cores,
    )
    from lorafold.machine.devices import choose_device, gpus, native_bf16
    from lorafold.machine.memory import free_bytes
    from lorafold.ops.arithmetic import CPU, widens

    device = choose_device()
    busy = busy_elsewhere(0.3)  # before anything is measured, which would count
    native, why = native_bf16(device)
    return Hardware(
        processor=processor_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        instructions=instruction_sets(),
        busy=busy,
        free=free_bytes(CPU),
        total=psutil.virtual_memory().total,
        gpus=tuple(gpus()),
        unused_driver=_unused_driver(),
        device=str(device),
        fp32=gflops(torch.float32, device),
        bf16=gflops(torch.bfloat16, device),
        native_bf16=native,
        native_why=why,
        widened=widens(torch.bfloat16, device),
        kernels=_has_kernels(),
    )


def findings(h: Hardware) -> Iterator[Finding]:
    """The machine as findings, one a line of the report."""
    sets = ", ".join(h.instructions) or "none of AVX2, AVX512, AMX"
    cores = "core" if h.cores == 1 else "cores"
    yield Finding("processor", f"{h.processor}, {h.cores} usable {cores}", h.processor)
    yield Finding("instructions", sets, list(h.instructions))
    memory = f"{gigabytes(h.free)} free of {gigabytes(h.total)}"
    yield Finding("memory", memory, {"free": h.free, "total": h.total})
    shown = "; ".join(
        f"{gpu.device} {gpu.name}"
        + (f", {gigabytes(gpu.free)} free of {gigabytes(gpu.total or 0)}" if gpu.free else "")
        for gpu in h.gpus
    )
    yield Finding("GPUs", shown or "none that torch can use", [gpu._asdict() for gpu in h.gpus])
    for gpu in h.gpus:
        if gpu.capability:
            yield Finding(f"path of {gpu.device}", paths(gpu.capability))
    rates = f"fp32 {h.fp32:.0f} GFLOP/s, bf16 {h.bf16:.0f} GFLOP/s on {h.device}"
    yield Finding("products", rates, {"device": h.device, "fp32": h.fp32, "bf16": h.bf16})
    storage = "bf16" if h.native_bf16 else "fp32"
    how = "in fp32" if h.widened else "as they are"
    yield Finding(
        "lorafold uses",
        f"{h.device}; --storage auto holds weights in {storage}, as {h.native_why}; 16-bit matrices"
        f" are multiplied {how}",
        {"device": h.device, "storage": storage, "widened": h.widened, "cores": h.cores},
    )


def _unused_driver() -> str:
    import torch

    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if not driver or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can't use the driver"


def _has_kernels() -> bool | None:
    from lorafold.bases.bitsandbytes import bitsandbytes

    try:
        library = bitsandbytes().cextension.lib
    except Exception:  # the list of packages says what is wrong with it
        return None
    return "_lib" in vars(library)  # what stands in for a missing library has none
