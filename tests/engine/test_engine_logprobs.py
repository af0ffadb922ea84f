"""Log probabilities are those of transformers' own pass over the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import make_tokenizer
from engine_cases import processors, prompt
from lorafold.engine import Ended, Engine, Request, Sampling, Stream, Token

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


def ran(engine: Engine, *requests: Request) -> list[Stream]:
    streams = [engine.submit(request) for request in requests]
    engine.run()
    engine.check()
    assert [s.result().message for s in streams] == [""] * len(streams)
    return streams


def tokens_of(stream: Stream) -> list[Token]:
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
