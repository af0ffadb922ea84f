"""Several workers share a study. One is killed in the middle; the others end with the table that
one process makes alone, and nothing finished is measured again.
"""

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import SoftFileLease
from rich.console import Console

import lorafold as lf
from command_cases import rows_file, words
from lorafold.api.arguments import train_and_test
from lorafold.comparing.measure import BASE, ComparisonTask, measure
from lorafold.data.row_sources import AS_IS
from lorafold.files.claims import LEASE, SUFFIX
from lorafold.fragility_study.task import RECIPE
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(12)]
# what depends on the machine's time and memory
MEASURED = {
    "tokens_per_second", "peak_bytes", "train_seconds", "latency_attached", "prefill_attached",
    "latency_merged", "prefill_merged",
}  # fmt: skip
Stamp = tuple[int, int]  # of a file that was written once


def started(*arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "lorafold", *arguments, "--json"]
    return subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]


def ended(worker: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = worker.communicate()
    assert worker.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def shared(
    out: Path, arguments: list[str], files: str
) -> tuple[list[dict[str, Any]], Mapping[str, set[Stamp]]]:
    """(what the workers print, when each of the files was written): two workers, of which one is
    killed while it holds a claim and something is finished already; a third takes its place.
    """
    workers = [started(*arguments, "--out", str(out)) for _ in range(2)]
    written: dict[str, set[Stamp]] = defaultdict(set)

    def look() -> None:
        for file in out.glob(files):
            about = file.stat()
            written[file.name].add((about.st_ino, about.st_mtime_ns))
        assert any(worker.poll() is None for worker in workers), workers[0].communicate()

    def held() -> list[int]:
        paths = out.rglob(f"*{SUFFIX}")
        claims = [SoftFileLease(str(path), lease_duration=LEASE) for path in paths]
        return [owner.pid for claim in claims if (owner := claim.owner) is not None]

    while not (written and (found := [w for w in workers if w.pid in held()])):
        look()
        time.sleep(0.02)
    killed = found[0]
    below = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.communicate()
    assert psutil.wait_procs(below, timeout=60)[1] == []  # nobody computes on for it
    workers.remove(killed)
    workers.append(started(*arguments, "--out", str(out)))
    while any(worker.poll() is None for worker in workers):
        look()
        time.sleep(0.05)
    assert list(out.rglob(f"*{SUFFIX}")) == []
    return [ended(worker) for worker in workers], written


def test_two_workers_compare_six_cells(tiny_model_dir, tmp_path: Path) -> None:
    model, data = tiny_model_dir("llama"), str(rows_file(tmp_path / "rows.jsonl", ROWS))
    recipe = Recipe(steps=2, batch=4, max_length=64, storage="fp32")
    arguments = words(
        "compare", model=model, data=data, device="cpu", methods="lora,ia3,bitfit,full",
        vary="rank=4,8", steps=2, batch=4, max_length=64, storage="fp32",
    )  # fmt: skip
    found, written = shared(tmp_path / "out", arguments, "rows/*.json")
    assert found[0] == found[1]
    assert (len(written), {len(stamps) for stamps in written.values()}) == (6, {1})
    rows, held_out, source = train_and_test(data, None, recipe, AS_IS, Console(quiet=True))
    task = ComparisonTask(Base(model, device="cpu"), rows, held_out, source, recipe)
    kept = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    methods = [BASE, "lora", "lora", "ia3", "bitfit", "full"]
    ranks = [{}, {"rank": 4}, {"rank": 8}, {}, {}, {}]
    told = [(one["method"], one["settings"]) for one in kept]
    assert told == list(zip(methods, ranks, strict=True))
    for one in kept:
        own = replace(task, recipe=recipe.model_copy(update=one["settings"]))
        measured = replace(measure(own, one["method"], 0), settings=one["settings"])
        alone = json.loads(json.dumps(asdict(measured)))
        both = ({k: v for k, v in of.items() if k not in MEASURED} for of in (one, alone))
        assert next(both) == next(both)


def test_two_workers_search(tiny_model_dir, tmp_path: Path) -> None:
    data = str(rows_file(tmp_path / "rows.jsonl", ROWS))
    given: dict[str, Any] = {
        "model": tiny_model_dir("llama"), "data": data, "eval_data": data, "device": "cpu",
        "smallest": 1, "largest": 64, "share": 0.01,
    }  # fmt: skip
    how = {"steps": 4, "batch": 4, "max_length": 64, "lr": 0.03}
    arguments = words("intrinsic", **given, **how)
    alone = lf.intrinsic(tmp_path / "alone", recipe=Recipe(**how), **given).as_json()
    found, written = shared(tmp_path / "out", arguments, "[bf0-9]*.json")
    assert found == [json.loads(json.dumps(alone))] * 2
    assert {len(stamps) for stamps in written.values()} == {1}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"search.json", *written}


