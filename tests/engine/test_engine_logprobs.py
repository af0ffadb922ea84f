"""Log probabilities are those of transformers' own pass over the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from conftest import make_tokenizer
from engine_cases import METHODS, check, processors, prompt, save_adapters
from lorafold.engine import Ended, Engine, EventStream, Request, Sampling, Token
from lorafold.engine.sampler import NOT_FINITE
from lorafold.errors import LorafoldError

OPTIONS: dict[str, Any] = {"length": 96, "chunk": 12, "budget": 24}


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """What transformers' model says (T, V) after each of the tokens."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def logp(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    return logits(model, ids).log_softmax(-1)


def ran(engine: Engine, *requests: Request) -> list[EventStream]:
    streams = [engine.submit(request) for request in requests]
    engine.run()
    check(engine)
    assert [s.result().message for s in streams] == [""] * len(streams)
    return streams


def tokens_of(stream: EventStream) -> list[Token]:
    return [event for event in stream.so_far() if isinstance(event, Token)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_token_that_ends_a_completion_can_be_kept(model, temperature: float) -> None:
    own = Sampling(temperature=temperature, seed=3, logprobs=2)
    ids = prompt(9, 1)
    with Engine(model, make_tokenizer(), slots=3, **OPTIONS) as engine:
        (whole,) = ran(engine, Request("0", ids, 12, sampling=own))
        end = whole.result().tokens[5]
        at = whole.result().tokens.index(end)
        asked = {"max_new_tokens": 12, "sampling": own, "ends": frozenset([end])}
        kept, not_kept = ran(
            engine, Request("1", ids, keep_end=True, **asked), Request("2", ids, **asked)
        )
        # the end may be the last token that there is room for
        (just,) = ran(
            engine, Request("3", ids, at + 1, sampling=own, ends=frozenset([end]), keep_end=True)
        )
    first = whole.result().tokens[: at + 1]
    assert kept.result() == Ended("1", "end", first, not_kept.result().text)
    assert not_kept.result().tokens == first[:-1]
    assert (just.result().reason, just.result().tokens) == ("end", first)
    expected = logp(model, ids + first)
    last = tokens_of(kept)[-1]
    assert (last.token, last.text, len(tokens_of(kept))) == (end, "", at + 1)
    assert last.logprob == pytest.approx(float(expected[-2, end]), abs=1e-5)
    assert [p for _, p in last.top] == pytest.approx(expected[-2].topk(2).values.tolist(), abs=1e-5)


def test_a_grammar_s_end_can_be_kept(model) -> None:
    pytest.importorskip("llguidance")
    tokenizer = make_tokenizer()
    request = Request("1", prompt(5, 1), 20, sampling=Sampling(regex="ab"), keep_end=True)
    with Engine(model, tokenizer, slots=1, **OPTIONS) as engine:
        (stream,) = ran(engine, request)
    ended = stream.result()
    assert (ended.reason, ended.text) == ("end", "ab")
    assert ended.tokens[-1] == tokenizer.eos_token_id


SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 7},
    {"temperature": 1.4, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 0.8, "repetition_penalty": 1.4, "top_k": 40, "top_p": 0.9},
)


def test_the_distribution_drawn_from_is_transformers_processors(model) -> None:
    asked = [
        Request(str(i), prompt(8 + i, i), 16, sampling=Sampling(**own, seed=i, logprobs=0))
        for i, own in enumerate(SETTINGS)
    ]
    with Engine(model, slots=3, **OPTIONS) as engine:
        streams = ran(engine, *asked)
    for stream in streams:
        request, tokens = stream.request, stream.result().tokens
        ids = request.prompt + tokens
        raw = logits(model, ids)
        for n, event in enumerate(tokens_of(stream), len(request.prompt)):
            own = raw[None, n - 1]
            changed = processors(request.sampling)(torch.tensor([ids[:n]]), own.clone())
            drawn = float(changed.log_softmax(-1)[0, event.token])
            assert event.drawn_logprob == pytest.approx(drawn, abs=1e-4)
            assert event.logprob == pytest.approx(
                float(own.log_softmax(-1)[0, event.token]), abs=1e-5
            )


def scores_of(stream: EventStream) -> list[float | None]:
    assert [one.token for one in stream.prompt] == list(stream.request.prompt)
    return [one.logprob for one in stream.prompt]


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), METHODS)


