"""How threads wait for each other: asleep while other processes are busy, else actively."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from lorafold.runtime import processor as waiting
from lorafold.runtime.processor import OtherLoad, create_team, end_team, sleep_if_busy

SPIN = "while True: pass"


@contextmanager
def busy(n: int) -> Iterator[None]:
    """So many processes that compute without end."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def threads() -> int:
    return psutil.Process().num_threads()


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within some seconds."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_what_others_compute_is_counted() -> None:
    neighbours = OtherLoad()
    with busy(1):
        time.sleep(1.0)
    assert neighbours.cores_used() > 0.2


def test_a_team_is_gathered_and_disbanded() -> None:
    def team() -> None:
        before = threads()
        found.append(create_team(3) is False or threads() == before + 2)
        end_team()
        found.append(soon(lambda: threads() == before))

    found: list[bool] = []
    thread = threading.Thread(target=team)
    thread.start()
    thread.join()
    assert found == [True, True]


PROGRAM = """
import sys, time
import torch
from lorafold.runtime import processor as waiting
from psutil import Process

waiting.PAUSE, waiting.usable_cores = 0.2, lambda: 2
torch.ones(1 << 20).add_(1)  # its own team
threads = Process().num_threads

def told(expected):
    end = time.monotonic() + 20
    while threads() - before != expected and time.monotonic() < end:
        time.sleep(0.02)
    print(threads() - before, flush=True)

print("ready", flush=True)
input()
before = threads()
with waiting.sleep_if_busy():
    with waiting.sleep_if_busy():
        told(2)  # the one that looks, and its team
    told(2)
told(0)
"""


def test_beside_busy_processes_a_team_lies_there_and_goes_with_the_last_user() -> None:
    """In a process of its own, whose threads are counted."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with busy(2):
            out, wrong = program.communicate("\n")
    assert out.split() == ["2", "2", "0"], wrong


def test_one_thread_waits_for_nobody() -> None:
    before = threads()
    with sleep_if_busy():
        assert threads() == before


@pytest.mark.parametrize("load", [0.05, 0.2, 0.9])
def test_it_begins_above_and_ends_below(load: float, monkeypatch) -> None:
    """Between the two nothing changes, so that a load that wavers changes nothing either."""
    seen: list[str] = []
    looks = iter([0.2, 0.9, load, load, load, load])

    class Told:
        def cores_used(self) -> float:
            return next(looks)

    class Ended:
        left = 6

        def wait(self, _: float) -> bool:
            self.left -= 1
            return self.left < 0

    monkeypatch.setattr(waiting, "OtherLoad", Told)
    monkeypatch.setattr(waiting, "create_team", lambda n: not seen.append("gather"))
    monkeypatch.setattr(waiting, "end_team", lambda: seen.append("disband"))
    waiting._adapt_team(Ended())  # type: ignore[arg-type]
    assert seen == ["gather", "disband"] + ["disband"] * (load < 0.1)
