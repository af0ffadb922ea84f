"""The choice of a model's device, and the devices with native bf16."""

import re
from typing import TYPE_CHECKING, NamedTuple

from lorafold.errors import LorafoldError
from lorafold.runtime.processes import Launch

if TYPE_CHECKING:
    import torch


AMPERE = (8, 0)  # the first compute capability with native bf16


class Gpu(NamedTuple):
    """A GPU, and its memory in bytes (None if it is shared with the host). Only CUDA devices have a
    compute capability.
    """

    device: str
    name: str
    free: int | None
    total: int | None
    capability: tuple[int, int] | None = None


def gpus() -> list[Gpu]:
    import torch

    cuda = torch.cuda
    devices = [
        Gpu(
            f"cuda:{i}", cuda.get_device_name(i), *cuda.mem_get_info(i),
            cuda.get_device_capability(i),
        )
        for i in range(cuda.device_count() if cuda.is_available() else 0)
    ]  # fmt: skip
    return devices + [Gpu("mps", "Apple GPU", None, None)] * torch.backends.mps.is_available()


def choose_device(name: str | None = None, absent: bool = False) -> "torch.device":
    """Returns the named device (cpu, cuda, cuda:1, mps). Without a name, returns CUDA, MPS or the
    CPU, whichever is available first in this order. `absent` allows a device that this machine
    lacks.
    """
    named = isinstance(name, str) and re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name, re.ASCII)
    if name is not None and not named:
        raise LorafoldError(f"device: found {name!r}, expected cpu, cuda, cuda:N or mps")
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    present = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    if name is None:
        return torch.device(present[0])
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else present.count(kind)
    if int(index or 0) >= count and not absent:
        has = ", ".join(present)
        raise LorafoldError(f"device {name}: not available on this machine, which has {has}")
    return torch.device(name)


def device_of_rank(name: str | None, launch: Launch) -> str | None:
    """Returns the device of one of several processes; with CUDA, the GPU whose index is the local
    rank.
    """
    import torch

    if (device := choose_device(name)).type != "cuda":
        return device.type
    if device.index is not None:
        raise LorafoldError(
            f"device {name}: found {launch.world} processes, each of which needs its own GPU; use"
            " cuda, and select GPUs with CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if launch.by == "srun" and count == 1:
        return "cuda:0"  # SLURM may show each process only its own GPU
    if launch.local_rank >= count:
        raise LorafoldError(
            f"device cuda: found {count} GPUs, expected one for each process on this machine (rank"
            f" {launch.rank}, local rank {launch.local_rank}); start fewer, or use --device cpu"
        )
    return f"cuda:{launch.local_rank}"


def native_bf16(device: "torch.device") -> tuple[bool, str]:
    """Returns whether the device has native bf16, and an explanation."""
    import torch

    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        first, its = ("{}.{}".format(*one) for one in (AMPERE, capability))
        return capability >= AMPERE, (
            f"{torch.cuda.get_device_name(device)} has compute capability {its}; bf16 is native"
            f" from {first}"
        )
    if device.type == "cpu":
        # torch.cpu.get_capabilities covers ARM too, but exists only from torch 2.13 on
        unit = "avx512_bf16" * torch.cpu._is_avx512_bf16_supported()
        unit = "AMX" if torch.cpu._is_amx_tile_supported() else unit
        return bool(unit), f"this CPU has {unit or 'neither AMX nor avx512_bf16'}"
    return False, f"bf16 is not native on every {device.type} device"