@pytest.mark.parametrize("options", [{}, {"invariant": True}], ids=str)
def test_the_tokens_of_prompts_have_transformers_log_probabilities(
    model, paths, options: Any
) -> None:
    lengths = (1, 2, 12, 13, 25, 40, 41, 30, 29)
    names = (None, *METHODS)
    asked = [
        Request(str(i), prompt(n, i), i % 3, name, prompt_logprobs=(0, 2)[i % 2])
        for i, (n, name) in enumerate(zip(lengths, names, strict=True))
    ]
    asked.append(Request("not asked", prompt(40, 6), 5, "ia3"))
    with Engine(model, slots=6, **OPTIONS, **options) as engine:
        for name, path in paths.items():
            engine.load(name, path)
        streams = ran(engine, *asked)
    assert streams.pop().prompt == ()
    for stream in streams:
        request = stream.request
        adapter = lf.load(model, paths[request.adapter], name="it") if request.adapter else None
        expected = logp(model, request.prompt)
        if adapter is not None:
            adapter.detach()
        first, *others = scores_of(stream)
        own = expected[:-1].gather(1, torch.tensor(request.prompt[1:])[:, None].long())[:, 0]
        assert first is None
        assert others == pytest.approx(own.tolist(), abs=1e-4)
        k = request.prompt_logprobs
        assert stream.prompt[0].top == ()
        for one, best in zip(stream.prompt[1:], expected, strict=False):
            assert [p for _, p in one.top] == pytest.approx(best.topk(k).values.tolist(), abs=1e-4)
        assert len(stream.result().tokens) == request.max_new_tokens


def test_scores_follow_from_the_request_alone(model, paths) -> None:
    """Beside others, after the same prompt, and shared with completions of it."""
    ids = prompt(40, 1)
    asked = [Request(f"{i}", ids, 6, "lora", prompt_logprobs=1) for i in range(3)]
    asked += [Request("plain", ids, 6, "lora"), Request("other", prompt(31, 2), 6)]
    with Engine(model, slots=2, **OPTIONS) as engine:
        engine.load("lora", paths["lora"])
        first = ran(engine, asked[0])[0]
        assert first.result().cached == 0
        expected = scores_of(first)
        again = ran(engine, *asked)
    assert [stream.result().tokens for stream in again[:4]] == [first.result().tokens] * 4
    for stream in again[:3]:
        assert scores_of(stream) == pytest.approx(expected, abs=1e-5)
    assert again[0].result().cached == 0
    assert [stream.prompt for stream in again[3:]] == [(), ()]


def test_never_more_logits_than_of_a_chunk(model) -> None:
    with Engine(model, slots=2, **OPTIONS) as engine:
        seen: list[int] = []
        handle = model.lm_head.register_forward_hook(lambda m, x, y: seen.append(y[..., 0].numel()))
        ran(engine, *(Request(str(i), prompt(70, i), 0, prompt_logprobs=0) for i in range(2)))
        assert max(seen) == OPTIONS["budget"]
        seen.clear()
        ran(engine, *(Request(str(i), prompt(70, i), 1) for i in range(2)))
        assert max(seen) <= 4
        handle.remove()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs: found 21, expected 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs: found -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected 1 or more"),
        ({"max_new_tokens": -1, "prompt_logprobs": 0}, "max_new_tokens: found -1"),
    ],
)
def test_what_has_no_scores_is_refused(model, given: dict[str, Any], says: str) -> None:
    with Engine(model, slots=1, **OPTIONS) as engine:
        with pytest.raises(LorafoldError, match=says):
            engine.submit(Request("1", prompt(3, 1), **{"max_new_tokens": 2} | given))
        check(engine)


def test_logits_that_are_not_finite_within_a_prompt_end_the_request(model) -> None:
    with Engine(model, slots=2, **OPTIONS) as engine:

        def spoil(module: Any, inputs: Any, logits_BTV: torch.Tensor) -> None:
            logits_BTV[:, 3:4] = float("nan")

        handle = model.lm_head.register_forward_hook(spoil)
        asked = [Request(str(k), prompt(9, 1), 2, prompt_logprobs=k) for k in (0, None)]
        scored, plain = [engine.submit(request) for request in asked]
        engine.step()
        handle.remove()
        engine.run()
    assert scored.result().message == NOT_FINITE
    assert plain.result().reason == "length"
