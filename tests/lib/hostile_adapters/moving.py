"""Adapters whose files change all the time."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile_adapters.case import CONFIG, GOOD, RECORD, WEIGHTS

MOVING = ("moving-weights", "moving-config", "moving-gone", "moving-pipe")


def moving(folder: Path) -> Callable[[], None]:
    """Adapters whose files change all the time from now on; what is returned ends that."""
    for name in MOVING:
        shutil.copytree(folder / GOOD, folder / name)
        (folder / name / "manifest.json").unlink()
    ended = threading.Event()
    thread = threading.Thread(target=_move, args=(folder, ended), daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join()

    return stop


def _move(folder: Path, ended: threading.Event) -> None:
    for change in _changes(folder):
        change()
        if ended.wait(0.003):
            return


def _changes(folder: Path) -> Iterator[Callable[[], object]]:
    good = {name: (folder / GOOD / name).read_bytes() for name in (CONFIG, WEIGHTS, RECORD)}
    bad = {
        WEIGHTS: good[WEIGHTS][:-200] + b"\xff" * 200,
        CONFIG: good[CONFIG].replace(b'"r": 2', b'"r": 99999999'),
    }
    gone, pipe = folder / "moving-gone", folder / "moving-pipe" / RECORD

    def as_pipe() -> None:
        pipe.unlink()
        os.mkfifo(pipe)

    def as_file() -> None:
        pipe.unlink()
        pipe.write_bytes(good[RECORD])

    while True:
        for name, moved in ((WEIGHTS, "moving-weights"), (CONFIG, "moving-config")):
            for content in (bad[name], good[name]):
                yield lambda at=folder / moved / name, content=content: at.write_bytes(content)
        yield (gone / CONFIG).unlink
        yield lambda: (gone / CONFIG).write_bytes(good[CONFIG])
        yield as_pipe
        yield as_file
