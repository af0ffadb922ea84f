"""Tables of figures, printed and kept beside the scripts."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from lib.short import is_short

HERE = Path(__file__).parent.parent / "results"


def processor() -> str:
    """The processor, with the matrix units that decide which dtype is fast."""
    about = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().replace("\t", "").splitlines()
        if ":" in line
    )
    flags = about.get("flags", "").split()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512"}
    units = next((unit for flag, unit in known.items() if flag in flags), "without AVX-512")
    return f"{about.get('model name', platform.machine()).strip()} ({units})"


def commit() -> str:
    """The commit that is measured; a plus sign marks changes that are not in it."""
    git = ["git", "describe", "--always", "--abbrev=10", "--dirty=+"]
    done = subprocess.run(git, cwd=HERE.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def cells(rows: Sequence[dict]) -> list[list[str]]:
    """The columns of rows that may lack some, and below them the rows; floats with three digits."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in head] for row in rows]
    lines = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in values]
    return [head, *lines]


def markdown(rows: Sequence[dict]) -> str:
    head, *lines = cells(rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def written(runs: Sequence[dict]) -> str:
    """Runs as JSON with one line for each row of a table and for the versions."""
    text = json.dumps(runs, indent=1, ensure_ascii=False)
    word = r'"(?:[^"\\]|\\.)*"'
    flat = re.compile(rf"([\[{{])\s+({word}(?:[,:]\s+{word})*)\s+([\]}}])")
    return flat.sub(lambda f: f[1] + re.sub(r"\n +", " ", f[2]) + f[3], text) + "\n"


def keep(name: str, *tables: Sequence[dict], dtypes: str) -> None:
    """Print tables and write them to results/NAME.json with the command, the commit, the date, the
    machine and the dtypes. They replace the tables of the same command and processor. A short form
    only prints.
    """
    print("\n" + "\n\n".join(map(markdown, tables)))
    if is_short():
        return
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    run = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "dtypes": dtypes,
        "versions": {package: version(package) for package in packages},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "date": str(date.today()),
        "tables": [{"columns": head, "rows": rows} for head, *rows in map(cells, tables)],
    }
    HERE.mkdir(exist_ok=True)
    file = HERE / f"{name}.json"
    runs = json.loads(file.read_text()) if file.exists() else []
    same = [all(other.get(key) == run[key] for key in ("processor", "command")) for other in runs]
    others = [other for other, replaced in zip(runs, same, strict=True) if not replaced]
    file.write_text(written([run, *others]))
