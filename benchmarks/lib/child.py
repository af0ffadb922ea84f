"""A piece of work in a process of its own, watched from outside. Linux only."""

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

GO = """
import sys, torch
def resident():
    found = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(found[k].split()[0]) * 1024 for k in ("RssAnon", "VmRSS")]
{imports}
print(*resident(), flush=True)
sys.stdin.readline()
"""


class Watched(NamedTuple):
    """What the work took over what the process held before it: anonymous memory, all that was
    resident (mapped files too), seconds.
    """

    anonymous: int
    resident: int
    seconds: float
    output: str


def watch(imports: str, work: str, *arguments: str) -> Watched:
    """Run `work` (Python, which finds the arguments in sys.argv) after the imports; its memory is
    sampled every millisecond.
    """
    command = [sys.executable, "-c", GO.format(imports=imports) + work, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        before = [int(n) for n in child.stdout.readline().split()]
        child.stdin.write("\n")
        child.stdin.flush()
        start, peak = time.perf_counter(), list(before)
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            lines = dict(
                line.split(":", 1)
                for line in status.read_text().splitlines()
                if line.startswith(("RssAnon", "VmRSS"))
            )
            now = [
                int(lines[k].split()[0]) * 1024 if k in lines else 0 for k in ("RssAnon", "VmRSS")
            ]
            peak = [max(pair) for pair in zip(peak, now, strict=True)]
            time.sleep(0.001)
        seconds = time.perf_counter() - start
        if child.returncode:
            sys.exit(f"{' '.join(arguments)}: the work failed")
        return Watched(peak[0] - before[0], peak[1] - before[1], seconds, child.stdout.read())
