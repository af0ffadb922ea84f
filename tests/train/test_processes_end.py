"""Processes of one run start, stop and end together, and one line says why."""

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from lorafold.adapter import handle
from lorafold.core.delta import Delta
from lorafold.files.atomic import verify
from lorafold.training import loop
from lorafold.training.checkpoint import RunDirectory
from process_cases import One, apart, begun, ended, free_port, rows, same_bytes, together, well

RUN = ("--device", "cpu", "--set", "storage=fp32", "--set", "batch=8")
LONG = ("--set", "steps=40", "--set", "dropout=0.1", "--set", "save_every=50")
SECONDS = 30  # in which all end after one died


@pytest.fixture(scope="module")
def command(tiny_model_dir, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run but for its length and its directory."""
    data = rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    return ("train", "--model", str(tiny_model_dir("llama-wide")), "--data", str(data), *RUN)


def the_line(done: list[One], code: int) -> str:
    """What a run is refused or ended by, said once."""
    assert [one.code for one in done] == [code] * len(done), [one.stderr for one in done]
    [line] = [x for one in done for x in one.stderr.splitlines() if x.startswith("error: ")]
    assert len(line) < 300
    assert not any(one.stdout for one in done)
    return line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--data", "{other}", "--set", "alpha=3"), "found the rows: "),
        (("--data", "none.jsonl"), "none.jsonl: there is no such file"),
        (("--set", "seed=3"), "seed: 3 (rank 0: 0)"),
    ],
)
def test_a_process_that_differs_is_refused_by_all(given, said, command, tmp_path) -> None:
    at, other = command.index("--data"), rows(tmp_path / "other.jsonl", 24)
    shared, data = (*command[:at], *command[at + 2 :]), command[at : at + 2]

    def own(rank: int) -> dict:
        theirs = tuple(text.format(other=other) for text in given)
        return {"arguments": (data if "--data" not in theirs else ()) + theirs if rank else data}

    done = together(2, tmp_path, *shared, "--out", str(tmp_path / "out"), own=own)
    line = the_line(done, 2)
    assert said in line
    assert "rank 1 on " in line
    assert not [*tmp_path.glob("out*")]


def test_a_batch_that_does_not_divide(command: tuple[str, ...], tmp_path: Path) -> None:
    done = together(3, tmp_path, *command, "--out", str(tmp_path / "out"))
    assert "batch 8 can't be split over 3 processes" in the_line(done, 2)


def in_step(number: int, do: object) -> object:
    """What a process calls before it begins, so that it does something in that step."""

    def before() -> None:
        step = loop.train_step

        def doing(plan: loop.Plan, examples: list, i: int) -> float:
            if i == number:
                do()  # type: ignore[operator]
            return step(plan, examples, i)

        loop.train_step = doing  # type: ignore[assignment]

    return before


def signalled(number: int) -> object:
    return lambda: os.kill(os.getpid(), number)


def reading(folder: Path) -> Callable[[int], dict]:
    """Has each process of a run note the bytes that it takes from a checkpoint's adapter."""

    def own(rank: int) -> dict:
        def before() -> None:
            put, file, read = handle.set_tensor, folder / f"read {rank}", 0

            def noted(delta: Delta, name: str, value: Tensor) -> None:
                nonlocal read
                read += value.nbytes
                file.write_text(str(read))
                put(delta, name, value)

            handle.set_tensor = noted

        return {"before": before}

    return own


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        ("--set", "dropout=0.1"),
        ("--set", "dropout=0.1", "--strategy", "fsdp"),
        ("--method", "full", "--strategy", "fsdp"),
    ],
    ids=["lora", "lora, divided", "full, divided"],
)
@pytest.mark.parametrize(("count", "others"), [(2, (1,)), (4, (2, 1))])
def test_a_signal_to_one_stops_all_and_they_resume(count, others, asked, command, tmp_path) -> None:
    """Byte for byte as one that was not stopped, and by another number to rounding."""
    command = (*command, "--set", "steps=7", *asked)
    whole, stopped = tmp_path / "whole", tmp_path / str(count)
    well(count, tmp_path, *command, "--out", str(whole))

    def stopping(rank: int) -> dict:
        return {"before": in_step(3, signalled(signal.SIGTERM))} if rank == count - 1 else {}

    run = RunDirectory(stopped)
    done = together(count, tmp_path, *command, "--out", str(stopped), own=stopping)
    assert [one.code for one in done] == [143] * count
    assert "stopped after step 4; " in done[0].stderr
    assert not done[-1].stderr
    last = max(run.checkpoints())
    assert (last, verify(run.path_of(last))) == (4, [])
    size = (run.path_of(last) / "adapter.safetensors").stat().st_size
    for n in others:
        shutil.copytree(run.path, RunDirectory(tmp_path / str(n)).path)
    for n in (count, *others):
        out = tmp_path / str(n)
        asked = (*command, "--out", str(out), "--resume")
        well(n, tmp_path, *asked, own=reading(tmp_path))
        assert apart(whole, out) < 1e-5
        read = [int((tmp_path / f"read {rank}").read_text()) for rank in range(n)]
        if n > 1 and "full" in asked:  # each reads what it owns, and what is small
            assert max(read) < 0.7 * size
            assert sum(read) < 1.3 * size
    assert same_bytes(whole, stopped)


