"""llama.cpp's answers, from its own server in this process, as the xllamacpp wheel has it. `base`
is a GGUF file, and the job has `adapter` too: another, or None for a merged model.

The server gives probabilities as text, which costs as much as computing them: several prompts are
asked at once, and only the first few without the adapter. A greedy text begins from what the server
keeps of its prompt. Nothing that is kept is for another adapter: the server would not notice.
"""

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

SLOTS = 8  # requests at once
BARE = SLOTS  # prompts that are asked without the adapter
UNIT = 256  # llama.cpp's contexts are multiples of it
ERRORS = 1  # a verbosity
ID, VALUE = re.compile(rb'"id":(\d+),"token":'), re.compile(rb'"logprob":([^,}]+)')
NOTHING = b"null"  # a logarithm that is no number
TEMPLATE = "/apply-template"
LAST = "exiting due to"  # begins the last line of a server that could not start
INTERNAL = re.compile(r"[\w:]+")  # the name of a function of C++ that raised
FAULT = re.compile(r"^[\d.]+ E .*?: (.*)$", re.MULTILINE)


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The answers, as `program` describes them; `base` those of the first prompts."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as the library is loaded
    import xllamacpp

    longest = max(map(len, job["ids"])) + job["greedy"]
    params = xllamacpp.CommonParams()
    params.model.path = job["base"]
    if job.get("adapter"):
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * UNIT * -(-longest // UNIT)
    params.cache_ram_mib, params.cache_prompt, params.fit_params = 0, False, False
    params.warmup, params.verbosity, params.ui = False, ERRORS, False
    for each in (params.cpuparams, params.cpuparams_batch):
        each.n_threads = os.cpu_count() or 1
    with _told() as told:
        try:
            server = xllamacpp.Server(params)
        except RuntimeError as error:
            why = _fault(told) or str(error)
            if INTERNAL.fullmatch(why):
                why = f"it can't read {os.path.basename(job['base'])}, and says {why} alone"
            raise SystemExit(why) from None
    ask = _asking(server.listening_address)
    size = json.loads(ask("/v1/models"))["data"][0]["meta"]["n_vocab"]
    harmless = _tokens(ask, "a")[-1:]  # a whole character: part of one would have no probabilities

    def following(ids: Sequence[int], slot: int, scale: float) -> np.ndarray:
        scales = [{"id": 0, "scale": scale}] if job.get("adapter") else []
        body = {
            "prompt": ids, "n_predict": 1, "n_probs": size, "cache_prompt": False, "lora": scales,
            "id_slot": slot, "temperature": 0, "logit_bias": [[token, 1e6] for token in harmless],
        }  # fmt: skip
        said = ask("/completion", body)
        said = said[said.index(b'"top_logprobs"') :]
        row = np.full(size, -np.inf, np.float32)
        values = VALUE.findall(said)
        if NOTHING in values:
            raise SystemExit("it computes NaN for a token: numbers there grow too large for it")
        row[np.array(ID.findall(said), "S").astype(int)] = np.array(values, "S")
        return row

    def text(ids: Sequence[int], slot: int) -> list[int]:
        made: list[int] = []
        while len(made) < job["greedy"]:  # it stops at more tokens than those that end a completion
            body = {
                "prompt": [*ids, *made], "n_predict": job["greedy"] - len(made), "id_slot": slot,
                "temperature": 0, "cache_prompt": True, "return_tokens": True,
            }  # fmt: skip
            made += (more := json.loads(ask("/completion", body))["tokens"])
            if not more:
                break
            if ended := [n for n, token in enumerate(made) if token in job["ends"]]:
                return made[: ended[0]]
        return made

    def both(slot: int) -> list[tuple[np.ndarray, list[int]]]:
        return [(following(ids, slot, 1.0), text(ids, slot)) for ids in job["ids"][slot::SLOTS]]

    with ThreadPoolExecutor(SLOTS) as pool:
        turns = [*pool.map(both, range(SLOTS))]
        each = [turns[n % SLOTS][n // SLOTS] for n in range(len(job["ids"]))]
        found = {
            "adapted": [row for row, _ in each],
            "greedy": [made for _, made in each],
            "version": xllamacpp.__version__,
            "other_tokens": [
                n
                for n, (given, ids) in enumerate(zip(job["texts"], job["ids"], strict=True))
                if _tokens(ask, given) != ids
            ],
        }
        if not job.get("adapter"):
            found["other_texts"] = _otherwise(ask, job["chats"], job["texts"])
        else:
            bare = partial(following, scale=0.0)
            found["base"] = [*pool.map(bare, job["ids"][:BARE], range(BARE))]
    return found


def _asking(address: str) -> Callable[..., bytes]:
    """What sends a request to the server, and gives its reply."""

    def ask(path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urlopen(Request(address + path, data, headers)) as reply:
                return bytes(reply.read())
        except HTTPError as error:
            if path == TEMPLATE:
                raise
            raise SystemExit(_reason(error)) from None

    return ask


def _reason(error: HTTPError) -> str:
    """Why the server refused a request, in its words."""
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error)


def _tokens(ask: Callable[..., bytes], text: str) -> list[int]:
    body = {"content": text, "add_special": False, "parse_special": True}
    found: list[int] = json.loads(ask("/tokenize", body))["tokens"]
    return found


def _otherwise(
    ask: Callable[..., bytes], chats: Sequence[dict[str, Any]], texts: Sequence[str]
) -> list[int]:
    """The chats that the server's own Jinja renders differently, apart from a first bos token."""
    first = json.loads(ask("/props"))["bos_token"]
    found = []
    for n, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        try:
            made = json.loads(ask(TEMPLATE, chat))["prompt"]
        except HTTPError:
            made = None
        if made is None or made.removeprefix(first) != text.removeprefix(first):
            found.append(n)
    return found


def _fault(told: Callable[[], str]) -> str:
    """The first fault that the library told, which a thread of its own writes, or nothing."""
    for _ in range(100):
        if LAST in told():
            break
        time.sleep(0.05)
    return next(iter(FAULT.findall(told())), "")


@contextlib.contextmanager
def _told() -> Iterator[Callable[[], str]]:
    """Keeps what the library writes to the screen, and gives it."""
    with tempfile.TemporaryFile() as file:
        screen = os.dup(2)
        os.dup2(file.fileno(), 2)

        def told() -> str:
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        try:
            yield told
        finally:
            os.dup2(screen, 2)
            os.close(screen)
