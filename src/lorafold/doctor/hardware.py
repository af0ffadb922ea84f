"""Checks of processor, GPUs and memory (in about a second), slow settings, launchers, and compiled
operations.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from lorafold.doctor import Finding
from lorafold.doctor.installation import set_threads
from lorafold.errors import LorafoldError
from lorafold.files.templates import render_text
from lorafold.files.terminal import format_bytes
from lorafold.kernels.registry import DECODING, TRAINING, enable
from lorafold.models.quantizations import ON_LOAD
from lorafold.ops.arithmetic import CPU, widens
from lorafold.ops.attention import FLASH_HEAD_UNIT, flash_supports
from lorafold.ops.grouped import groups_at_once
from lorafold.runtime.assumed_device import DeviceKind, assume_device
from lorafold.runtime.devices import AMPERE, Gpu, choose_device, gpus, native_bf16
from lorafold.runtime.memory import free_bytes
from lorafold.runtime.process_tuning import SWITCH, huge_pages
from lorafold.runtime.processes import detect_launch
from lorafold.runtime.processor import (
    cores_used_by_others,
    instruction_sets,
    processor_name,
    usable_cores,
)

SHAPE = (1024, 576, 1536)  # (rows, in, out) of a matmul in the embedded model's MLP
GPU_SHAPE = (4096, 4096, 4096)
FEW_CORES = 4
BUSY_CORES = 0.5  # cores
LOW_MEMORY = 4e9  # bytes: the embedded model trains in 1.5 GB, a 1B model in NF4 in about 3 GB
PARAMETERS, TOKENS = 1e9, 1024  # of the model and step in the message about the CPU
FLOPS = 4  # per parameter and token of a LoRA step: 2 forward, 2 for the inputs' gradient
HF_HOME = "~/.cache/huggingface"
CONFIG = "accelerate/default_config.yaml"


def measure_gflops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """Measures the matmul x W^T of x (rows, in) and W (out, in) in GFLOP/s, as the fastest of
    several runs, because other processes can only slow a run down.
    """
    rows, width, out = SHAPE if device.type == "cpu" else GPU_SHAPE
    x = torch.ones(rows, width, dtype=dtype, device=device)
    w = torch.ones(out, width, dtype=dtype, device=device)
    fastest, end = float("inf"), 0.0
    with torch.inference_mode():
        torch.nn.functional.linear(x, w)[0, 0].item()
        last = time.perf_counter() + seconds
        while end < last:
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)[0, 0].item()  # .item() waits for a GPU
            end = time.perf_counter()
            fastest = min(fastest, end - start)
    return 2 * rows * width * out / fastest / 1e9


def code_paths(capability: tuple[int, int]) -> str:
    native = capability >= AMPERE
    x = torch.empty(1, FLASH_HEAD_UNIT, dtype=torch.bfloat16 if native else torch.float32)
    with assume_device(DeviceKind("cuda", capability)):
        flash, at_once = flash_supports(x, x), groups_at_once(x)
    missing = enable(TRAINING, "cuda")
    parts = (
        f"weights and matmuls in {'bf16' if native else 'fp32'}",
        f"attention of packed rows {'with FlashAttention' if flash else 'in tiles in plain torch'}",
        f"experts {'in one grouped matmul' if at_once else 'one after the other'}",
        f"dropout and scaling in {f'plain torch ({missing})' if missing else 'Triton'}",
    )
    return f"compute capability {'.'.join(map(str, capability))}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Hardware:
    """This machine. Memory is in bytes; `fp32` and `bf16` are GFLOP/s on the default `device`."""

    processor: str
    cores: int  # usable by this process
    threads: int  # used by torch
    instructions: tuple[str, ...]
    busy: float  # cores used by other processes
    free: int
    total: int
    gpus: tuple[Gpu, ...]
    unused_driver: str  # the reason why torch can't use a GPU with a driver; empty if it can
    device: str
    fp32: float
    bf16: float
    native_bf16: bool
    native_why: str
    widened: bool  # whether 16-bit matrices are multiplied in fp32
    kernels: bool | None  # whether bitsandbytes has a native library; None: not installed

    @property
    def rate(self) -> float:
        return self.fp32 if self.widened or not self.native_bf16 else self.bf16


@cache
def examine() -> Hardware:
    device = choose_device()
    busy = cores_used_by_others(0.3)  # first, because measuring matmuls is load too
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
        fp32=measure_gflops(torch.float32, device),
        bf16=measure_gflops(torch.bfloat16, device),
        native_bf16=native,
        native_why=why,
        widened=widens(torch.bfloat16, device),
        kernels=_has_kernels(),
    )


def machine() -> Iterator[Finding]:
    yield from findings(examine())


def findings(h: Hardware) -> Iterator[Finding]:
    sets = ", ".join(h.instructions) or "none of AVX2, AVX512, AMX"
    cores = "core" if h.cores == 1 else "cores"
    yield Finding("processor", f"{h.processor}, {h.cores} usable {cores}", h.processor)
    yield Finding("instructions", sets, list(h.instructions))
    memory = f"{format_bytes(h.free)} free of {format_bytes(h.total)}"
    yield Finding("memory", memory, {"free": h.free, "total": h.total})
    shown = "; ".join(
        f"{gpu.device} {gpu.name}"
        + (f", {format_bytes(gpu.free)} free of {format_bytes(gpu.total or 0)}" if gpu.free else "")
        for gpu in h.gpus
    )
    yield Finding("GPUs", shown or "none that torch can use", [gpu._asdict() for gpu in h.gpus])
    for gpu in h.gpus:
        if gpu.capability:
            yield Finding(f"path of {gpu.device}", code_paths(gpu.capability))
    rates = f"matmuls: {h.fp32:.0f} GFLOP/s in fp32, {h.bf16:.0f} in bf16, on {h.device}"
    yield Finding("products", rates, {"device": h.device, "fp32": h.fp32, "bf16": h.bf16})
    storage = "bf16" if h.native_bf16 else "fp32"
    how = "in fp32" if h.widened else "without conversion"
    yield Finding(
        "lorafold uses",
        f"{h.device}; --quantization auto keeps weights in {storage}, because {h.native_why};"
        f" 16-bit matrices are multiplied {how}",
        {"device": h.device, "storage": storage, "widened": h.widened, "cores": h.cores},
    )


def _unused_driver() -> str:
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if not driver or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can't use the driver"


def _has_kernels() -> bool | None:
    from lorafold.layers.bitsandbytes import import_bitsandbytes

    try:
        library = import_bitsandbytes().cextension.lib
    except Exception:  # reported with the packages
        return None
    return "_lib" in vars(library)  # the stub for a missing library lacks it


def slow_here() -> Sequence[str]:
    return slow_settings(examine(), huge_pages(), set_threads(), os.environ.get(SWITCH) == "off")


def slow_settings(
    h: Hardware, pages: str | None, threads: Mapping[str, str], untuned: bool
) -> Sequence[str]:
    """Returns a sentence for each slow setting, the most important first. `pages` is the kernel's
    setting for huge pages (always, madvise or never), `threads` contains the environment variables
    that limit threads, and `untuned` means that the tuning of training processes is off.
    """
    return render_text(
        "doctor/slow.jinja", machine=h, pages=pages, threads=threads, untuned=untuned,
        cpu=h.device == "cpu", busy=h.busy > BUSY_CORES, few_cores=h.cores < FEW_CORES,
        low_memory=h.free < LOW_MEMORY, on_load=ON_LOAD, tokens=TOKENS,
        seconds=FLOPS * PARAMETERS * TOKENS / (h.rate * 1e9),
    ).splitlines()  # fmt: skip


def launchers() -> Iterator[Finding]:
    """Yields the launcher of this process, and how many processes torchrun, accelerate and srun
    start.
    """
    yield _this_process()
    cuda = [gpu for gpu in gpus() if gpu.device.startswith("cuda")]
    where = f"one per GPU ({len(cuda)} available)" if cuda else "all on the CPU"
    auto = len(cuda) or usable_cores()
    yield Finding("torchrun", f"--nproc_per_node N starts N, {where}; auto starts {auto}", auto)
    yield _accelerate(len(cuda))
    tasks = os.environ.get("SLURM_NTASKS")
    text = "not in a Slurm job" if tasks is None else f"{tasks} tasks in this job; -n N starts N"
    yield Finding("srun", text, tasks and int(tasks))


def _this_process() -> Finding:
    try:
        launch = detect_launch()
    except LorafoldError as error:
        return Finding("this process", "incomplete settings of a launcher", problem=str(error))
    if launch.world == 1:
        return Finding("this process", "a single process, without a launcher", 1)
    at = f"started by {launch.by}; rank 0 is at {launch.address}:{launch.port}"
    return Finding("this process", f"rank {launch.rank} of {launch.world}, {at}", launch.world)


def _accelerate(cuda: int) -> Finding:
    """On CPUs, accelerate starts one process, regardless of --num_processes, except with mpirun."""
    if not cuda:
        return Finding("accelerate launch", "starts 1 on CPUs, regardless of --num_processes", 1)
    file = Path(os.environ.get("HF_HOME", HF_HOME)).expanduser() / CONFIG
    try:
        num_processes = yaml.safe_load(file.read_text())["num_processes"]
        text = f"starts {num_processes}, from {file}"
    except (OSError, TypeError, KeyError, yaml.YAMLError):
        num_processes, text = cuda, f"starts {cuda}, without a configuration"
    return Finding("accelerate launch", f"{text}; --num_processes N starts N", num_processes)


def engine() -> Iterator[Finding]:
    for what, operations in {"the engine": DECODING, "training": TRAINING}.items():
        why = enable(operations)
        text = f"in plain torch, because they can't be compiled: {why}" if why else "compiled"
        yield Finding(f"operations of {what}", text, {"compiled": not why, "why": why})


def template(model: str, **model_options: Any) -> Iterator[Finding]:
    """Checks a model's chat template; `model_options` are fields of `Base`."""
    from lorafold.data.row_checks import describe_template
    from lorafold.resolve.base import Base

    tokenizer = Base(model, **model_options).tokenizer()
    if tokenizer.chat_template is None:
        yield Finding("template", "none: a plain one is used (### User: / ### Assistant:)", "")
        return
    summary = describe_template(tokenizer)
    yield Finding("template", "; ".join(summary.lines), asdict(summary))
