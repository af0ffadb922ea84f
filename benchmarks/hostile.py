"""A server among hostile adapters: how fast it says that it lives, and what it makes of them.

    python benchmarks/hostile.py [--cases config-deep ...] [--quiet 10] [--keep]
    python benchmarks/hostile.py --requests 1000 [--bodies 30]

The second form sends hostile requests instead: so many generated schemas by every route that takes
one, each field of each route with a body of 1 MiB (of which --bodies takes every n-th), and
1,500 requests that are sent by half. Short: --requests 20 --bodies 30.

The server runs in a process of its own, on a tiny model, with two good adapters and the corpus of
tests/lib/hostile_adapters: they lie there when it starts, the administrator loads them, and they
are asked for. Meanwhile /livez is asked every 20 ms, and the good ones all the time. In the server
a task of the event loop and a thread note by how much they wake too late, and so does a process
that does nothing else: what it sees is the machine's. Prints the figures as JSON and as a table,
which --keep also writes to results/hostile.json.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from lib.results import keep, markdown
from lib.short import parsed

TESTS = Path(__file__).parent.parent / "tests"
sys.path += [str(TESTS), str(TESTS / "lib")]

STEP = 0.005  # seconds between two looks at how late it is
LATE = 0.15  # seconds after which the stacks of all threads are kept


def late(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the 99th percentile and the worst, in milliseconds."""
    found = sorted(1000 * one for one in seconds) or [0.0]
    at = min(len(found) - 1, int(0.99 * len(found)))
    return {"median": statistics.median(found), "99 %": found[at], "worst": found[-1]}


def wakings(ended: Callable[[], bool]) -> list[float]:
    """By how much each sleep lasted too long, in seconds."""
    found = []
    while not ended():
        began = time.perf_counter()
        time.sleep(STEP)
        found.append(time.perf_counter() - began - STEP)
    return found


def bystander(pipe: Any) -> None:
    """Do nothing but sleep until something comes through the pipe; it gets the wakings."""
    pipe.send(wakings(pipe.poll))


def serve(base: Path, folder: Path, pipe: Any, with_stacks: bool) -> None:
    """Serve until something comes through the pipe; it gets the port, and at the end how late the
    event loop and a thread were. Stacks are of threads that run meanwhile, whose frames may go
    while they are read, and the process with them.
    """
    import faulthandler
    import logging

    from lorafold.runtime.process_tuning import all_frozen, imports_frozen
    from serving_cases import running

    logging.basicConfig(filename=folder.parent / "server.log", level=logging.INFO)
    loop: list[float] = []
    thread: list[float] = []
    ended = threading.Event()

    stacks = (folder.parent / "stacks.log").open("w") if with_stacks else None

    async def watch() -> None:
        while True:
            if stacks is not None:  # of all threads, unless called again
                faulthandler.dump_traceback_later(LATE, file=stacks)
            began = time.perf_counter()
            await asyncio.sleep(STEP)
            loop.append(time.perf_counter() - began - STEP)

    def watch_thread() -> None:
        thread.extend(wakings(ended.is_set))

    # as the command does
    with imports_frozen(), running(base, folder, waits=False) as server, all_frozen():
        on = server.parts.host._loop
        watching = asyncio.run_coroutine_threadsafe(watch(), on)
        watcher = threading.Thread(target=watch_thread, daemon=True)
        watcher.start()
        pipe.send(server.port)
        pipe.recv()
        ended.set()
        watcher.join()
        watching.cancel()
        faulthandler.cancel_dump_traceback_later()
        pipe.send((loop, thread))


