"""Everything that waits for a GPU, in one go: values, launches, memory, speed, many adapters.

    python benchmarks/gpu.py [--only launches,speed] [--out gpu-results] [--dry-run | --short]

Each part is a process of its own with a limit of its own, and one that fails does not stop the
rest. The results are two files, OUT.json and OUT.md, with the card, its driver and the versions;
they are written after each part. Nothing is downloaded. `--dry-run` takes the same way without a
GPU: what looks at values, launches and waits runs on tensors that say they are on one, the rest on
the CPU, all of it tiny.

    values      the tests of devices: each method, storage and layout against the CPU
    launches    kernels of a block and waits of a step, beside the budgets of the tests
    memory      the peak of a run beside its estimate
    speed       a step beside PEFT's, in turn: SmolLM2 and eight blocks of Llama-3.1-8B's shape;
                Unsloth's and vLLM's rows say whether they are installed
    longest     the longest row that one step of LoRA, checkpointed, takes
    adapters    tokens a second of 16 streams under 16 adapters over those of the base alone
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lib.finished import finished
from lib.results import markdown
from lib.work import same_work

ROOT = Path(__file__).parent.parent
LIMIT = 480  # seconds of a part
Row = dict[str, Any]


def run(*command: str, **environment: str) -> str:
    """What a command prints. Raises RuntimeError with its last lines if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError("; ".join(done.stdout.strip().splitlines()[-3:]))
    return done.stdout


def lorafold(*arguments: str) -> Row:
    """The JSON that a command of lorafold ends with."""
    return finished([sys.executable, "-m", "lorafold", *arguments, "--json"]).said


def values(dry: bool) -> Iterator[Row]:
    some = ["-k", "layouts", "-m", "not slow"] if dry else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/devices"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        try:
            run(*command, *some, f"--junitxml={report}", SHADOW_DEVICE="1")
        except RuntimeError:
            if not report.exists():
                raise
        text = report.read_text()
    numbers = {n: int(v) for n, v in re.findall(r'(tests|failures|errors|skipped)="(\d+)"', text)}
    yield numbers
    for name in re.findall(r'name="([^"]+)"[^>]*><(?:failure|error)', text):
        yield {"failed": name}


def on_shadows() -> None:
    """Let the tests' models be found, on a machine without a GPU as tensors that say cuda:0."""
    sys.path += [str(ROOT / "tests" / "lib"), str(ROOT / "tests" / "devices")]
    import device_guard  # noqa: F401  (before torch)
    import shadow

    shadow.pretend()


def launches(dry: bool) -> Iterator[Row]:
    on_shadows()
    from test_shadow_step import BUDGETS

    from device_cases import llama

    for name, (case, budget) in list(BUDGETS.items())[: 1 if dry else None]:
        counts = []
        for blocks in (1, 2):
            case.config = llama(blocks)
            counts.append(case.on(True).count)
        block = counts[1].launches.total() - counts[0].launches.total()
        waits = counts[1].synchronizations
        yield {"run": name, "launches a block": block, "budget": budget, "waits": dict(waits)}


def memory(dry: bool) -> Iterator[Row]:
    from lorafold.quickstart.task import rows

    settings = {
        "LoRA": [], "DoRA": ["--method", "dora"], "QLoRA": ["--storage", "nf4"],
        "full": ["--method", "full"], "8k tokens": ["--max-length", "8192"],
    }  # fmt: skip
    device = "cpu" if dry else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "rows.jsonl"), str(Path(folder, "out"))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows("train", 200, 0)))
        common = ["--model", "smollm2", "--data", str(data), "--device", device]
        common += ["--batch", "1" if dry else "16"]
        for name, options in list(settings.items())[: 1 if dry else None]:
            expected = lorafold("estimate", *common, *options)["total"]
            steps = ["--steps", "1" if dry else "5"]
            run_options = [*common, *options, *steps, "--out", out, "--overwrite"]
            found = lorafold("train", *run_options)["peak_bytes"]
            yield {
                "run": name, "estimate (MB)": expected / 1e6, "measured (MB)": found / 1e6,
                "estimate over measured": expected / found,
            }  # fmt: skip


