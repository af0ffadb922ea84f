"""Tables of figures, printed and kept beside the scripts."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lib.short import is_short

HERE = Path(__file__).parent.parent / "results"


def machine() -> str:
    """Processor with what it multiplies in, cores, and the versions that count."""
    about = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().replace("\t", "").splitlines()
        if ":" in line
    )
    names = [about["model name"].strip()] if "model name" in about else []
    flags = about.get("flags", "").split()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512"}
    units = next((told for flag, told in known.items() if flag in flags), "without AVX-512")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    name = names[0] if names else platform.machine()
    return f"{name} ({units}), {os.cpu_count()} cores; {packages}"


def markdown(rows: Sequence[dict]) -> str:
    """Rows that may lack columns as a table; floats with three digits."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [
            f"{v:.3g}" if isinstance(v, float) else str(v)
            for v in (row.get(name, "") for name in head)
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))


def keep(name: str, *tables: Sequence[dict]) -> None:
    """Print tables and write them, with the command, to results/NAME.md: under this machine's
    heading, beside what others measured. A short form prints alone.
    """
    text = "\n\n".join(map(markdown, tables))
    print("\n" + text)
    if is_short():
        return
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    HERE.mkdir(exist_ok=True)
    file, title = HERE / f"{name}.md", machine()
    sections = file.read_text().split("## ")[1:] if file.exists() else []
    others = [section for section in sections if not section.startswith(title.split(";")[0])]
    file.write_text(
        "\n\n".join(
            f"## {section.strip()}" for section in (f"{title}\n\n`{command}`\n\n{text}", *others)
        )
        + "\n"
    )
