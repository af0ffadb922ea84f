"""How often a request's tokens in a busy batch are not those that it has alone, in bf16.

    python benchmarks/alone.py [--requests 500] [--storage bf16 int8 nf4] [--http] [--keep]

The embedded model in bf16, adapters of eight methods and the base, prompts of 4 to 96 tokens, some
of which begin alike, 8 to 32 new ones, greedy or sampled with random settings; requests arrive
between steps. Every other one goes on where an earlier one ended, as a chat does, and starts from
what that left. Each is then run alone in the same engine, with nothing left. With `--http` six
clients ask a server, greedily, and then one asks the same alone. Where all tokens so far are the
same, the logits of both runs are compared: their largest difference is the rounding bound b. Two
runs whose logits differ by at most b can only choose different tokens where two candidates are
closer than 2 b, in logits (greedy) or in the logarithms of the draw's odds (sampled, after
temperature). Prints JSON and a table, which `--keep` writes to results/alone.json.
"""

import argparse
import asyncio
import json
import random
import tempfile
import threading
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from lib.results import keep, markdown
from lib.short import parsed

import lorafold as lf
from lorafold.engine import Engine, EventStream, Request, Sampling
from lorafold.engine.sampler import filter_logits, uniform
from lorafold.resolve import Base
from lorafold.serving.app import application
from lorafold.serving.directory import Directory
from lorafold.serving.keys import Keys
from lorafold.serving.run import bound_socket, build_server
from lorafold.serving.settings import Settings

METHODS: dict[str, Any] = {
    "lora": lf.LoRA(rank=16), "dora": lf.DoRA(over=lf.LoRA(rank=8)), "vera": lf.VeRA(rank=64),
    "loha": lf.LoHa(rank=4), "lokr": lf.LoKr(rank=4), "ia3": lf.IA3(),
    "houlsby": lf.Bottleneck(size=8), "prompt": lf.Prompt(tokens=8),
}  # fmt: skip
GROUP = 50  # requests that arrive in one company
LENGTH = 176


def adapters(model: Any, out: Path) -> dict[str, Path]:
    """One of each method, away from its start."""
    paths = {}
    for i, (name, spec) in enumerate(METHODS.items()):
        torch.manual_seed(i)
        adapter = lf.attach(model, spec, name="it")
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.02 * torch.randn_like(p))
        paths[name] = adapter.save(out / name)
        adapter.detach()
    return paths


def asked(n: int) -> list[Request]:
    rng = random.Random(0)
    found = []
    begins = [[rng.randrange(1000, 40000) for _ in range(k)] for k in (0, 0, 17, 40)]
    for i in range(n):
        begin = rng.choice(begins)
        own = [rng.randrange(1000, 40000) for _ in range(rng.randint(4, 96 - len(begin)))]
        ids = (*begin, *own)
        drawn = Sampling(
            temperature=rng.choice([0.7, 1.0]), top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 40]), seed=i,
        )  # fmt: skip
        sampling = drawn if rng.random() < 0.5 else Sampling()
        name = rng.choice([None, *METHODS])
        found.append(Request(str(i), ids, rng.randint(8, 32), name, sampling))
    return found


def going_on(request: Request, tokens: Sequence[int]) -> Request:
    """The next turn of a request that ended with these tokens."""
    rng = random.Random(request.id)
    said = tuple(rng.randrange(1000, 40000) for _ in range(8))
    prompt = (*request.prompt, *tokens, *said)
    most = min(request.max_new_tokens, LENGTH - len(prompt))
    return Request(f"{request.id}+", prompt, most, request.adapter, request.sampling)


class Watched(Engine):
    """An engine that keeps the logits of every choice, and the odds of every draw."""

    def watch(self) -> None:
        self.seen: dict[str, list[torch.Tensor]] = defaultdict(list)  # (V,) a token
        choose = self._choose

        def spied(rows: Any, logits_BV: torch.Tensor) -> None:
            for b, row in rows:
                self.seen[row.request.id].append(logits_BV[b].clone())
            choose(rows, logits_BV)

        self._choose = spied  # type: ignore[method-assign]

    def company(self, requests: Sequence[Request], seed: int) -> dict[str, EventStream]:
        """The streams of these requests, and of as many that go on after them, all ended."""
        rng, waiting, streams = random.Random(seed), list(requests), {}
        going = self.step()
        while waiting or going:
            for request in waiting[: rng.randint(0, 3)]:
                waiting.remove(request)
                streams[request.id] = self.submit(request)
            for stream in list(streams.values()):
                own, end = stream.request, stream.ended
                if end and not own.id.endswith("+") and f"{own.id}+" not in streams:
                    streams[f"{own.id}+"] = self.submit(going_on(own, end.tokens))
            going = self.step()
        return streams