def speed(dry: bool) -> Iterator[Row]:
    peers = [sys.executable, "benchmarks/peers.py"]
    small = ["--rounds", "1", "--batch", "1", "--length", "32", "--settings", "lora"]
    sizes = {
        "smollm2": ["--batch", "16", "--length", "1024", "--device", "cuda"],
        "llama8": ["--batch", "1", "--length", "4096", "--device", "cuda", "--shape", "llama8"],
    }
    for name, size in {"smollm2": small}.items() if dry else sizes.items():
        for rank in ("16",) if dry else ("16", "32"):
            command = [*peers, *size, "--rank", rank, "--no-keep"]
            if not dry:
                command += ["--settings", "lora-dropout,lora,nf4-dropout,nf4", "--rounds", "5"]
            for line in run(*command).splitlines():
                if line.startswith("{"):
                    row = json.loads(line)
                    sides = {side: row.pop(side) for side in ("lorafold", "peft")}
                    yield {
                        "model": name, "rank": rank, **row,
                        "tokens/s": sides["lorafold"]["tokens_per_second"],
                        "matmul share": sides["lorafold"]["of_floor"],
                        "peak (MB)": sides["lorafold"]["peak_bytes"] / 1e6,
                    }  # fmt: skip
    for peer in ("unsloth", "vllm"):
        yield {"peer": peer, "installed": installed(peer) or "no, so it was not measured"}


def longest(dry: bool) -> Iterator[Row]:
    import torch
    from lib.worker import Case

    length, device = 32 if dry else 4096, "cpu" if dry else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        model = "smollm2"
        if not dry:
            from lib.shapes import llama8

            llama8(Path(folder))
            model = folder
        while not dry or length <= 64:
            case = Case(1, length, model=model, dropout=0.05, recompute=True, device=device)
            row: Row = {"tokens of a row": length}
            try:
                row["seconds"] = one_step(case)
                if not dry:
                    row["peak (MB)"] = torch.cuda.max_memory_allocated() / 1e6
            except torch.OutOfMemoryError:
                yield row | {"fits": "no"}
                return
            yield row | {"fits": "yes"}
            length *= 2


def one_step(case: Any) -> float:
    """The seconds of a step of lorafold, a first one left out."""
    from contextlib import ExitStack

    from lib.worker import lorafold as training_of
    from lib.worker import now

    with ExitStack() as stack:
        training = training_of(case, stack)
        for _ in range(2):
            start = now(case.device)
            training.loss().backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
        return now(case.device) - start


def prompt(n: int) -> tuple[int, ...]:
    return tuple(range(1000 + n, 1064 + n))


def adapters(dry: bool) -> Iterator[Row]:
    import torch

    import lorafold as lf
    from lorafold.engine import Engine, Request, Sampling

    device, streams, tokens = ("cpu", 2, 4) if dry else ("cuda", 16, 128)
    model = lf.load_model("smollm2", storage="bf16", device=device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = {}
        for n in range(streams):
            adapter = lf.attach(model, lf.LoRA(rank=16), name=f"a{n}")
            for p in adapter.parameters():
                p.add_(0.01 * torch.randn_like(p))
            paths[f"a{n}"] = adapter.save(f"{folder}/a{n}")
            adapter.detach()
        rates: dict[str, float] = {}
        work: dict[str, dict[str, int]] = {}
        with Engine(model, slots=streams, length=512) as engine:
            for name, path in paths.items():
                engine.load(name, path)
            for name, named in (("base", [None] * streams), ("16 adapters", list(paths))):
                for turn in range(2):  # the first is for kernels to be made
                    engine.forget()
                    start = time.perf_counter()
                    requests = [
                        Request(f"{name}-{turn}-{n}", prompt(n), tokens, of, Sampling())
                        for n, of in enumerate(named)
                    ]
                    asked = [engine.submit(request) for request in requests]
                    engine.run()
                    taken = sum(len(stream.result().tokens) for stream in asked)
                    rates[name] = taken / (time.perf_counter() - start)
                    work[name] = {"requests": len(asked), "tokens": taken}
                yield {"streams": streams, "under": name, "tokens/s": rates[name]}
    same_work(work)
    yield {"adapters over base": rates["16 adapters"] / rates["base"]}


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    part.__name__: part for part in (values, launches, memory, speed, longest, adapters)
}