def besieged(
    base: Path, folder: Path, names: Sequence[str], stop: Callable[[], None], with_stacks: bool,
    quiet: float,
) -> Any:  # fmt: skip
    """The figures of one server that is asked under everything.

    Args:
        base: the base's directory.
        folder: the adapters.
        names: the hostile ones.
        stop: ends what changes.
        with_stacks: keep the stacks of late moments.
        quiet: the seconds in which nothing hostile is asked, to compare with.
    """
    from hostile_adapters.siege import Siege, said
    from serving_cases import Running

    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(base, folder, there, with_stacks)
    )
    process.start()
    there.close()
    port = here.recv()
    server = Running(f"http://127.0.0.1:{port}", port, None, folder)  # type: ignore[arg-type]
    memory = psutil.Process(process.pid)
    peak = first = memory.memory_info().rss
    ended = threading.Event()

    def weigh() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, memory.memory_info().rss)

    weighing = threading.Thread(target=weigh)
    weighing.start()
    beside, theirs = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=bystander, args=(theirs,)).start()
    siege = Siege(server, {name: said(server, name) for name in ("good",)})
    figures, phases = {}, []
    with siege.watched():
        for phase, act in (
            ("start", siege.settle),
            ("load", lambda: siege.load(names)),
            ("request", lambda: siege.request(names)),
            ("nothing else", lambda: time.sleep(quiet)),
        ):
            began, n = time.monotonic(), len(siege.latencies)
            act()
            took = time.monotonic() - began
            phases.append({"phase": phase, "seconds": took, **late(siege.latencies[n:])})
            print(phases[-1], flush=True)
    stop()
    siege.settle()
    found = siege.adapters
    ended.set()
    weighing.join()
    children = memory.children(recursive=True)
    here.send("end")
    loop, thread = here.recv()
    beside.send("end")
    began = time.monotonic()
    process.join(120)
    figures = {
        "directories": len(names),
        "invalid": len(found["wrong"]),
        "served": len(found["adapters"]),
        "seconds until verified": phases[0]["seconds"],
        "memory before, MB": first / 2**20,
        "memory at most, MB": peak / 2**20,
        "memory after, MB": memory.memory_info().rss / 2**20 if process.is_alive() else 0.0,
        "seconds to stop": time.monotonic() - began,
        "child processes left": sum(child.is_running() for child in children),
        "faults": len(siege.faults),
    }
    rows = [
        *phases,
        {"phase": "all", "seconds": sum(p["seconds"] for p in phases), **late(siege.latencies)},
        {"phase": "event loop late", **late(loop)},
        {"phase": "thread late", **late(thread)},
        {"phase": "another process late", **late(beside.recv())},
    ]
    return figures, rows, siege.faults, found


def living(port: int, pipe: Any) -> None:
    """Ask every 20 ms whether a server lives, until something comes through the pipe; it gets how
    long each answer took, infinite where there was none.
    """
    found = []
    while not pipe.poll(0.02):
        began = time.perf_counter()
        try:
            at = HTTPConnection("127.0.0.1", port, timeout=60)
            at.request("GET", "/livez")
            found.append(time.perf_counter() - began if at.getresponse().read() else 0.0)
            at.close()
        except OSError:
            found.append(float("inf"))
    pipe.send(found)


def half(port: int, n: int, seconds: float, pipe: Any) -> None:
    """Send so many requests by half; the pipe gets how many were closed after so many seconds."""
    heads = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 1000,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000000\r\n\r\n" + b" " * 900_000,
        b"POST /v1/adapters/a/page HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        + b" " * 900_000,
    )
    held, closed = [], 0
    for i in range(n):
        with suppress(OSError):
            at = socket.create_connection(("127.0.0.1", port), timeout=0.5)
            held.append(at)
            at.sendall(heads[i % len(heads)])
    time.sleep(seconds)
    for at in held:
        at.setblocking(False)
        try:
            while at.recv(65536):
                pass
            closed += 1
        except BlockingIOError:
            pass
        except OSError:
            closed += 1
    pipe.send(closed + n - len(held))


