"""Records and manifests: what an adapter lies over, and what its files are said to be."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from hostile_adapters.case import CONFIG, GOOD, RECORD, SLOW, WEIGHTS, config, either, wrong


def record(at: Path, **fields: Any) -> None:
    """Change fields of the record."""
    found = json.loads((at / RECORD).read_text())
    (at / RECORD).write_text(json.dumps(found | fields))


@wrong
def record_cycle(at: Path) -> None:
    """An adapter over one that lies over it."""
    other = at.with_name(f"{at.name}-2")
    shutil.copytree(at, other)
    record(at, over=[{"adapter": str(other), "sha256": "0" * 64}])
    record(other, over=[{"adapter": str(at), "sha256": "0" * 64}])


@wrong
def record_itself(at: Path) -> None:
    """An adapter over itself."""
    record(at, over=[{"adapter": str(at), "sha256": "0" * 64}])


@wrong
def record_digest(at: Path) -> None:
    """An adapter over one with another digest."""
    record(at, over=[{"adapter": GOOD, "sha256": "f" * 64}])


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
    digest = sha256(lines.encode()).hexdigest()
    record(at, over=[{"adapter": str(below), "sha256": digest}])


@wrong
def record_elsewhere(at: Path) -> None:
    """An adapter over files of the machine's."""
    record(at, over=[{"adapter": "../../../../etc", "sha256": "0" * 64}])


@wrong
def record_dots(at: Path) -> None:
    """An adapter over the directory above."""
    record(at, over=[{"adapter": "a/..", "sha256": "0" * 64}])


@wrong
def record_many(at: Path) -> None:
    """An adapter over a hundred thousand others."""
    record(at, over=[{"adapter": GOOD, "sha256": "0" * 64}] * 100_000)


@wrong
def record_deep(at: Path) -> None:
    """A record nested 100,000 deep."""
    (at / RECORD).write_text('{"over":' + "[" * 100_000 + "]" * 100_000 + "}")


@wrong
def record_over_text(at: Path) -> None:
    """A stack that is a text of 4 MB, which an error quotes."""
    record(at, over="x" * (4 << 20))


@wrong
def record_base(at: Path) -> None:
    """A fingerprint of a hundred thousand weights."""
    one = {"shape": [1], "dtype": "float32", "values": "00000000"}
    record(at, base={f"w{i}": one for i in range(100_000)})


@wrong
def manifest_deep(at: Path) -> None:
    """A manifest nested 100,000 deep."""
    (at / "manifest.json").write_text("[" * 100_000)


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
