"""Runs a command on a Ray cluster (`--on ray`). The workers divide the work through a shared
directory (`files.claims`), and each prints the complete table, of which one is returned.
"""

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.files.atomic import check_folder, write_text
from lorafold.files.claims import TOKEN, VARIABLE


def run_and_collect(on: str, workers: int, out: Path | None) -> str:
    if on != "ray":
        raise LorafoldError(f"--on: found {on}, expected ray")
    if out is None:
        raise LorafoldError("--on: found no --out, expected a directory that the workers share")
    check_folder(out)
    return on_ray(without_cluster_options(sys.argv[1:]), out, workers)


def without_cluster_options(arguments: Sequence[str]) -> list[str]:
    others, rest = [], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in ("--on", "--workers"):
            others.append(argument)
        elif not equals:
            next(rest, None)
    return others


def on_ray(arguments: Sequence[str], out: Path, workers: int) -> str:
    try:
        import ray
    except ImportError:
        raise LorafoldError("--on ray: ray is not installed; install lorafold[ray]") from None
    try:
        ray.init(address="auto", logging_level="warning")
    except ConnectionError:
        raise LorafoldError(
            "--on ray: found no running Ray cluster on this machine or at RAY_ADDRESS; start one"
            " with `ray start --head`"
        ) from None
    out.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(16)
    write_text(out / TOKEN, token)
    start = ray.remote(worker).options(
        scheduling_strategy="SPREAD", **worker_resources(ray.nodes(), workers)
    )
    started = [start.remote(arguments, os.getcwd(), {VARIABLE: token}) for _ in range(workers)]
    results = []
    for task in started:
        try:
            results.append(ray.get(task))
        except ray.exceptions.RayError as error:
            results.append((1, ""))
            print(f"--on ray: a worker failed: {type(error).__name__}", file=sys.stderr)
    ray.shutdown()
    tables = [text for code, text in results if code == 0]
    if failed := len(results) - len(tables):
        message = f"--on ray: {failed} of {workers} workers failed; their messages are above"
        if not tables:
            raise LorafoldError(message)
        print(f"{message}; the other workers completed the work", file=sys.stderr)
    return tables[0].rstrip("\n")


def worker_resources(nodes: Sequence[Mapping[str, Any]], workers: int) -> dict[str, float]:
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cores = int(min((node.get("CPU", 0) for node in resources), default=0))
    workers_per_node = -(-workers // max(1, len(resources)))
    gpu = any(node.get("GPU", 0) >= 1 for node in resources)
    return {"num_cpus": max(1, cores // workers_per_node), "num_gpus": 1 if gpu else 0}


def worker(
    arguments: Sequence[str], folder: str, environment: Mapping[str, str]
) -> tuple[int, str]:
    command = [sys.executable, "-m", "lorafold", *arguments]
    process = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    return process.returncode, process.stdout
