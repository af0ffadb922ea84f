"""A command that runs to its end: what it says, how long it takes and how much it holds. Linux
only.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

COUNTED = [sys.executable, "-m", "lib.work"]  # lorafold, its work in its JSON


def paths() -> str:
    """PYTHONPATH of a process that finds `lib`."""
    own, before = str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")
    return os.pathsep.join([own, *filter(None, [before])])


def own_cache(folder: Path) -> str:
    """A cache of lorafold in a folder, with nothing but the operators that are compiled once on a
    machine.
    """
    from lorafold.files.paths import cache_directory

    compiled = cache_directory() / "native"
    compiled.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    if not (folder / "native").exists():
        (folder / "native").symlink_to(compiled)
    return str(folder)


class Finished(NamedTuple):
    """The JSON object of the last line, what stood on standard error, seconds, peak bytes."""

    said: dict[str, Any]
    told: str
    seconds: float
    peak_bytes: int


def finished(command: list[str], **environment: str) -> Finished:
    """Run a command; ends this program where it fails."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as told,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            env=os.environ | {"PYTHONPATH": paths()} | environment,
        ) as child,  # fmt: skip
    ):
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        text = told.read()
    seconds = time.perf_counter() - start
    if child.returncode:
        sys.exit(f"{' '.join(command)}: exit code {child.returncode}\n{text[-2000:]}")
    return Finished(
        json.loads(said.strip().splitlines()[-1]), text, seconds, usage.ru_maxrss * 1024
    )