def pelted(base: Path, folder: Path, schemas: int, every: int) -> None:
    """Send hostile requests, and print what came of it."""
    from hostile_requests import asking, bodies, hostile_schema
    from serving_cases import Running

    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(base, folder, there, False))
    process.start()
    port = here.recv()
    server = Running(f"http://127.0.0.1:{port}", port, None, folder)  # type: ignore[arg-type]
    memory, statuses = psutil.Process(process.pid), Counter[str]()

    def ask(one: tuple[str, bytes]) -> None:
        try:
            answer = server.ask(*one, timeout=300)
            statuses[f"{answer.status}"] += 1
            if answer.status >= 500:
                print(one[0], one[1][:300], answer.content[:300], flush=True)
        except OSError as error:
            statuses[type(error).__name__] += 1

    def by_schemas() -> None:
        for number in range(schemas):
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(ask, asking(hostile_schema(number)[1])))

    def by_bodies() -> None:
        for i, one in enumerate(bodies()):
            if i % every == 0:
                ask(one)

    def by_halves() -> None:
        ours, theirs = spawn.Pipe()
        sending = spawn.Process(target=half, args=(port, 1500, 20.0, theirs))
        sending.start()
        print(f"of 1500 half-sent requests closed after 20 s: {ours.recv()}")
        sending.join()

    for phase, act in (
        ("nothing", lambda: time.sleep(3)), ("schemas", by_schemas), ("bodies", by_bodies),
        ("half-sent", by_halves),
    ):  # fmt: skip
        ours, theirs = spawn.Pipe()
        spawn.Process(target=living, args=(port, theirs)).start()
        beside, other = spawn.Pipe()
        spawn.Process(target=bystander, args=(other,)).start()
        before, began = memory.memory_info().rss, time.monotonic()
        act()
        took, rss = time.monotonic() - began, memory.memory_info().rss
        ours.send("end")
        beside.send("end")
        row = {"phase": phase, "seconds": took, **late(ours.recv())}
        row |= {"another process late": late(beside.recv())["worst"]}
        row |= {"MB kept": (rss - before) / 1e6, "lives": process.is_alive(), **statuses}
        statuses.clear()
        print(json.dumps(row), flush=True)
    here.send("end")
    process.join(120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", help="the names of some, instead of all")
    parser.add_argument("--quiet", type=float, default=10, help="seconds to compare with")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--requests", type=int, help="schemas, instead of adapters")
    parser.add_argument("--bodies", type=int, default=1, help="take every n-th body")
    parser.add_argument("--stacks", type=Path, help="where to copy the stacks of late moments")
    asked = parsed(parser, cases=["config-deep"], quiet=0.5)
    import lorafold as lf
    from conftest import make_model_dir
    from hostile_adapters import CASES, MOVING, moving
    from serving_cases import TOOL_TEMPLATE, saved

    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-")))
        base = make_model_dir("llama", at / "base")
        folder = saved(base, {"good": lf.LoRA(rank=2)}, at / "adapters")
        if asked.requests is not None:
            (base / "chat_template.jinja").write_text(TOOL_TEMPLATE)
            pelted(base, saved(base, {"a": lf.LoRA()}, at / "own"), asked.requests, asked.bodies)
            return
        chosen = [CASES[name] for name in asked.cases or CASES if name not in MOVING]
        for case in chosen:
            case.make(folder, base)
        names = [case.name for case in chosen]
        stop = moving(folder) if asked.cases is None else lambda: None
        names += MOVING if asked.cases is None else ()
        try:
            stacks = asked.stacks is not None
            figures, rows, faults, found = besieged(base, folder, names, stop, stacks, asked.quiet)
        finally:
            stop()
        log = (at / "server.log").read_text(errors="replace")
        if asked.stacks is not None:
            asked.stacks.write_text((at / "stacks.log").read_text() + log)
    told = {n: found["wrong"].get(n, "")[:200] for n in names}
    missed = [c.name for c in chosen if c.wrong and not told[c.name]]
    print(json.dumps({"told": told, "faults": faults, "log": log.count("Traceback")}, indent=1))
    figures |= {"not reported": len(missed)}
    print(json.dumps({"figures": figures, "latencies": rows, "missed": missed}, indent=1))
    if asked.keep:
        keep(
            "hostile",
            [{"": k, "value": v} for k, v in figures.items()],
            rows,
            dtypes="the server's default",
        )
    else:
        print(markdown([{"": k, "value": v} for k, v in figures.items()]), "\n")
        print(markdown(rows))


if __name__ == "__main__":
    main()
