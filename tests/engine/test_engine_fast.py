"""Planned steps and fused modules compute what the model does, and nothing of them stays."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from engine_cases import METHODS, loaded, prompt, save_adapters, together, watch
from lorafold.engine import Engine, Request, Sampling
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage


def first_logits(model: Any, paths: dict[str, Path], **options: Any) -> torch.Tensor:
    """The logits (n, V) after the prompt and one token of requests with each adapter, and none."""
    seen: dict[str, torch.Tensor] = {}
    with loaded(Engine(model, slots=12, length=64, **options), paths) as engine:

        def see(rows: Any, counts: Any, logits: torch.Tensor) -> None:
            for b, row in enumerate(rows):
                if len(row.tokens) - len(row.request.prompt) == 1:
                    seen[row.request.id] = logits[b].double()

        watch(engine, see)
        for i, name in enumerate([None, *paths, None]):
            same = Sampling(logit_bias={7: 1e4})  # the same tokens in every engine
            engine.submit(Request(f"{i:02d}", prompt(3 + i, i), 3, name, same))
        engine.run()
    return torch.stack([seen[id] for id in sorted(seen)])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_in_bf16_it_errs_no_more_than_the_plain_path(kind, tiny_model, tmp_path) -> None:
    methods = METHODS if kind == "llama" else {k: METHODS[k] for k in ("lora", "dora", "prompt")}
    paths = save_adapters(tiny_model(kind), tmp_path, methods)
    exact = first_logits(tiny_model(kind).double(), paths, fast=False)
    plain = first_logits(tiny_model(kind).bfloat16(), paths, fast=False)
    quick = first_logits(tiny_model(kind).bfloat16(), paths)
    assert len(exact) == len(methods) + 2
    for e, p, q in zip(exact, plain, quick, strict=True):
        unit = 2**-8 * e.norm()
        assert (q - e).norm() <= 1.5 * (p - e).norm() + unit


def test_the_model_has_its_own_forwards_again(tiny_model, tmp_path) -> None:
    model = tiny_model("llama").bfloat16()
    names = ("lora", "houlsby", "prompt")
    paths = save_adapters(model, tmp_path, {name: METHODS[name] for name in names})
    asked = [Request(str(i), prompt(4, i), 5, [None, *names][i % 4]) for i in range(8)]
    with Engine(model, slots=4, length=64) as engine:
        inside = {path for path, m in model.named_modules() if "forward" in vars(m)}
        assert {"model.layers.0.mlp", "model.layers.1.self_attn"} <= inside
        for name, path in paths.items():
            engine.load(name, path)
        together(engine, asked)
        # what adapters of their own had covered is there again
        assert {path for path, m in model.named_modules() if "forward" in vars(m)} == inside
    assert not [path for path, m in model.named_modules() if "forward" in vars(m)]


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantized_bases_have_mixtures_too(storage, tiny_model_dir, tmp_path) -> None:
    """The logits err no more than those of the model with the adapter on it, in bf16."""
    model, wide = (
        load_model(tiny_model_dir("llama-wide"), Storage(dtype, storage))
        for dtype in (torch.bfloat16, torch.float32)
    )
    paths = save_adapters(
        model, tmp_path, {name: METHODS[name] for name in ("lora", "dora", "ia3")}
    )
    found = first_logits(model, paths)
    for each in (model, wide):
        for name, path in paths.items():
            lf.load(each, path, name)
    for i, (name, row) in enumerate(zip([None, *paths, None], found, strict=True)):
        ids, logits = torch.tensor([(*prompt(3 + i, i), 7)]), []
        for each in (model, wide):
            with torch.no_grad(), lf.only(each, *[name] * bool(name)):
                logits.append(each(ids, use_cache=False).logits[0, -1].double())
        plain, exact = logits
        assert (row - exact).norm() <= 1.5 * (plain - exact).norm() + 2**-8 * exact.norm()
