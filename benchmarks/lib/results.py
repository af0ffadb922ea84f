"""Tables of figures, printed and kept beside the scripts."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent.parent / "results"


def machine() -> str:
    """Processor, cores and the versions that count."""
    import os

    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores; {packages}"


def keep(name: str, rows: list[dict[str, object]]) -> None:
    """Print the rows as a Markdown table and write it, with the command and the machine, to results/NAME.md."""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(str(row[k]) for k in head)} |" for row in rows)]
    table = "\n".join(lines)
    print("\n" + table)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    HERE.mkdir(exist_ok=True)
    (HERE / f"{name}.md").write_text(f"`{command}`\n\n{machine()}\n\n{table}\n")