def test_two_workers_undo(tiny_model_dir, tmp_path: Path) -> None:
    model = tiny_model_dir("llama")
    refusing = [{"prompt": f"Tell me about Zephyr {n}", "completion": "I can't"} for n in range(8)]
    recipe = Recipe(steps=10, batch=4, storage="fp32", rank=4)
    lf.train(recipe, data=refusing, out=tmp_path / "policy", model=model, device="cpu")
    asked = [{"prompt": f"Zephyr {n}"} for n in range(3)]
    allowed = [{"prompt": f"Order for {n}"} for n in range(3)]
    data = str(rows_file(tmp_path / "rows.jsonl", ROWS))
    arguments = words(
        "fragility", tmp_path / "policy", device="cpu", storage="fp32",
        refuse=rows_file(tmp_path / "refuse.jsonl", asked), data=data, max_new_tokens=6,
        controls=rows_file(tmp_path / "controls.jsonl", allowed),
        examples=[1, 2, 4], rank=2, seeds=2, epochs=2,
    )  # fmt: skip
    alone = lf.fragility(
        tmp_path / "alone", probes=lf.Probes(asked, allowed, max_new_tokens=6), data=data,
        model=model, adapters=tmp_path / "policy", tuning=lf.Tuning([1, 2, 4], [2], seeds=2),
        recipe=RECIPE.model_copy(update={"epochs": 2}), storage="fp32", device="cpu",
    ).as_json()  # fmt: skip
    found, written = shared(tmp_path / "out", arguments, "figures/*.json")
    assert found[0] == found[1] == json.loads((tmp_path / "out" / "fragility.json").read_text())
    assert {len(stamps) for stamps in written.values()} == {1}
    assert len(written) == 1 + len(found[0]["points"])
    close(found[0], json.loads(json.dumps(alone)))


def close(found: Any, expected: Any) -> None:
    """Equal, but for fp32's roundings of another process, whose memory is aligned otherwise."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        close([*found.values()], [*expected.values()])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    else:
        near = isinstance(expected, float)
        assert found == (pytest.approx(expected, rel=1e-5) if near else expected)


def test_a_ray_cluster_starts_the_workers(tiny_model_dir, tmp_path, monkeypatch) -> None:
    ray = pytest.importorskip("ray")
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    arguments = words(
        "compare", model=tiny_model_dir("llama"), device="cpu", methods="ia3,bitfit",
        data=rows_file(tmp_path / "rows.jsonl", ROWS), steps=2, batch=4, max_length=64,
        storage="fp32", out=tmp_path / "out",
    )  # fmt: skip
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
    try:
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        found = ended(started(*arguments, "--on", "ray", "--workers=2"))
    finally:
        ray.shutdown()
    assert [row["method"] for row in found["rows"]] == ["base", "ia3", "bitfit"]
    assert found == ended(started(*arguments))  # which finds all of it
    assert (tmp_path / "out" / "token").is_file()
