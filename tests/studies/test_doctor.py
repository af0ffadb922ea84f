"""`lorafold doctor`: missing packages, and what would be slow on a machine that is made up."""


import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafold.doctor import Finding, FindingGroup, run_check
from lorafold.doctor.hardware import Hardware, findings, measure_gflops, slow_settings
from lorafold.doctor.installation import extras, packages, size_of
from lorafold.doctor.report import DoctorReport
from lorafold.files.terminal import WIDTH, format_bytes
from lorafold.runtime.devices import Gpu
from lorafold.runtime.processor import cores_used_by_others, quota, usable_cores

FINE = Hardware(
    processor="a processor", cores=8, threads=8,
    instructions=("AVX2", "AVX512", "AVX512-BF16", "AMX"), busy=0.0, free=30 * 10**9,
    total=32 * 10**9, gpus=(), unused_driver="", device="cuda:0", fp32=20_000.0, bf16=200_000.0,
    native_bf16=True, native_why="it is native", widened=False, kernels=True,
)  # fmt: skip


def sentences(machine: Hardware, pages: str = "madvise", untuned: bool = False, **threads: str):
    return list(slow_settings(machine, pages, threads, untuned))


def test_a_fine_machine_is_slow_at_nothing() -> None:
    assert sentences(FINE) == []


CPU = replace(FINE, device="cpu", fp32=400.0, bf16=800.0)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (CPU,
         "At 800 GFLOP/s a training step of a model of 1B parameters on 1024 tokens takes 5 s"),
        (replace(CPU, widened=True), "At 400 GFLOP/s"),
        (replace(CPU, bf16=100.0, widened=True), "than fp32 matmuls (100 and 400 GFLOP/s)"),
        (replace(CPU, native_bf16=False, native_why="it has none"),
         "because it has none; --quantization auto"),
        (replace(CPU, native_bf16=False), "At 400 GFLOP/s"),
        (replace(CPU, cores=1, threads=1), "Only one core is usable"),
        (replace(CPU, cores=2, threads=2), "Only 2 cores are usable"),
        (replace(CPU, threads=4), "torch uses 4 of 8 usable cores, because of OMP_NUM_THREADS=4"),
        (replace(CPU, busy=1.26), "Other processes keep 1.3 CPU cores busy"),
        (replace(CPU, free=10**9), "Only 1.0 GB of memory is free"),
        (replace(FINE, kernels=False), "bitsandbytes has no native library"),
        (replace(CPU, unused_driver="built without CUDA"), "built without CUDA"),
    ],
)  # fmt: skip
def test_each_shortcoming_has_its_sentence(machine: Hardware, said: str) -> None:
    told = sentences(machine, OMP_NUM_THREADS="4")
    assert any(said in sentence for sentence in told), told
    without = sentences(FINE, OMP_NUM_THREADS="4")
    assert not any(said in sentence for sentence in without)


def test_the_process_and_the_kernel_have_sentences_too() -> None:
    fine = sentences(CPU)
    assert [s for s in sentences(CPU, untuned=True) if s not in fine] == [
        "LORAFOLD_TUNE=off disables huge pages and bounded caches of matmul kernels: unset it."
    ]
    assert "write madvise to" in next(s for s in sentences(CPU, "never") if s not in fine)


def test_what_lorafold_uses_is_told() -> None:
    told = {f.name: f for f in findings(replace(CPU, native_bf16=False, widened=True))}
    assert "--quantization auto keeps weights in fp32" in told["lorafold uses"].text
    assert "multiplied in fp32" in told["lorafold uses"].text
    assert told["lorafold uses"].value["widened"] is True
    assert told["processor"].text == "a processor, 8 usable cores"


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an installed package on the path: its metadata, and a module with that code."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name: str, version: str, code: str = "", **metadata: list[str]) -> None:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        for key, values in metadata.items():
            lines += [f"{key.replace('_', '-')}: {value}" for value in values]
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join([*lines, ""]))
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(code)

    return add


def test_packages_are_held_to_the_ranges_that_are_declared(distribution) -> None:
    distribution("fine-one", "2.0+local")
    distribution("old-one", "0.9")
    distribution("broken-one", "1.0", "raise OSError('libnone.so: no such file\\nand more')")
    distribution("loud-one", "1.0", "import logging; logging.getLogger().warning('look at me')")
    distribution("elsewhere", "1.0")
    required = ["fine-one>=1.5", "old-one<2,>=1", "broken-one", "loud-one", "absent-one>=3"]
    optional = ["elsewhere; sys_platform == 'nowhere'", "extra-one; extra == 'more'"]
    distribution(
        "whole", "7.0", Requires_Python=[">=3.8"], Requires_Dist=required + optional,
        Provides_Extra=["more"],
    )  # fmt: skip
    told = {f.name: f for f in packages("whole")}
    names = ["fine-one", "old-one", "broken-one", "loud-one", "absent-one"]
    assert list(told) == ["whole", "Python", *names]
    assert {n: f.problem for n, f in told.items() if f.problem} == {
        "old-one": "expected <2,>=1; run: pip install 'old-one<2,>=1'",
        "broken-one": (
            "can't be imported (OSError: libnone.so: no such file); run: pip install"
            " 'broken-one' --force-reinstall"
        ),
        "absent-one": "not installed; run: pip install 'absent-one>=3'",
    }
    assert {n for n, f in told.items() if f.broken} == {"old-one", "broken-one", "absent-one"}
    assert told["fine-one"].value["declared"] == ">=1.5"


