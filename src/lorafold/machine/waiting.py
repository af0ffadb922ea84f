"""How OpenMP's threads wait for each other: computing on a quiet machine, asleep on a busy one.

A thread that waits actively keeps the one that it waits for from running where others need the
cores, and one that sleeps is slow to wake where they don't. GCC's OpenMP reads its environment once
only, but lets no thread wait actively while a process has more of them than cores. So a thread
looks at the load once a second, and keeps a team of its own for as long as others are busy.
SmolLM2-135M in bf16 on two cores of an AMD EPYC (AVX2), tokens a second of training with threads
that wait actively and asleep: 95 and 56 alone; beside one, two busy processes 32 and 59, 36 and 47.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lorafold.machine.cores import Neighbours, usable_cores
from lorafold.machine.threads import disband, gather

BUSY, QUIET = 0.3, 0.1  # cores that others use: above, below
PAUSE = 1.0  # seconds between two looks
LOOKS = 3  # quiet ones in a row before it counts as quiet

_lock = threading.Lock()
_users = 0
_ended = threading.Event()


@contextmanager
def considerate() -> Iterator[None]:
    """While it lasts, threads wait asleep whenever others are busy. Nothing happens where there is
    one thread, or another OpenMP than GCC's.
    """
    global _users, _ended
    if torch.get_num_threads() == 1:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _ended = threading.Event()
            threading.Thread(target=_watch, args=(_ended,), name="load", daemon=True).start()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _ended.set()


def _watch(ended: threading.Event) -> None:
    neighbours, together, quiet = Neighbours(), False, 0
    while not ended.wait(PAUSE):
        busy = neighbours.look()
        quiet = quiet + 1 if busy < QUIET else 0
        if busy > BUSY and not together:
            together = gather(max(2, usable_cores()))
        elif together and quiet >= LOOKS:
            disband()
            together = False
    disband()
