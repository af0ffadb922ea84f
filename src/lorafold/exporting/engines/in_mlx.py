"""mlx-lm's answers on the CPU, its model in fp32. The job has `adapter` too, a directory.

mlx-lm refuses tensors that it has no module for. Modules that it adapts and the file has no tensors
for, and those whose values are not the file's, are told here.

On Linux mlx multiplies by a plain BLAS, so what all prompts begin with is computed once, and only
what a distribution is asked for goes through the head: mlx computes what is read.
"""

from copy import deepcopy
from itertools import takewhile
from pathlib import Path
from typing import Any

LEAVES = ("lora_a", "lora_b", "m")


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The answers, as `program` describes them."""
    import mlx.core as mx
    from mlx_lm import __version__
    from mlx_lm.utils import load

    mx.set_default_device(mx.cpu)
    base = load(job["base"])[0]
    base.set_dtype(mx.float32)
    before, _ = asked(base, job["ids"], 0, [])
    del base
    model, tokenizer = load(job["base"], adapter_path=job["adapter"])
    model.set_dtype(mx.float32)
    adapted, greedy = asked(model, job["ids"], job["greedy"], job["ends"])
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]]
    return {
        "adapted": adapted,
        "base": before,
        "greedy": greedy,
        "version": f"{__version__} (mlx {mx.__version__})",
        "unused": unused(model, job["adapter"]),
        "other_tokens": [n for n, ids in enumerate(job["ids"]) if list(ids) != texts[n]],
    }


def asked(model: Any, prompts: list[list[int]], most: int, ends: list[int]) -> tuple[Any, Any]:
    """Of each prompt the log-probabilities (vocabulary,) of the next token, and so many of the most
    likely tokens, without those that end a completion.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache

    columns = zip(*(ids[:-1] for ids in prompts), strict=False)
    common = len([*takewhile(lambda column: len(set(column)) == 1, columns)])
    start = make_prompt_cache(model)
    read(model, prompts[0][:common], start)
    found, greedy = [], []
    for ids in prompts:
        cache, made = deepcopy(start), list[int]()
        read(model, ids[common:-1], cache)
        logits = model(mx.array([ids[-1:]]), cache=cache)[0, -1]
        found.append(np.array(logits - mx.logsumexp(logits)))
        while len(made) < most and (token := int(logits.argmax())) not in ends:
            made.append(token)
            logits = model(mx.array([[token]]), cache=cache)[0, -1]
        greedy.append(made)
    return found, greedy


def read(model: Any, ids: list[int], cache: Any) -> None:
    """Put tokens into the cache."""
    import mlx.core as mx

    if ids:
        model(mx.array([ids]), cache=cache)
        mx.eval([layer.state for layer in cache])


def unused(model: Any, adapter: str) -> list[str]:
    """The parameters of adapters in the model and the file's tensors that do not agree."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    file: Any = mx.load(str(Path(adapter) / "adapters.safetensors"))
    found = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in LEAVES
    }
    both = found.keys() & file.keys()
    wrong = {name for name in both if not bool(mx.array_equal(found[name], file[name]))}
    return sorted((found.keys() ^ file.keys()) | wrong)
