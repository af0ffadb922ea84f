"""`make gpu` goes its way without a GPU: each part, what fails, and both files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def day(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_a_part_runs_on_tensors_that_say_cuda(tmp_path: Path) -> None:
    done = day(tmp_path / "found.h100", "--dry-run", "--only", " launches,launches")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.h100.json").read_text())
    (row,) = found["parts"]["launches"]["rows"]
    assert row["launches a block"] == row["budget"]
    assert sum(row["waits"].values()) == 1
    text = (tmp_path / "found.h100.md").read_text()
    assert text.startswith("# A dry run without a GPU")
    assert f"| {row['run']} | {row['budget']} |" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.h100.json", "found.h100.md"]


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = day(tmp_path / "found")
    assert done.returncode == 2
    assert "found no GPU that torch can use; --dry-run needs none" in done.stderr
    done = day(tmp_path / "found", "--dry-run", "--only", "speeed")
    assert done.returncode == 2
    assert "found speeed, expected of values, launches" in done.stderr
    done = day(tmp_path / "nowhere" / "found", "--dry-run")
    assert done.returncode == 2
    assert "can't be written (No such file or directory)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    done = day(tmp_path / "found", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert len(parts) == 6
    assert all(part["rows"] for part in parts.values())
