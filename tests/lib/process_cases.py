"""Commands in several processes at once, as a launcher starts them: forks, whose imports are done.

    done = together(2, tmp_path, "train", "--data", ...)       each as it ended, by its number
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from training_cases import beginning

WORDS = (
    *("copper", "lantern", "friday", "eight", "table", "four", "plumber"),
    *("alarm", "fox", "dog", "rain", "mountain", "book"),
)
LONG = 240  # seconds after which processes count as hung, on a machine that others use too


@dataclass(frozen=True)
class One:
    process: BaseProcess
    told: Path
    printed: Path

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    @property
    def stderr(self) -> str:
        return self.told.read_text()

    @property
    def stdout(self) -> str:
        return self.printed.read_text()


def rows(path: Path, n: int = 32, kind: str = "sft") -> Path:
    """A file of rows of many lengths, some of which begin alike."""

    def words(start: int, count: int, step: int = 1) -> str:
        return " ".join(WORDS[(start + step * j) % len(WORDS)] for j in range(count))

    with path.open("w") as file:
        for i in range(n):
            row = {"prompt": f"{words(i // 4, 3 + (5 * i) % 7)} ="}
            if kind == "dpo":
                row |= {"chosen": f" {words(3 * i, 2 + i % 4)}", "rejected": f" {words(i, 3, 5)}"}
            elif kind != "grpo":
                row |= {"completion": f" {words(3 * i, 2 + i % 6)}"}
            if kind == "kto":
                row |= {"label": i % 3 > 0}
            file.write(json.dumps(row) + "\n")
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _run(
    told: Path, printed: Path, environment: dict[str, str], before: Callable[[], object] | None,
    arguments: Sequence[str],
) -> None:  # fmt: skip
    for path, fd in ((printed, 1), (told, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    sys.__stderr__ = sys.stderr
    os.environ |= environment | {"LORAFOLD_TUNE": "off"}
    sys.argv = ["lorafold", *arguments]
    if before is not None:
        before()
    from lorafold.cli import main

    main()


def begun(
    n: int, folder: Path, *arguments: str, own: Callable[[int], dict[str, Any]] = lambda rank: {},
    environments: Sequence[dict[str, str]] = (),
) -> list[One]:  # fmt: skip
    """Start n processes of a command, which print into files of a folder.

    Args:
        own: `arguments` and `environment` that one has besides, and what it calls `before`.
        environments: As another launcher leaves them.
    """
    port, found = free_port(), []
    for rank in range(n):
        mine, file = own(rank), folder / f"{time.monotonic_ns()}-{rank}"
        environment = environments[rank] if environments else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        environment = environment | mine.get("environment", {})
        told, printed = file.with_suffix(".err"), file.with_suffix(".out")
        called = (*arguments, *mine.get("arguments", ()))
        process = beginning(_run, told, printed, environment, mine.get("before"), called)
        found.append(One(process, told, printed))
    return found


def ended(processes: Sequence[One], seconds: float = LONG) -> list[One]:
    """The processes once all have ended; those that hang are killed, and that is an error."""
    until = time.monotonic() + seconds
    for one in processes:
        one.process.join(max(0.0, until - time.monotonic()))
    if hung := [i for i, one in enumerate(processes) if one.process.is_alive()]:
        for one in processes:
            one.process.kill()
        raise AssertionError(f"hung: {hung}; " + "; ".join(one.stderr[-300:] for one in processes))
    return list(processes)


def together(n: int, folder: Path, *arguments: str, **how: Any) -> list[One]:
    return ended(begun(n, folder, *arguments, **how))


def well(n: int, folder: Path, *arguments: str, **how: Any) -> list[One]:
    """The processes of a command, all of which ended well."""
    found = together(n, folder, *arguments, **how)
    assert [one.code for one in found] == [0] * n, found[0].stderr
    return found


def apart(one: Path, other: Path, but: str = "nothing") -> float:
    """The largest relative difference between tensors of two adapters or models, but for those
    whose names have `but` in them.
    """
    a, b = (
        {k: t for path in sorted(of.glob("*.safetensors")) for k, t in load_file(path).items()}
        for of in (one, other)
    )
    assert a.keys() == b.keys()
    assert a
    sizes = {k: t.double().norm().clamp_min(1e-12) for k, t in a.items() if but not in k}
    gaps = {k: (a[k].double() - b[k].double()).norm() for k in sizes}  # positions are integers
    return max(float(gaps[k] / size) for k, size in sizes.items())


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.glob("*.safetensors"))
    assert names
    return all((one / n).read_bytes() == (other / n).read_bytes() for n in names)
