"""A real GPU in the place of `shadow.Device`: launches and waits, by the profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shadow import Count

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Card:
    """The card, in the `with` block."""

    def __init__(self) -> None:
        self.count = Count()

    def __enter__(self) -> "Card":
        return self

    def __exit__(self, *_: object) -> None: ...

    @contextmanager
    def counting(self) -> Iterator[Count]:
        """Count afresh until the `with` block ends."""
        self.count = Count()
        profiler: Any = torch.profiler
        kinds = profiler.ProfilerActivity
        torch.cuda.synchronize()
        with profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as seen:
            yield self.count
        for event in seen.key_averages():
            if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
                self.count.launches[event.key] += event.count
            elif event.key in WAITS:
                self.count.synchronizations[event.key] += event.count
