"""`--on`: what it refuses, and the command that it starts elsewhere."""

import sys
from pathlib import Path

import pytest

from conftest import refused
from lorafold.cli.cluster import without_cluster_options, worker_resources


@pytest.mark.parametrize("verb", ["compare", "intrinsic"])
def test_other_clusters_are_refused(verb: str, tmp_path: Path) -> None:
    told = refused(verb, "--out", str(tmp_path / "out"), "--on", "slurm")
    assert told == "error: --on: found slurm, expected ray\n"
    assert not (tmp_path / "out").exists()


def test_workers_need_a_directory() -> None:
    told = refused("fragility", "--refuse", "r", "--controls", "c", "--on", "ray")
    assert "--on: found no --out" in told


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    told = refused("compare", "--out", str(tmp_path / "out"), "--on", "ray")
    assert told == "error: --on ray: found no ray, expected it; install lorafold[ray]\n"
    assert not (tmp_path / "out").exists()


def test_a_worker_gets_the_command_without_where_it_runs() -> None:
    asked = ["compare", "--on", "ray", "--out", "o", "--workers=3", "--workers", "2", "--json"]
    assert without_cluster_options(asked) == ["compare", "--out", "o", "--json"]
    asked = ["compare", "--on=ray", "--seeds", "2"]
    assert without_cluster_options(asked) == ["compare", "--seeds", "2"]


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], 2, {"num_cpus": 4, "num_gpus": 0}),
        ([{"CPU": 8.0, "GPU": 4.0}], 4, {"num_cpus": 2, "num_gpus": 1}),
        ([{"CPU": 2.0}], 4, {"num_cpus": 1, "num_gpus": 0}),
    ],
)
def test_a_worker_asks_for_what_every_node_has(nodes, workers: int, expected) -> None:
    gone = {"Alive": False, "Resources": {"CPU": 1.0}}
    alive = [{"Alive": True, "Resources": n} for n in nodes]
    assert worker_resources([gone, *alive], workers) == expected
