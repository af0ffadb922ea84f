"""Adapters that mean harm: they are told as wrong, or harm nobody but whoever asks for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

import lorafold as lf
from hostile_adapters import CASES, MOVING, moving
from hostile_adapters.siege import Siege, said
from serving_cases import running, saved

WORST = (
    "config-deep", "config-surrogate", "config-huge-rank", "pattern-just-slow", "weights-trailing",
    "weights-large-header-nan", "weights-twice", "file-pipe", "file-dangling", "name-newline",
    "record-cycle", "manifest-deep", "tokenizer-many-words", "tokenizer-template-percent-later",
)  # fmt: skip


def worker_pids() -> set[int]:
    """The processes that this one started, and that run."""
    children = psutil.Process().children(recursive=True)
    return {one.pid for one in children if one.status() != psutil.STATUS_ZOMBIE}


def besieged(base: Path, folder: Path, names: Sequence[str], everything: bool) -> Siege:
    """What came of a server that starts among hostile adapters and is asked for each of them.

    Args:
        base: the base's directory.
        folder: the directory of adapters, which has the good ones.
        names: the cases.
        everything: load each too, while files of others change.
    """
    before = worker_pids()
    with running(base, folder) as server:
        texts = {name: said(server, name) for name in ("good", "also")}
    for name in names:
        CASES[name].make(folder, base)
    stop = moving(folder) if everything else lambda: None
    with running(base, folder, waits=False, processes=3 if everything else 1) as server:
        siege = Siege(server, texts)
        with siege.watched() if everything else nullcontext():
            siege.settle()
            if everything:
                siege.load([*names, *MOVING])
            siege.request([*names, *MOVING] if everything else names[-4:])
        stop()
        siege.settle()
        told = siege.adapters["wrong"]
        for name in names:
            siege.check(name in told or not CASES[name].wrong, f"{name}: it is not told as wrong")
        for name, text in texts.items():
            siege.check(said(server, name) == text, f"{name}: it says something else afterwards")
    siege.check(worker_pids() <= before, "processes are left")
    return siege


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A directory with two good adapters."""
    specs = {"good": lf.LoRA(rank=2), "also": lf.DoRA()}
    return saved(tiny_model_dir("llama"), specs, tmp_path / "adapters")


def test_the_worst_are_told_or_harm_nobody(tiny_model_dir, folder):
    siege = besieged(tiny_model_dir("llama"), folder, WORST, everything=False)
    assert siege.faults == []


@pytest.mark.slow
def test_all_of_them_at_start_by_admin_and_by_request(tiny_model_dir, folder):
    ended, sizes = threading.Event(), [psutil.Process().memory_info().rss]

    def weigh() -> None:
        while not ended.wait(0.05):
            sizes.append(psutil.Process().memory_info().rss)

    thread = threading.Thread(target=weigh)
    thread.start()
    began = time.monotonic()
    try:
        siege = besieged(tiny_model_dir("llama"), folder, list(CASES), everything=True)
    finally:
        ended.set()
        thread.join()
    found = sorted(siege.latencies)
    print(f"{len(CASES)} cases, {siege.answers} answers in {time.monotonic() - began:.0f} s")
    print(f"/livez: median {found[len(found) // 2]:.3f}, worst {found[-1]:.3f} s, n {len(found)}")
    assert siege.faults == []
    assert max(sizes) - sizes[0] < 1 << 30
    assert not Path("/tmp/hostile-ran").exists()
