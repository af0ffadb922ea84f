"""One tenant beside another that floods the server: how long the first one's requests take.

    python benchmarks/fairness.py [--seconds 60] [--flood 200] [--streams 2]

`lorafold serve` on the embedded model in bf16, two tenants with an adapter each of rank 16 on every
linear. The small tenant keeps `--streams` requests going, of 64 prompt tokens and 64 new ones, each
as soon as the one before has ended; the flood keeps 100 times as many going, and tries what is
refused again after about the seconds of Retry-After. First the small tenant is alone, then the
flood is beside it. Prints the median and the 95th percentile of the small tenant's times, to the
whole answer and to the first token, and what became of the flood's requests; `--keep` writes
results/fairness.json.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lib.results import keep, markdown
from lib.servers import lorafold
from lib.short import parsed
from lib.work import same_work
from serving import adapters

from lorafold.models.loading import load_model
from lorafold.models.sources import resolve_model

PROMPT, NEW = 64, 64
Result = tuple[int, float, float, float, int]


async def ask(port: int, key: str, model: str) -> Result:
    """The status of one streamed completion, the seconds to its first token and its end, those of
    Retry-After, and its tokens.
    """
    body = json.dumps(
        {
            "model": model, "prompt": [random.randrange(40000) for _ in range(PROMPT)],
            "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    start, first = time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    answer = b""
    while part := await reader.read(65536):
        answer += part
        if not first and b"data: {" in answer:
            first = time.perf_counter() - start
    writer.close()
    retry = re.search(rb"retry-after: (\d+)", answer, re.IGNORECASE)
    seconds = float(retry[1]) if retry else 0
    said = re.search(rb'"completion_tokens": ?(\d+)', answer)
    tokens = int(said[1]) if said else 0
    return int(answer.split()[1]), first, time.perf_counter() - start, seconds, tokens


async def tenant(port: int, key: str, model: str, streams: int, until: float) -> list[Result]:
    """What became of a tenant's requests, who keeps so many going."""
    found: list[Result] = []

    async def one() -> None:
        while time.perf_counter() < until:
            result = await ask(port, key, model)
            found.append(result)
            await asyncio.sleep(result[3] * (0.5 + random.random()))

    await asyncio.gather(*(one() for _ in range(streams)))
    return found


def row(name: str, found: list[Result]) -> dict[str, Any]:
    """The times of those that were answered."""
    good = [one for one in found if one[0] == 200]
    firsts, wholes = (sorted(one[i] for one in good) for i in (1, 2))
    return {
        "side": name, "requests": len(good), "statuses": dict(Counter(o[0] for o in found)),
        "first token, median s": statistics.median(firsts),
        "first token, 95th percentile": firsts[int(0.95 * len(firsts))],
        "answer, median s": statistics.median(wholes),
        "answer, 95th percentile": wholes[int(0.95 * len(wholes))],
    }  # fmt: skip


async def measure(port: int, keys: dict[str, str], a: argparse.Namespace) -> list[dict[str, Any]]:
    async def small(seconds: float) -> list[Result]:
        until = time.perf_counter() + seconds
        return await tenant(port, keys["small"], "16-0", a.streams, until)

    await small(3)
    alone = await small(a.seconds)
    flood = asyncio.create_task(
        tenant(port, keys["flood"], "16-1", a.flood, time.perf_counter() + a.seconds + 5)
    )
    await asyncio.sleep(3)
    beside = await small(a.seconds)
    sides = {"alone": alone, "beside the other tenant": beside}
    same_work({name: {"tokens of a request": each(found)} for name, found in sides.items()})
    return [
        row("alone", alone),
        row("beside the other tenant", beside),
        row("the other tenant", await flood),
    ]


def each(found: list[Result]) -> float:
    """The tokens of each request that was answered, on average."""
    return statistics.fmean(one[4] for one in found if one[0] == 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--flood", type=int, default=200)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--settings", default="", help="further lines of serve.yaml")
    parser.add_argument("--keep", action="store_true", help="write results/fairness.json")
    a = parsed(parser, seconds=2, flood=4, streams=1)
    model = load_model(resolve_model("smollm2").path, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        paths = adapters(model, 2, Path(folder), 16, "all-linear")
        file, keys = Path(folder) / "keys.json", {}
        for name in ("small", "flood"):
            command = [sys.executable, "-m", "lorafold", "serve", "new-key", name, "--keys"]
            done = subprocess.run([*command, str(file)], capture_output=True, check=True, text=True)
            keys[name] = done.stdout.strip()
        more = f"keys: {file}\n{a.settings}"
        with lorafold("smollm2", paths, Path(folder), more) as server, server.awake():
            rows = asyncio.run(measure(server.port, keys, a))
    keep("fairness", rows, dtypes="bf16") if a.keep else print(markdown(rows))
    busy, alone = (row["answer, 95th percentile"] for row in (rows[1], rows[0]))
    print(f"95th percentile beside the other tenant: {busy / alone:.2f} of that alone")


if __name__ == "__main__":
    main()
