"""How long a server takes to start with many adapters: to listening, and to all verified.

    python benchmarks/start.py [--adapters 1000] [--rank 16] [--keep]

Adapters of the embedded model on every linear, in bf16, as PEFT saves them, each with values of its
own, written before and so in the page cache. The command `lorafold serve` is started in a process
of its own on one adapter, on all of them, and on all of them once more, when they are known. Times
are seconds more than with one. Meanwhile `/livez` is asked every 20 ms. Prints JSON and a table,
which `--keep` writes to results/start.json.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from lib.results import keep, markdown
from lib.short import parsed
from safetensors.torch import load_file, save_file

import lorafold as lf

ADMIN = "the key of a benchmark"


def write(folder: Path, many: int, rank: int) -> None:
    """So many adapters, and one alone in a directory beside them."""
    model = lf.load_model("smollm2", storage="bf16")
    adapter = lf.attach(model, lf.LoRA(rank=rank), name="it")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    first = adapter.save(folder / "first")
    tensors = {k: t.bfloat16() for k, t in load_file(first / "adapter_model.safetensors").items()}
    some = next(iter(tensors.values()))
    for i in range(many + 1):
        own = folder / "one" / "alone" if i == many else folder / "all" / f"adapter-{i:05d}"
        own.mkdir(parents=True)
        some.view(-1)[0] = i / many
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(first / "adapter_config.json", own)


class Server:
    """The command in a process, with what the benchmark asks it."""

    def __init__(self, adapters: Path, folder: Path) -> None:
        key, state = folder / "admin.key", folder / f"{adapters.name}-state.json"
        key.write_text(ADMIN)
        config = folder / f"{adapters.name}.yaml"
        config.write_text(f"state: {state}\n")
        command = [
            sys.executable, "-m", "lorafold", "serve", "--model", "smollm2", "--storage", "bf16",
            "--adapters", str(adapters), "--port", "0", "--admin-key-file", str(key),
            "--config", str(config),
        ]  # fmt: skip
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        while "webbrowser http" not in (line := self.process.stderr.readline()):
            assert line, "the server ended"
        self.url = line.rsplit(" ", 1)[1].strip().rstrip("/")
        while True:
            try:
                self.get("/readyz")
                break
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.01)
        self.listening = time.perf_counter() - self.began

    def get(self, path: str) -> Any:
        head = {"Authorization": f"Bearer {ADMIN}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=head)) as found:
            return json.load(found)

    def complete(self, model: str) -> float:
        """The seconds to the first token."""
        body = json.dumps({"model": model, "prompt": "The capital", "max_tokens": 1}).encode()
        head = {"Content-Type": "application/json"}
        begun = time.perf_counter()
        url = f"{self.url}/v1/completions"
        urllib.request.urlopen(urllib.request.Request(url, body, head)).read()
        return time.perf_counter() - begun

    def verified(self) -> tuple[float, list[float]]:
        """The seconds to all verified, and those that answers of `/livez` took meanwhile."""
        waits: list[float] = []
        looked = 0.0
        while True:
            begun = time.perf_counter()
            self.get("/livez")
            waits.append(time.perf_counter() - begun)
            if begun - looked > 0.5:
                looked, found = begun, self.get("/admin/adapters")
                assert not found["wrong"], found["wrong"]
                if not found["unverified"]:
                    return time.perf_counter() - self.began, waits
            time.sleep(0.02)

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()


def measured(adapters: Path, folder: Path) -> dict[str, float]:
    server = Server(adapters, folder)
    try:
        seconds, waits = server.verified()
        waits.sort()
        names = sorted(path.name for path in adapters.iterdir())[20:25]
        cold = [1000 * server.complete(name) for name in names]
        found = {
            "to listening": server.listening,
            "to all verified": seconds,
            "/livez 99%, ms": 1000 * waits[int(0.99 * (len(waits) - 1))],
            "/livez worst, ms": 1000 * waits[-1],
        }
        return found | ({"first token when cold, ms": statistics.median(cold)} if cold else {})
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--keep", action="store_true", help="write results/start.json")
    a = parsed(parser, adapters=21, rank=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, a.adapters, a.rank)
        time.sleep(3)  # files that were written just now are not taken for known ones
        runs = {"one": folder / "one", "new": folder / "all", "known": folder / "all"}
        measured(runs["one"], folder)  # what a first start compiles is compiled
        found = {kind: measured(path, folder) for kind, path in runs.items()}
    table = []
    for kind, own in found.items():
        more = {k: own[k] - found["one"][k] for k in ("to listening", "to all verified")}
        row: dict[str, Any] = {"adapters": 1 if kind == "one" else a.adapters, "state": kind}
        row |= {f"{k}, s more": v for k, v in more.items()}
        row |= {k: v for k, v in own.items() if k not in more}
        table.append(row)
        print(json.dumps(row | {"to listening": own["to listening"]}))
    if a.keep:
        keep("start", table, dtypes="bf16")
    else:
        print(markdown(table))


if __name__ == "__main__":
    main()
