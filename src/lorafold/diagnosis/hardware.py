"""The processor, GPUs and memory, measured for about a second, and what lorafold uses of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorafold.diagnosis.finding import Finding, gigabytes
from lorafold.diagnosis.paths import paths
from lorafold.machine.devices import Gpu


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
    from lorafold.machine.room import free_bytes
    from lorafold.machine.speed import gflops
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
