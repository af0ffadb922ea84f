"""vLLM's answers in this process, in fp32. The job has `adapter` too, a directory, and `lora`: the
values of its options and of its request that the launch line has.

Modules of the adapter that vLLM loads and applies nowhere, which it tells in its debug log alone,
are told here.
"""

import os
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
ROOM = 16  # tokens beside a prompt and its greedy text


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The answers, as `program` describes them."""
    import vllm
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(
        model=job["base"], dtype="float32", enforce_eager=True, enable_lora=True, max_loras=1,
        max_model_len=max(map(len, job["ids"])) + job["greedy"] + ROOM, max_num_seqs=8,
        max_logprobs=-1, enable_prefix_caching=False, **job["lora"]["engine"],
    )  # fmt: skip
    lora = LoRARequest("exported", 1, job["adapter"], **job["lora"]["request"])
    tokenizer = llm.get_tokenizer()
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]]
    return {
        "base": [distribution(llm, ids, None) for ids in job["ids"]],
        "adapted": [distribution(llm, ids, lora) for ids in job["ids"]],
        "greedy": greedy(llm, job, lora),
        "version": vllm.__version__,
        "unused": sorted({name for found in llm.collective_rpc(unused) for name in found}),
        "other_tokens": [n for n, ids in enumerate(job["ids"]) if list(ids) != texts[n]],
    }


def distribution(llm: Any, ids: list[int], lora: Any) -> Any:
    """The log-probabilities (vocabulary,) of the token that follows these."""
    import numpy as np
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    given: Any = {"prompt_token_ids": ids}
    made = llm.generate([given], params, lora_request=lora, use_tqdm=False)[0].outputs[0]
    found = made.logprobs[0]
    row = np.full(max(found) + 1, -np.inf, np.float32)
    row[[*found]] = [entry.logprob for entry in found.values()]
    return row


def greedy(llm: Any, job: dict[str, Any], lora: Any) -> list[list[int]]:
    """The most likely tokens after each prompt, without those that end a completion."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=job["greedy"], temperature=0, stop_token_ids=job["ends"], detokenize=False
    )
    given: list[Any] = [{"prompt_token_ids": ids} for ids in job["ids"]]
    rows = llm.generate(given, params, lora_request=lora, use_tqdm=False)
    made = [[*row.outputs[0].token_ids] for row in rows]
    return [[token for token in tokens if token not in job["ends"]] for tokens in made]


def unused(worker: Any) -> list[str]:
    """The modules that adapters have factors for and the model has not."""
    manager = worker.model_runner.lora_manager._adapter_manager
    loras = [one.loras.keys() for one in manager.list_adapters().values()]
    return sorted(set().union(*loras) - manager.modules.keys())
