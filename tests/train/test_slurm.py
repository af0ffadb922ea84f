"""SLURM starts the processes of a run and ends them: srun and sbatch, a cluster of one machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafold.training.checkpoint import RunDirectory
from process_cases import apart, free_port, rows, same_bytes

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"
absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(absent), reason=f"slurm-wlm is not installed: {', '.join(absent)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts as root alone"),
]
WAIT = 600  # seconds after which a job counts as hung


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find it."""
    at, name = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    (key := at / "key").write_bytes(os.urandom(64))
    key.chmod(0o400)
    for folder in (*at.parents[:2], at):
        folder.chmod(0o755)
    (conf := at / "slurm.conf").write_text(
        f"""
        ClusterName=here
        SlurmctldHost={name}(127.0.0.1)
        SlurmctldPort={free_port()}
        SlurmdPort={free_port()}
        AuthType=auth/munge
        AuthInfo=socket={at}/munge
        CredType=cred/munge
        MpiDefault=none
        ReturnToService=2
        SlurmUser=root
        StateSaveLocation={at}
        SlurmdSpoolDir={at}
        SlurmctldPidFile={at}/slurmctld.pid
        SlurmdPidFile={at}/slurmd.pid
        ProctrackType=proctrack/pgid
        TaskPlugin=task/none
        SelectType=select/linear
        SlurmdParameters=config_overrides
        NodeName={name} NodeAddr=127.0.0.1 CPUs=4
        PartitionName=all Nodes=ALL Default=YES
        """
    )
    own = [f"--{what}={at}/munged.{what[:3]}" for what in ("log-file", "pid-file", "seed-file")]
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": PATH}
    started = [
        subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        for command in (
            ["munged", "-F", "--force", f"--socket={at}/munge", f"--key-file={key}", *own],
            ["slurmctld", "-D", "-f", conf],
            ["slurmd", "-D", "-f", conf, "-N", name],
        )
        if (log := (at / f"{command[0]}.said").open("w"))
    ]
    try:
        until = time.monotonic() + WAIT
        asked = ["sinfo", "--noheader", "--format", "%T"]
        while said(environment, *asked).strip() != "idle" and time.monotonic() < until:
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def said(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT)
    return done.stdout


def asked(model: Path, folder: Path, steps: int) -> list[str]:
    """A run but for its directory."""
    data = rows(folder / "rows.jsonl")
    run = [sys.executable, "-m", "lorafold", "train", "--model", str(model), "--data", str(data)]
    settings = ("storage=fp32", "batch=8", "dropout=0.1", f"steps={steps}", "save_every=5")
    return [*run, "--device", "cpu", *(x for s in settings for x in ("--set", s))]


def test_srun_starts_one_run(cluster, tiny_model_dir, tmp_path) -> None:
    command = asked(tiny_model_dir("llama-wide"), tmp_path, 4)
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([*command, "--out", str(one)], check=True, timeout=WAIT)
    done = subprocess.run(
        ["srun", "-n", "2", "--overcommit", *command, "--out", str(two), "--json"],
        env=cluster, capture_output=True, text=True, timeout=WAIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert apart(one, two) < 1e-5


def test_a_job_that_is_stopped_goes_on_if_sent_again(cluster, tiny_model_dir, tmp_path) -> None:
    command = asked(tiny_model_dir("llama-wide"), tmp_path, 60)
    whole, again = tmp_path / "whole", tmp_path / "again"
    start = ["srun", "-n", "2", "--overcommit", "--kill-on-bad-exit"]
    done = subprocess.run([*start, *command, "--out", str(whole)], env=cluster, timeout=WAIT)
    assert done.returncode == 0
    script = tmp_path / "job.sh"
    line = " ".join([*start, *command, "--out", str(again), "--resume"])
    script.write_text(f"#!/bin/sh\nexec {line}\n")
    send = ["sbatch", "--parsable", "--ntasks=2", "--overcommit", f"--output={tmp_path}/said"]
    number = said(cluster, *send, str(script)).strip()
    until = time.monotonic() + WAIT
    while not RunDirectory(again).checkpoints() and time.monotonic() < until:
        time.sleep(0.05)
    said(cluster, "scancel", "--signal=TERM", number)
    assert "stopped after step" in when_done(cluster, number, tmp_path / "said")
    assert not again.exists()
    number = said(cluster, *send, str(script)).strip()
    assert "resuming after step" in when_done(cluster, number, tmp_path / "said")
    assert same_bytes(whole, again)


def when_done(cluster: dict[str, str], number: str, file: Path) -> str:
    """What a job has said, when it has ended."""
    until = time.monotonic() + WAIT
    while said(cluster, "squeue", "--noheader", "--jobs", number).strip():
        assert time.monotonic() < until, file.read_text()
        time.sleep(0.5)
    return file.read_text()
