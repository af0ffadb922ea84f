"""The answers of a running server of vLLM, which loads the adapter for them and forgets it again.
The job has `url`, and what `in_vllm` is given. The server reads the adapter's directory itself, so
it runs on this machine, or shares the disk.

It has to run with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and with --max-logprobs -1 to tell the
probabilities of all tokens. Which modules it applies nowhere it does not tell.
"""

import json
import os
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

NAME = "lorafold-export"
NEEDED = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-logprobs -1"


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The answers, as `program` describes them."""
    url, name = job["url"].rstrip("/").removesuffix("/v1"), f"{NAME}-{os.getpid()}"
    version = json.loads(sent(url, "/version"))["version"]
    models = json.loads(sent(url, "/v1/models"))["data"]
    base = next(one["id"] for one in models if not one.get("parent"))
    loaded = {"lora_name": name, "lora_path": job["adapter"], **job["lora"]["request"]}
    sent(url, "/v1/load_lora_adapter", loaded)
    try:
        return {
            "base": [distribution(url, base, ids) for ids in job["ids"]],
            "adapted": [distribution(url, name, ids) for ids in job["ids"]],
            "greedy": [greedy(url, name, ids, job) for ids in job["ids"]],
            "version": f"{version} at {url}",
        }
    finally:
        sent(url, "/v1/unload_lora_adapter", {"lora_name": name})


def distribution(url: str, model: str, ids: list[int]) -> Any:
    """The log-probabilities (vocabulary,) of the token that follows these."""
    import numpy as np

    asked = {"max_tokens": 1, "logprobs": -1, "return_tokens_as_token_ids": True}
    told = completed(url, model, ids, asked)["logprobs"]["top_logprobs"][0]
    found = {int(token.removeprefix("token_id:")): value for token, value in told.items()}
    row = np.full(max(found) + 1, -np.inf, np.float32)
    row[[*found]] = [*found.values()]
    return row


def greedy(url: str, model: str, ids: list[int], job: dict[str, Any]) -> list[int]:
    """The most likely tokens, without those that end a completion."""
    asked = {"max_tokens": job["greedy"], "stop_token_ids": job["ends"], "return_token_ids": True}
    made = completed(url, model, ids, asked)["token_ids"]
    return [token for token in made if token not in job["ends"]]


def completed(url: str, model: str, ids: list[int], asked: dict[str, Any]) -> Any:
    """What the server makes of a prompt."""
    body = {"model": model, "prompt": ids, "temperature": 0, **asked}
    return json.loads(sent(url, "/v1/completions", body))["choices"][0]


def sent(url: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    """The reply to a request; ends the process with a line where there is none."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url + path, data, {"Content-Type": "application/json"})) as reply:
            return bytes(reply.read())
    except HTTPError as error:
        if error.code == 404:
            raise SystemExit(f"{url}{path}: not found; expected vLLM with {NEEDED}") from None
        raise SystemExit(f"{url}{path}: {reason(error)}; expected {NEEDED}") from None
    except (URLError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise SystemExit(f"{url}: {why}; expected the URL of vLLM's server") from None


def reason(error: HTTPError) -> str:
    """Why the server refused, in its words."""
    said = error.read().decode("utf-8", "replace")
    try:
        return str(json.loads(said)["error"]["message"]).strip()
    except (ValueError, KeyError, TypeError):
        return str(error)
