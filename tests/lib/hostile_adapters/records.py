"""Records and manifests: what an adapter lies over, and what its files are said to be."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from hostile_adapters.case import (
    CONFIG,
    GOOD,
    RECORD,
    SLOW,
    WEIGHTS,
    cases,
    config,
    either,
    wrong,
)  # fmt: skip


def record(at: Path, **fields: Any) -> None:
    """Change fields of the record."""
    found = json.loads((at / RECORD).read_text())
    (at / RECORD).write_text(json.dumps(found | fields))


def over(at: Path, below: object, digest: str = "0" * 64, times: int = 1) -> None:
    """Say that an adapter lies over another."""
    record(at, over=[{"adapter": str(below), "sha256": digest}] * times)


ONE = {"shape": [1], "dtype": "float32", "values": "00000000"}
cases("record", {
    "itself": ("An adapter over itself.", lambda at: over(at, at)),
    "digest": ("An adapter over one with another digest.", lambda at: over(at, GOOD, "f" * 64)),
    "elsewhere": (
        "An adapter over files of the machine's.", lambda at: over(at, "../../../../etc")
    ),
    "dots": ("An adapter over the directory above.", lambda at: over(at, "a/..")),
    "many": (
        "An adapter over a hundred thousand others.", lambda at: over(at, GOOD, times=100_000)
    ),
    "deep": (
        "A record nested 100,000 deep.",
        lambda at: (at / RECORD).write_text('{"over":' + "[" * 100_000 + "]" * 100_000 + "}"),
    ),
    "over-text": (
        "A stack that is a text of 4 MB, which an error quotes.",
        lambda at: record(at, over="x" * (4 << 20)),
    ),
    "base": (
        "A fingerprint of a hundred thousand weights.",
        lambda at: record(at, base={f"w{i}": ONE for i in range(100_000)}),
    ),
})  # fmt: skip
cases("manifest", {
    "deep": (
        "A manifest nested 100,000 deep.",
        lambda at: (at / "manifest.json").write_text("[" * 100_000),
    ),
})  # fmt: skip


@wrong
def record_cycle(at: Path) -> None:
    """An adapter over one that lies over it."""
    other = at.with_name(f"{at.name}-2")
    shutil.copytree(at, other)
    over(at, other)
    over(other, at)


@wrong
def record_over_hostile(at: Path) -> None:
    """A good adapter over one whose pattern never ends, by its right digest."""
    below = at.with_name(f"{at.name}-2")
    shutil.copytree(at, below)
    config(below, exclude_modules=SLOW)
    lines = ""
    for name in (CONFIG, WEIGHTS):
        content = (below / name).read_bytes()
        lines += f"{name} {len(content)} {sha256(content).hexdigest()}\n"
    over(at, below, sha256(lines.encode()).hexdigest())


@wrong
def manifest_huge(at: Path) -> None:
    """A manifest of 300 MB."""
    (at / "manifest.json").touch()
    os.truncate(at / "manifest.json", 300 << 20)


@either
def manifest_strange(at: Path) -> None:
    """A manifest whose names and digests are of other types."""
    entry = {"size": "1", "sha256": []}
    (at / "manifest.json").write_text(json.dumps({"files": {"*": entry, "../x": entry}}))