def gap(logits_V: torch.Tensor, request: Request, at: int) -> float:
    """How far the chosen candidate is ahead of the next one, in logits or, if it was sampled, how
    far the random number is from another candidate's part of the probabilities.
    """
    own = request.sampling
    if not own.temperature:
        first, second = logits_V.float().topk(2).values.tolist()
        return first - second
    (kept_V,) = filter_logits(logits_V[None].float() / own.temperature, [own])
    ends_V = torch.softmax(kept_V.double(), -1).cumsum(-1)
    return float((ends_V - uniform(own.seed, at)).abs().min())


def over_http(storage: str, count: int) -> dict[str, Any]:
    """Greedy completions of six clients at a time, and of one that is alone."""
    with tempfile.TemporaryDirectory() as folder:
        adapters(lf.load_model("smollm2", storage=storage), Path(folder) / "them")
        differ = served(storage, Path(folder) / "them", asked(count))
    return {"storage": storage, "requests": count, "clients": 6, "different": differ}


def served(storage: str, folder: Path, requests: Sequence[Request]) -> int:
    """How many of these a server answers otherwise when it is asked one by one."""
    settings = Settings(port=0, state=folder.parent / f"{folder.name}-state.json", length=LENGTH)
    with bound_socket(settings) as at:
        base = Base("smollm2", storage)
        given = base.load(), base.tokenizer()
        keys = Keys(None, None, None)
        server = build_server(base, lambda _: given, Directory(folder), keys, settings)
        http = uvicorn.Server(uvicorn.Config(application(server), log_config=None))
        thread = threading.Thread(target=lambda: asyncio.run(http.serve(sockets=[at])))
        thread.start()
        url = f"http://127.0.0.1:{at.getsockname()[1]}/v1/completions"

        def ask(request: Request) -> Any:
            body = {
                "model": request.adapter or "smollm2", "prompt": list(request.prompt),
                "max_tokens": request.max_new_tokens, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True,
            }  # fmt: skip
            head = {"Content-Type": "application/json"}
            sent = urllib.request.Request(url, json.dumps(body).encode(), head)
            with urllib.request.urlopen(sent) as answer:
                return json.load(answer)["choices"][0]["token_ids"]

        server.registry.watcher.settled()
        with ThreadPoolExecutor(6) as clients:
            among = list(clients.map(ask, requests))
        differ = sum(ask(request) != own for request, own in zip(requests, among, strict=True))
        http.should_exit = True
        thread.join()
    return differ


def inside(storage: str, count: int) -> dict[str, Any]:
    """Requests of an engine in company, and each of them alone."""
    model = lf.load_model("smollm2", storage=storage)
    requests, bound, differ, reused, done = asked(count // 2), 0.0, [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        paths = adapters(model, Path(folder))
        with Watched(model, slots=16, length=LENGTH) as engine:
            for name, path in paths.items():
                engine.load(name, path)
            engine.watch()
            for start in range(0, len(requests), GROUP // 2):
                group = engine.company(requests[start : start + GROUP // 2], start)
                among = dict(engine.seen)
                engine.seen.clear()
                for id, stream in group.items():
                    request, found = stream.request, stream.result()
                    engine.forget()
                    again = engine.submit(request)
                    engine.run()
                    alone = again.result()
                    assert "failed" not in (alone.reason, found.reason), (alone, found)
                    reused += found.cached
                    pairs = zip(alone.tokens, found.tokens, strict=False)
                    same = next((t for t, (x, y) in enumerate(pairs) if x != y), None)
                    own, theirs = engine.seen.pop(id), among[id]
                    until = len(alone.tokens) if same is None else same + 1
                    for x, y in zip(own[:until], theirs[:until], strict=True):
                        bound = max(bound, float((x.float() - y.float()).abs().max()))
                    if same is not None:
                        differ.append((request, gap(own[same], request, same)))
                done += len(group)
                told = {"storage": storage, "requests": done, "differ": len(differ)}
                print(json.dumps(told | {"bound": bound, "reused": reused}), flush=True)
    print(json.dumps({"by adapter": Counter(str(request.adapter) for request, _ in differ)}))
    closer = [g for request, g in differ if g <= 2 * bound / (request.sampling.temperature or 1.0)]
    return {
        "storage": storage,
        "requests": done,
        "tokens reused": reused,
        "different": len(differ),
        "% of requests": 100 * len(differ) / done,
        "largest difference of logits": bound,
        "largest margin": max((g for _, g in differ), default=0.0),
        "within rounding": len(closer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--keep", action="store_true", help="write results/alone.json")
    parser.add_argument("--storage", nargs="+", default=["bf16"], help="bf16, int8, nf4")
    parser.add_argument("--http", action="store_true", help="six clients of a server")
    a = parsed(parser, requests=8)
    ask = over_http if a.http else inside
    table = [ask(storage, a.requests) for storage in a.storage]
    print(markdown(table))
    if a.keep:
        keep("alone_http" if a.http else "alone", table, dtypes="see the rows")


if __name__ == "__main__":
    main()