def installed(package: str) -> str:
    """Its version, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def about(dry: bool) -> Row:
    """The card, its driver and what it ran with."""
    import torch

    found: Row = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform()}
    if not dry:
        p = torch.cuda.get_device_properties(0)
        found["card"] = f"{p.name}, {p.total_memory / 1e9:.0f} GB, {p.major}.{p.minor}"
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {"driver": run(*asked).strip(), "cuda": torch.version.cuda}
    names = ("lorafold", "torch", "transformers", "triton", "bitsandbytes", "peft")
    return found | {name: installed(name) or "not installed" for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--out", default="gpu-results", help="the files' name, without .json, .md")
    parser.add_argument("--dry-run", "--short", action="store_true", help="without a GPU, tiny")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        for row in PARTS[asked.part](asked.dry_run):
            print("row " + json.dumps(row), flush=True)
        return
    only = [*dict.fromkeys(name.strip() for name in asked.only.split(","))]
    if wrong := set(only) - PARTS.keys():
        parser.error(f"--only: found {', '.join(sorted(wrong))}, expected of {', '.join(PARTS)}")
    if not asked.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error("found no GPU that torch can use; --dry-run needs none")
    results: Row = {"about": about(asked.dry_run), "dry run": asked.dry_run, "parts": {}}
    try:
        write(asked.out, results)
    except OSError as error:
        parser.error(f"--out {asked.out}: can't be written ({error.strerror})")
    for name in only:
        results["parts"][name] = part = one_part(name, asked.dry_run)
        told = part["failed"] or f"{len(part['rows'])} rows"
        print(f"{name:<9} {part['seconds']:5.0f} s  {told}", flush=True)
        write(asked.out, results)
    if failed := [name for name, part in results["parts"].items() if part["failed"]]:
        sys.exit(f"failed: {', '.join(failed)}; {asked.out}.md has the rest")


def one_part(name: str, dry: bool) -> Row:
    """A part's rows, its seconds, and why it ended early, if it did."""
    command = [sys.executable, __file__, "--part", name, *["--dry-run"] * dry]
    start, failed = time.perf_counter(), ""
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, told = child.communicate(timeout=LIMIT)
        if child.returncode:
            failed = (told.strip().splitlines() or ["it ended without a word"])[-1]
    except subprocess.TimeoutExpired:
        failed = f"it took more than {LIMIT} s"
        os.killpg(child.pid, signal.SIGKILL)
        printed, _ = child.communicate()
    except BaseException:  # with all that it started
        os.killpg(child.pid, signal.SIGKILL)
        raise
    rows = [json.loads(line[4:]) for line in printed.splitlines() if line.startswith("row ")]
    return {"rows": rows, "seconds": time.perf_counter() - start, "failed": failed}


def write(out: str, results: Row) -> None:
    """Both files, each whole."""
    title = "A dry run without a GPU" if results["dry run"] else results["about"]["card"]
    lines = [f"# {title}", "", *(f"- {k}: {v}" for k, v in results["about"].items())]
    for name, part in results["parts"].items():
        lines += ["", f"## {name}, {part['seconds']:.0f} s", ""]
        lines += [part["failed"]] * bool(part["failed"])
        kinds: dict[tuple[str, ...], list[Row]] = {}
        for row in part["rows"]:
            kinds.setdefault(tuple(row), []).append(row)
        lines += [f"{markdown(rows)}\n" for rows in kinds.values()]
    texts = {".json": json.dumps(results, indent=1), ".md": "\n".join(lines) + "\n"}
    for ending, text in texts.items():
        new = Path(f"{out}{ending}.new")
        new.write_text(text)
        new.replace(f"{out}{ending}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; what had ended is written")
