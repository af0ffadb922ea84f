"""The identity of code: the sources of the rooms that make a thing, and of the packages below."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (".py", ".cpp", ".h")
# The rooms that train a model or measure one, with all that they import.
TRAINING = (
    *("adapter", "bases", "core", "data", "engine", "evaluation", "fold", "generation", "kernels"),
    *("machine", "memory", "methods", "models", "objectives", "opening", "ops", "peft", "recipe"),
    *("rewards", "step", "training"),
)
COMPUTED_WITH = ("torch", "transformers")


@cache
def of_code(*rooms: str, packages: tuple[str, ...] = ()) -> str:
    """The SHA-256 of everything that is computed with: all sources in these rooms, in hexadecimal.

    Args:
        *rooms: packages or modules of lorafold, such as `data`.
        packages: installed packages whose version matters, such as `torch`.
    """
    found = sha256()
    for room in sorted(rooms):
        there = ROOT / room
        files = sorted(there.rglob("*")) if there.is_dir() else [there.with_suffix(".py")]
        for file in files:
            if file.suffix in SOURCES:
                content = file.read_bytes()
                found.update(f"{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
                found.update(content)
    for package in sorted(packages):
        found.update(f"{package} {version(package)}\n".encode())
    return found.hexdigest()
