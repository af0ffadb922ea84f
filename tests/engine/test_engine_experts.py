"""Adapters of experts: requests have the tokens of transformers' `generate`."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lorafold as lf
from conftest import lorafold, make_tokenizer
from engine_cases import (
    alone,
    ended,
    expected,
    loaded,
    prompt,
    same_bits,
    save_adapters,
    together,
    watch,
)
from lorafold.engine import Engine, Request
from mixtures import CONFIGS, mixture

SPECS = {
    "lora": lf.LoRA(rank=4),
    "dora": lf.DoRA(over=lf.LoRA(rank=3)),
    "loha": lf.LoHa(rank=2),
    "ia3": lf.IA3(),
}
OPTIONS = {"slots": 4, "length": 64, "chunk": 7, "budget": 14}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], dict[str, Path]]:
    """An adapter of each method over all linears and experts, and one over attention alone."""

    @cache
    def made(kind: str) -> dict[str, Path]:
        model, root = mixture(kind), tmp_path_factory.mktemp(kind)
        attention = {"attention": lf.LoRA(rank=4)}
        alone = save_adapters(model, root, attention, targets=["o_proj"])
        return save_adapters(model, root, SPECS) | alone

    return made


def requests() -> list[Request]:
    names = [None, "lora", "dora", "attention", "loha", "lora", None, "ia3", "attention", "dora"]
    lengths = (3, 17, 1, 40, 8, 23)
    return [
        Request(str(i), prompt(lengths[i % 6], i), 5 + i % 5, adapter=name)
        for i, name in enumerate(names)
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize("invariant", [False, True], ids=["free", "invariant"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_are_those_of_generate_with_the_adapter_attached(kind, invariant, saved) -> None:
    model, paths, asked = mixture(kind), saved(kind), requests()
    tokens = [expected(model, request, paths) for request in asked]
    classes = {path: type(m) for path, m in model.named_modules()}
    with loaded(Engine(model, **OPTIONS, invariant=invariant), paths) as engine:
        assert engine.is_batched, engine.structure.unbatched_reason
        assert together(engine, asked, steps_between=1) == tokens
    assert classes == {path: type(m) for path, m in model.named_modules()}
    again = [alone(model, request, paths, **OPTIONS, invariant=invariant) for request in asked[:4]]
    assert again == tokens[:4]
    assert len(set(tokens)) > 5
    assert len({expected(model, Request("", asked[1].prompt, 9, adapter=name), paths)
                for name in (None, "lora", "dora")}) == 3  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_invariant_logits_are_the_same_bits_in_any_company(kind, dtype, saved) -> None:
    model, paths = mixture(kind, dtype), saved(kind)
    asked = [
        Request(str(i), prompt(5 + 3 * i, i), 8, adapter=name)
        for i, name in enumerate([None, "lora", "attention", None, "lora", "attention"])
    ]
    options = OPTIONS | {"invariant": True, "prefix_reuse": False}
    with loaded(Engine(model, **options), paths) as engine:
        for request in asked:
            same_bits(engine, request, [other for other in asked if other is not request])


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_the_fast_parts_leave_no_expert_out_in_16_bits(kind, tmp_path, monkeypatch) -> None:
    """Every token meets every expert, or a router's rounding would be most of the error."""
    config = CONFIGS[kind]()
    config.num_experts_per_tok = config.num_local_experts
    monkeypatch.setitem(CONFIGS, kind, lambda: config)
    ids, paths = prompt(30, 3), save_adapters(mixture(kind), tmp_path, {"lora": SPECS["lora"]})

    def own(dtype: torch.dtype, name: str | None = "lora") -> Tensor:
        model = mixture(kind, dtype)
        if name:
            lf.load(model, paths[name], allow_other_base=True)
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1].float()

    seen: list[Tensor] = []
    model = mixture(kind, torch.bfloat16)
    lf.load(model, paths["lora"], "lora", allow_other_base=True)
    with lf.only(model), Engine(model, length=64) as engine:
        engine.adopt("mine", ["lora"])
        watch(engine, lambda rows, counts, logits: seen.append(logits))
        assert ended(engine, Request("1", ids, 1, adapter="mine")).message == ""
    exact, plain, base = own(torch.float32), own(torch.bfloat16), own(torch.float32, None)
    error = (seen[0][0].float() - exact).norm()
    assert error <= 2 * (plain - exact).norm()
    assert error < 0.3 * (base - exact).norm()


def test_generate_with_an_attached_adapter_and_a_prefix_that_is_shared(saved) -> None:
    model, paths = mixture("mixtral"), saved("mixtral")
    start = prompt(20, 1)
    asked = [Request("1", start, 6), Request("2", (*start, 5, 6), 6)]
    asked += [Request("3", (*start, 5, 6), 6, adapter="lora")]
    tokens = [expected(model, request, paths) for request in asked]
    with Engine(model, **OPTIONS) as engine:
        engine.load("lora", paths["lora"])
        ends = [ended(engine, request) for request in asked]
    assert [e.tokens for e in ends] == tokens
    assert [e.cached > 0 for e in ends] == [False, True, False]  # never another adapter's


def test_the_command_generates_what_generate_does(saved, tmp_path) -> None:
    model, adapter = mixture("mixtral"), saved("mixtral")["dora"]
    tokenizer, question = make_tokenizer(), "Book a table for four"
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        lf.load(model, adapter)
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    done = lorafold(
        "generate", "--model", str(tmp_path / "base"), "--adapter", str(adapter), "--prompt",
        question, "--max-new-tokens", "12", "--storage", "fp32", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = json.loads(done.stdout.splitlines()[-1])["text"]
    assert text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    assert text