def test_an_older_python_is_broken(distribution) -> None:
    distribution("whole", "1.0", Requires_Python=[">=99"])
    _, python = packages("whole")
    assert python.broken
    assert "expected Python >=99" in python.problem


def test_optional_groups_are_complete_or_name_what_is_missing(distribution) -> None:
    distribution("here", "1.0")
    wanted = ["here>=1; extra == 'all'", "here>=2; extra == 'newer'", "gone; extra == 'none'"]
    distribution(
        "whole", "1.0", Requires_Dist=["torch", *wanted], Provides_Extra=["all", "newer", "none"]
    )
    told = {f.name: f for f in extras("whole")}
    assert told["all"].text == "here: complete"
    assert told["newer"].problem.startswith("unsupported version: here;")
    assert told["none"].text == "gone: missing gone; run: pip install 'whole[none]'"
    assert not any(f.broken for f in told.values())


def test_what_fails_while_it_is_looked_at_is_a_finding() -> None:
    def look() -> Any:
        yield Finding("first", "fine")
        raise RuntimeError("no\nmore")

    (found,) = run_check("place", look)
    assert (found.problem, found.broken) == ("RuntimeError: no", True)


def test_a_report_marks_problems_and_keeps_its_columns() -> None:
    long = "words " * 60
    fine, wrong = Finding("one", "1.0"), Finding("three", long, problem=long)
    groups = (
        FindingGroup("a", "Compact", (fine, wrong, Finding("two", "2.0")), compact=True),
        FindingGroup("b", "Own lines", (fine, Finding("lorafold's cache", "x", {"bytes": 1}))),
    )
    text = str(DoctorReport(groups, (long,)))
    assert "  one 1.0, two 2.0\n! three  words" in text
    assert text.endswith("\n\n1 problem is marked with ! above; lorafold still works.")
    assert max(map(len, text.splitlines())) <= WIDTH
    told = DoctorReport(groups, ()).as_json()
    assert told["b"] == {"one": "1.0", "lorafold_cache": {"bytes": 1}}
    assert told["problems"] == [f"three: {long}"]
    assert "The machine could not be examined." in str(DoctorReport((), None))


def test_sizes_count_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    size = size_of(tmp_path)
    assert 5 < size < 5000, "the file, and a link's own length"
    assert size_of(tmp_path / "absent") == 0
    expected = ["1.5 GB", "25.0 GB", "3.0 MB", "2.0 kB"]
    assert [format_bytes(n) for n in (1.5e9, 25e9, 3e6, 2e3)] == expected


def test_a_container_s_quota_limits_the_cores(tmp_path: Path) -> None:
    here = usable_cores(tmp_path / "absent")
    no_limit = float("inf")
    for text, expected in {"max 100000": no_limit, "150000 100000": 1.5, "?": no_limit}.items():
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert quota(tmp_path) == expected
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1 <= here


def test_what_is_measured_is_positive_and_soon_over() -> None:
    assert measure_gflops(torch.float32, torch.device("cpu"), seconds=0.01) > 0
    assert cores_used_by_others(0.01) >= 0


def doctor(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command, env = [sys.executable, "-m", "lorafold", "doctor", *arguments], os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_the_command_reports_this_installation_and_exits_with_1_where_it_is_broken(
    tmp_path: Path, distribution
) -> None:
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "weights").write_bytes(b"x" * 1000)
    distribution("gguf", "1.0", "raise ImportError('torn')")
    python = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    own = {"LORAFOLD_CACHE": str(cache), "LORAFOLD_TUNE": "off", "PYTHONPATH": python}
    done = doctor("--json", **own)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert list(told) == [
        "packages", "optional", "machine", "models", "training", "processes", "generating",
        "template", "slow", "problems", "broken",
    ]  # fmt: skip
    assert told["broken"] is True
    torn = "gguf: can't be imported (ImportError: torn)"
    assert any(problem.startswith(torn) for problem in told["problems"])
    assert told["packages"]["torch"]["version"] == torch.__version__
    assert told["models"]["lorafold_cache"]["bytes"] == 1000
    assert min(told["machine"]["products"]["fp32"], told["machine"]["products"]["bf16"]) > 0
    assert told["training"]["environment"]["would_set"] == {}
    assert told["generating"]["operations_of_the_engine"].keys() == {"compiled", "why"}


@pytest.mark.slow
def test_the_report_for_people_has_every_group_and_what_would_be_slow() -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout
    for title in ("Packages", "Machine", "Models and caches", "What is slow on this machine"):
        assert f"{title}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("capability", "found"),
    [
        ((7, 5), ("7.5: weights and matmuls in fp32", "in tiles", "one after the other")),
        ((8, 6), ("8.6: weights and matmuls in bf16", "FlashAttention", "one after the other")),
        ((9, 0), ("9.0: weights and matmuls in bf16", "with FlashAttention", "one grouped matmul")),
        ((12, 0), ("12.0: weights and matmuls in bf16", "with FlashAttention", "one after")),
    ],
)
def test_the_paths_of_a_card_are_named(capability, found) -> None:
    gpu = Gpu("cuda:0", "a card", int(9e9), int(16e9), capability)
    [line] = [f.text for f in findings(replace(FINE, gpus=(gpu,))) if f.name == "path of cuda:0"]
    assert line.startswith("compute capability ")
    assert all(part in line for part in found)
