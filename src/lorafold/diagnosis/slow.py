"""What would be slow on this machine, and why, in plain sentences with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorafold.diagnosis.finding import gigabytes
from lorafold.diagnosis.hardware import Hardware
from lorafold.models.storages import MADE

FEW_CORES = 4
BUSY = 0.5  # cores
LITTLE_MEMORY = 4e9  # bytes: the embedded model trains in 1.5 GB, a model of 1B in NF4 in some 3 GB
PARAMETERS, TOKENS = 1e9, 1024  # of the example
FLOPS = 4  # a parameter and token of a LoRA step: 2 forward, 2 for the gradient of the inputs


def slow(
    h: Hardware, pages: str | None, threads: Mapping[str, str], untuned: bool
) -> Iterator[str]:
    """The sentences that hold here, the weightiest first.

    Args:
        pages: To whom the kernel gives huge pages: always, madvise or never, or None.
        threads: The environment variables that limit threads.
        untuned: Is the tuning of training processes switched off?
    """
    on_processor = h.device == "cpu"
    if h.unused_driver:
        yield (
            f"There is a driver for NVIDIA GPUs, but {h.unused_driver}, so models run on the"
            " processor: install the build of torch that https://pytorch.org/get-started names for"
            " this driver."
        )
    if on_processor:
        seconds = FLOPS * PARAMETERS * TOKENS / (h.rate * 1e9)
        yield (
            f"Models run on the processor. At {h.rate:.0f} GFLOP/s a training step of a model of 1B"
            f" parameters on {TOKENS} tokens takes {seconds:.0f} s or more: choose a small model,"
            " or a machine with a GPU."
        )
        yield from _on_processor(h, pages, threads, untuned)
    if not h.native_bf16:
        yield (
            f"The storage bf16 saves memory here and no time, as {h.native_why}; --storage auto"
            " takes fp32."
        )
    if h.kernels is False:
        yield (
            "bitsandbytes has no native library for this machine, so the storages"
            f" {' and '.join(MADE)} are"
            " unpacked by slower code: reinstall it (pip install --force-reinstall --no-deps"
            " bitsandbytes), or take --storage bf16 or fp32."
        )
    if on_processor and h.free < LITTLE_MEMORY:
        yield (
            f"Only {gigabytes(h.free)} of memory are free: end other programs, and see with"
            " lorafold estimate what fits."
        )


def _on_processor(
    h: Hardware, pages: str | None, threads: Mapping[str, str], untuned: bool
) -> Iterator[str]:
    if h.busy > BUSY:
        yield (
            f"Other processes keep {h.busy:.1f} of the processor's cores busy. lorafold shares the"
            " cores with them, as did the products that were measured: end them, or wait."
        )
    if h.threads < h.cores:
        limits = " and ".join(f"{name}={value}" for name, value in threads.items())
        yield (
            f"torch uses {h.threads} of {h.cores} usable cores"
            + (f", as {limits} says: unset that." if limits else ".")
        )
    elif h.cores < FEW_CORES:
        cores = "one core is" if h.cores == 1 else f"{h.cores} cores are"
        yield f"Only {cores} usable: with twice as many a step takes about half the time."
    if h.widened:
        relation = "slower than" if h.bf16 < h.fp32 else "hardly faster than"
        yield (
            f"bf16 products are {relation} fp32 ones here ({h.bf16:.0f} and {h.fp32:.0f}"
            " GFLOP/s), so 16-bit weights are multiplied in fp32, widened at each use."
        )
    if untuned:
        yield "LORAFOLD_TUNE=off keeps training from huge pages and short waits: unset it."
    if pages == "never":
        yield (
            "The kernel gives no huge pages, with which a step takes 0.88 of the time: let an"
            " administrator write madvise to /sys/kernel/mm/transparent_hugepage/enabled."
        )
