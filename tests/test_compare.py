"""The comparison on a tiny model: real rows, kept as they finish, and a page that stands alone."""

import json
from pathlib import Path

from lorafold.compare.measure import Task
from lorafold.compare.report import markdown, page
from lorafold.compare.run import compare
from lorafold.train.recipe import Recipe

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(12)]


def test_rows_are_measured_kept_and_shown(tiny_model_dir, tmp_path: Path) -> None:
    task = Task(str(tiny_model_dir("llama")), ROWS, ROWS[:4], "rows", Recipe(steps=3, batch=4, base="fp32", max_length=64), "cpu")
    told: list[str] = []
    rows = compare(task, ["lora", "houlsby", "full"], [0], tmp_path, lambda row, done, total: told.append(f"{row.method} {done}/{total}"))
    assert told == ["lora 1/3", "houlsby 2/3", "full 3/3"]
    lora, houlsby, full = rows
    assert (lora.mergeable, houlsby.mergeable, full.mergeable) == (True, False, True)
    assert (lora.modifies_architecture, houlsby.modifies_architecture) == (False, True)
    assert houlsby.latency_merged is None
    assert full.trainable_share == 1.0
    assert lora.forgetting_kl >= 0
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()}
    assert len(stamps) == 3

    def never(*_: object) -> None:
        raise AssertionError

    import lorafold.compare.run as run

    measured, run.in_own_process = run.in_own_process, never
    try:
        assert compare(task, ["lora", "houlsby", "full"], [0], tmp_path, lambda *_: None) == rows
    finally:
        run.in_own_process = measured
    assert markdown(rows).count("\n") == 5
    page(rows, "Methods <on> rows", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 3
    assert "Methods &lt;on&gt; rows" in text
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3