@pytest.mark.slow
def test_a_file_system_that_is_not_shared(command: tuple[str, ...], tmp_path: Path) -> None:
    """On two machines the directory of the run to resume may be two of one name."""

    def stopping(rank: int) -> dict:
        return {"before": in_step(2, signalled(signal.SIGTERM))}

    run, (here, there, empty) = (*command, "--set", "steps=4"), map(tmp_path.joinpath, "abc")
    together(1, tmp_path, *run, "--set", "save_every=1", "--out", str(here), own=stopping)
    shutil.copytree(RunDirectory(here).path, RunDirectory(there).path)
    shutil.rmtree(RunDirectory(there).path_of(3))
    for other, seen in ((there, "step 2 ("), (empty, "none")):

        def own(rank: int, other: Path = other) -> dict:
            return {"arguments": ("--out", str((here, other)[rank]))}

        line = the_line(together(2, tmp_path, *run, "--resume", own=own), 2)
        assert f"the run to resume: {seen}" in line
        assert "step 3 (" in line
    well(2, tmp_path, *run, "--resume", "--out", str(here))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_all(rank: int, command: tuple[str, ...], tmp_path: Path) -> None:
    def dying(number: int) -> dict:
        return {"before": in_step(4, signalled(signal.SIGKILL))} if number == rank else {}

    run = (*command, "--set", "steps=50", "--set", "save_every=3", "--out", str(tmp_path / "out"))
    done = ended(begun(3, tmp_path, *run, "--set", "batch=9", own=dying), 60)
    assert [one.code for n, one in enumerate(done) if n != rank] == [1, 1]
    lines = [x for one in done for x in one.stderr.splitlines() if x.startswith("error: ")]
    [line] = lines
    assert f"rank {rank} on " in line
    assert "died in step 5; " in line
    assert "step-000003" in line


@pytest.mark.slow
def test_one_that_fails_says_why_through_the_first(command, tmp_path) -> None:
    def fail() -> None:
        raise MemoryError("no room for 3 GB")

    def failing(rank: int) -> dict:
        return {"before": in_step(2, fail)} if rank else {}

    run = (*command, "--set", "steps=9", "--out", str(tmp_path / "out"))
    done = together(2, tmp_path, *run, own=failing)
    assert [one.code for one in done] == [1, 1]
    assert "rank 1 on " in done[0].stderr
    assert "MemoryError: no room for 3 GB" in done[0].stderr


def test_one_run_at_a_time(command: tuple[str, ...], tmp_path: Path) -> None:
    run = (*command, "--set", "steps=500", "--out", str(tmp_path / "out"))
    first = begun(1, tmp_path, *run)
    until = time.monotonic() + 60
    while not (tmp_path / "out.run").exists() and time.monotonic() < until:
        time.sleep(0.05)
    [other] = together(1, tmp_path, *run, "--overwrite")
    os.kill(first[0].process.pid or 0, signal.SIGTERM)
    ended(first)
    assert other.code == 2
    pid = first[0].process.pid
    assert (
        f"a run is in progress in this directory (process {pid} on {socket.gethostname()} since "
        in other.stderr
    )
    assert first[0].code == 143
    assert RunDirectory(tmp_path / "out").checkpoints()
    assert not (tmp_path / ".out.run.lock").exists()


def srun(rank: int, count: int, job: int) -> dict[str, str]:
    """What srun leaves in the environment of a task."""
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
    }  # fmt: skip


@pytest.mark.slow
def test_tasks_of_srun_are_one_run(command: tuple[str, ...], tmp_path: Path) -> None:
    tasks = [srun(n, 2, free_port()) for n in range(2)]
    tasks[1]["SLURM_JOB_ID"] = tasks[0]["SLURM_JOB_ID"]
    run = (*command, "--set", "steps=2", "--set", "eval_fraction=0.2", "--json")
    done = well(2, tmp_path, *run, "--out", str(tmp_path / "out"), environments=tasks)
    assert len(done[0].stdout.splitlines()) == 1
    assert done[0].stderr.count("step 2: held-out") == 1
    assert done[1].stdout == done[1].stderr == ""


def test_a_launcher_that_starts_one_of_several(command: tuple[str, ...], tmp_path: Path) -> None:
    left = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    run = (*command, "--set", "steps=2", "--out", str(tmp_path / "out"))
    assert "accelerate launch started only one process" in the_line(
        together(1, tmp_path, *run, environments=[left]), 2
    )


def test_a_command_for_one_process(tmp_path: Path) -> None:
    done = together(2, tmp_path, "merge", "adapter", "--out", str(tmp_path / "out"))
    assert "lorafold merge: torchrun started 2 processes, expected one;" in the_line(done, 2)


@pytest.mark.slow
def test_thirty_signals_and_ten_deaths(command: tuple[str, ...], tmp_path: Path) -> None:
    """At any moment after the first step; none hangs, and each that was stopped resumes."""
    draw, run = random.Random(0), (*command, *LONG)
    together(2, tmp_path, *run, "--out", str(tmp_path / "whole"))
    for n in range(40):
        out, number = tmp_path / str(n), signal.SIGTERM if n < 30 else signal.SIGKILL
        pair = begun(2, tmp_path, *run, "--out", str(out))
        while "step 4/40" not in pair[0].stderr if pair[0].told.exists() else True:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        os.kill(pair[draw.randrange(2)].process.pid or 0, number)
        codes = {one.code for one in ended(pair, SECONDS)}
        if number == signal.SIGKILL:
            assert codes == {-signal.SIGKILL, 1}
            continue
        assert codes == {143}
        well(2, tmp_path, *run, "--out", str(out), "--resume")
        assert same_bytes(tmp_path / "whole", out)
