"""The sampler, against transformers' logits processors and log probabilities."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TopPLogitsWarper

import lorafold as lf
from conftest import make_tokenizer
from engine_cases import METHODS, check, choose, loaded, processors, prompt, sampling, save_adapters
from lorafold.engine import Ended, Engine, EventStream, Request, Sampling, Token
from lorafold.engine.sampler import (
    NOT_FINITE,
    GrammarError,
    NotFinite,
    Sampler,
    draw,
    filter_logits,
    sample_tokens,
    uniform,
)
from lorafold.engine.sequence import Detokenizer
from lorafold.errors import LorafoldError

V = 60
PROMPT = (3, 7, 7, 11)
PENALTIES = ("repetition", "presence", "frequency")


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers_processors(settings: dict[str, Any]) -> None:
    own = Sampling(**settings, seed=4)
    sampler = Sampler(own, PROMPT)
    ids = list(PROMPT)
    for step in range(40):
        scores = processors(own)(torch.tensor([ids]), logits(step)[None].clone())
        if own.temperature:
            expected = int((scores.softmax(-1)[0].cumsum(-1) > uniform(4, step)).int().argmax())
        else:
            expected = int(scores.argmax())
        assert choose(sampler, logits(step)).token == expected
        ids.append(expected)


def test_filters_keep_at_least_the_likeliest() -> None:
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        (kept,) = filter_logits(logits(0)[None], [Sampling(temperature=1.0, **settings)])
        assert torch.isfinite(kept).nonzero()[:, 0].tolist() == [int(logits(0).argmax())]


def test_presence_frequency_and_bias_are_their_formula() -> None:
    own = Sampling(presence_penalty=0.7, frequency_penalty=0.3, logit_bias={2: 1.5, 9: -4.0})
    sampler, counts = Sampler(own, PROMPT), torch.zeros(V)
    for step in range(60):
        scores = logits(step % 3) - 0.7 * (counts > 0) - 0.3 * counts
        scores[2] += 1.5
        scores[9] -= 4
        token = choose(sampler, logits(step % 3)).token
        assert token == int(scores.argmax())
        counts[token] += 1
    assert len(set(sampler.tokens)) > 10  # the penalties do something


def test_logprobs_are_the_models_own() -> None:
    own = Sampling(temperature=0.3, logprobs=3, logit_bias={1: 9.0})
    found = choose(Sampler(own, PROMPT), logits(1))
    own = logits(1).log_softmax(-1)
    assert found.logprob == pytest.approx(float(own[found.token]))
    assert [token for token, _ in found.top] == own.topk(3).indices.tolist()
    assert [p for _, p in found.top] == pytest.approx(own.topk(3).values.tolist())
    assert choose(Sampler(Sampling(logprobs=0), PROMPT), logits(1)).top == ()


def test_a_token_has_the_log_probability_of_what_it_was_drawn_from() -> None:
    allowed = torch.arange(V) < 9
    changes = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {2: 1.5}}
    sampler = Sampler(
        Sampling(temperature=0.5, logprobs=0, seed=1, **changes), (), lambda _: allowed
    )
    counts = torch.zeros(V)
    for step in range(20):
        scores = logits(step % 3) - 0.7 * (counts > 0) - 0.3 * counts
        scores[2] += 1.5
        found = choose(sampler, logits(step % 3))
        expected = (scores[:9] / 0.5).log_softmax(-1)[found.token]
        assert found.drawn_logprob == pytest.approx(float(expected), abs=1e-5)
        counts[found.token] += 1
    plain = choose(Sampler(Sampling(temperature=1.0, logprobs=0), ()), logits(0))
    assert plain.drawn_logprob == pytest.approx(plain.logprob)
    assert choose(Sampler(Sampling(logprobs=0), ()), logits(0)).drawn_logprob == 0
    assert choose(Sampler(Sampling(temperature=1.0), ()), logits(0)).drawn_logprob is None


def test_only_allowed_tokens_are_chosen() -> None:
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[[5, 6]] = True
    for own in (Sampling(), Sampling(temperature=2.0)):
        sampler = Sampler(own, PROMPT, lambda tokens: allowed if len(tokens) < 5 else None)
        sampled = [choose(sampler, logits(i)).token for i in range(10)]
        assert set(sampled[:5]) <= {5, 6}
        assert not set(sampled[5:]) <= {5, 6}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1.0}, "temperature: found -1.0, expected 0 or more"),
        ({"seed": None}, "seed: found None, expected an integer"),
        ({"seed": 1.5}, "seed: found 1.5, expected an integer"),
        ({"top_k": 5.0}, "top_k: found 5.0, expected an integer"),
        ({"logprobs": 2.0}, "logprobs: found 2.0, expected an integer"),
        ({"logit_bias": {True: 1.0}}, "logit_bias: found True, expected an integer"),
        ({"stop": "abc"}, "stop: found 'abc', expected a list"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {1: float("inf")}}, "finite"),
        ({"stop": ("",)}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_p": 2.0, "top_k": -1}, "top_k.*top_p"),
        ({"logit_bias": {3: 1e39}}, r"^logit_bias: found 1e\+39"),
        *(
            ({name: value}, f"^{name}: found .*finite float32 number")
            for name in ("temperature", *(f"{x}_penalty" for x in PENALTIES))
            for value in (1e39, 10**400, float("inf"))
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(LorafoldError, match=says):
        Sampling(**settings)


def pieces(
    tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], Detokenizer]:
    text, found = Detokenizer(tokenizer, stop), []
    for token in ids:
        found.append(text.add(token))
        if text.stopped:
            break
    found.append(text.finish())
    return found, text


def test_pieces_are_the_text() -> None:
    tokenizer = make_tokenizer()
    for words in ("Book a table for four.", "naïve café, 日本語 \N{GRINNING FACE} ok", " a  b \n"):
        ids = tokenizer(words, add_special_tokens=False).input_ids
        found, text = pieces(tokenizer, ids)
        assert "".join(found) == text.text == words
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in found)
    cut = tokenizer("日", add_special_tokens=False).input_ids[:1]
    assert "".join(pieces(tokenizer, cut)[0]) == tokenizer.decode(cut)


def test_random_tokens_give_the_text_of_all_of_them() -> None:
    tokenizer = make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(3, 128, (12,), generator=generator).tolist()
        assert "".join(pieces(tokenizer, ids)[0]) == tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("stop", ["ai", "o", "a table f", "B", "four.", "xyz", "our.!"])
def test_stop_texts_cut_the_completion_wherever_tokens_end(stop: str) -> None:
    tokenizer, words = make_tokenizer(), "Book a table for four. It rains."
    ids = [i for c in words for i in tokenizer(c, add_special_tokens=False).input_ids]
    found, text = pieces(tokenizer, ids, (stop, "never"))
    assert text.stopped == (stop in words)
    assert "".join(found) == text.text == words.split(stop)[0]


def test_structured_output_fits_the_schema_or_the_regex(tiny_model) -> None:
    pytest.importorskip("llguidance")
    tokenizer, model = make_tokenizer(), tiny_model("llama")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}, "b": {"enum": ["yes", "no"]}},
        "required": ["n", "b"],
        "additionalProperties": False,
    }
    asked = [
        Request(str(i), prompt(5, i), 60, sampling=Sampling(temperature=t, seed=i, **kind))
        for i, (t, kind) in enumerate(
            (t, kind)
            for t in (0.0, 1.0, 2.0)
            for kind in ({"schema": json.dumps(schema)}, {"regex": "[a-f]{3}-(yes|no)"}, {})
        )
    ]
    with Engine(model, tokenizer, slots=4, length=80) as engine:
        streams = [engine.submit(request) for request in asked]
        engine.run()
    for i, stream in enumerate(streams):
        ended = stream.result()
        assert ended.message == ""
        if i % 3 == 0 and ended.reason == "end":  # blanks may go on to the last token
            found = json.loads(ended.text)
            assert set(found) == {"n", "b"}
            assert isinstance(found["n"], int)
        if i % 3 == 1:
            assert ended.reason == "end"
            assert re.fullmatch("[a-f]{3}-(yes|no)", ended.text)
    assert any(s.result().reason == "end" for s in streams[::3])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"schema": "{"}, "schema"),
        ({"regex": "("}, "regex"),
        ({"schema": '{"type": "x"}'}, "schema"),
    ],
)
def test_grammars_that_cannot_be_read_are_refused(tiny_model, kind, says) -> None:
    pytest.importorskip("llguidance")
    request = Request("1", prompt(3, 1), 5, sampling=Sampling(**kind))
    with Engine(tiny_model("llama"), make_tokenizer(), slots=2, length=32) as engine:
        with pytest.raises(LorafoldError, match=f"^request '1': {says}: ") as error:
            engine.submit(request)
        assert "\n" not in str(error.value)
        check(engine)
    with (
        Engine(tiny_model("llama"), slots=2, length=32) as engine,
        pytest.raises(LorafoldError, match="no tokenizer"),
    ):
        engine.submit(request)


EXTREMES = (
    {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 3e38}, {"top_p": 5e-324},
    {"min_p": 5e-324}, {"top_p": 1e-40, "min_p": 1.0, "top_k": 10**30},
    {"repetition_penalty": 5e-324}, {"repetition_penalty": 3e38},
    {"presence_penalty": 3e38, "frequency_penalty": 3e38},
    {"presence_penalty": -3e38, "frequency_penalty": -3e38, "repetition_penalty": 3e38},
    {"logit_bias": {i: -3.4e38 for i in range(V)}}, {"logit_bias": {7: 3.4e38, 8: 3.4e38}},
    {"logit_bias": {i: -100 for i in range(V)}},
)  # fmt: skip


@pytest.mark.parametrize("settings", EXTREMES, ids=lambda settings: str(settings)[:60])
def test_extremes_choose_a_token(settings: dict[str, Any]) -> None:
    allowed = torch.arange(V) < 9
    for temperature in {0.0, 1.0, settings.get("temperature", 1e-40)}:
        own = Sampling(**{"seed": 3, **settings, "temperature": temperature})
        for mask in (None, lambda tokens: allowed):
            sampler = Sampler(own, PROMPT, mask)
            sampled = [choose(sampler, logits(i)).token for i in range(9)]
            assert all(0 <= token < (V if mask is None else 9) for token in sampled)


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    tiny, greedy = (Sampler(Sampling(temperature=t), PROMPT) for t in (1e-40, 0.0))
    for i in range(20):
        assert choose(tiny, logits(i)).token == choose(greedy, logits(i)).token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_admits_nothing_is_the_requests_own_fault(temperature: float) -> None:
    own = Sampling(temperature=temperature, regex="a")
    with pytest.raises(GrammarError, match=r"^regex: .*no token may follow"):
        choose(Sampler(own, PROMPT, lambda tokens: torch.zeros(V, dtype=torch.bool)), logits(0))


def test_draws_have_the_probabilities_of_their_distribution() -> None:
    many, p = 5_000, (3 * torch.randn(V, generator=torch.Generator().manual_seed(2))).softmax(-1)
    for seed in (5, 1 << 60):
        tokens = draw(p.expand(many, V), [uniform(seed, i) for i in range(many)])
        counts = torch.bincount(tokens, minlength=V)
        expected = many * p
        large = expected > 5
        chi = ((counts - expected) ** 2 / expected)[large].sum()
        n = int(large.sum())
        assert abs(float(chi) - n) < 4 * (2 * n) ** 0.5
    some = (0, -1, -2, -500, 1 << 63, (1 << 63) + 900, 1 << 62)
    assert len({uniform(seed, 0) for seed in some}) == len(some)
    seeds = torch.tensor([[uniform(seed, i) for i in range(9)] for seed in range(many)])
    assert seeds.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(seeds.T).fill_diagonal_(0).abs().max() < 0.08


def test_excluded_tokens_are_drawn_at_neither_end() -> None:
    p = torch.tensor([[0.0, 0.2, 0.0, 0.3, 0.1, 0.0]])
    ends = {0.0: 1, 0.3333: 1, 0.3334: 3, 0.8333: 3, 0.8334: 4, 1 - 2.0**-53: 4}
    assert draw(p.expand(len(ends), -1), [*ends]).tolist() == [*ends.values()]


@pytest.mark.parametrize("vocabulary", [300, 3001])
def test_a_row_has_the_token_and_the_bits_that_it_has_alone(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = [replace(sampling(i), seed=i, logprobs=(None, 2)[i % 2]) for i in range(21)]
    settings += [Sampling(1.0, top_p=p, min_p=0.001, logprobs=1) for p in (0.3, 0.9, 0.9999)]
    company = [Sampler(own, PROMPT) for own in settings]
    single = [Sampler(own, PROMPT) for own in settings]
    for _ in range(4):
        rows = torch.randn(len(settings), vocabulary, generator=generator).bfloat16()
        found = sample_tokens(company, rows)
        assert found == [choose(own, row) for own, row in zip(single, rows, strict=True)]
    assert [a.tokens for a in company] == [b.tokens for b in single]


def test_top_p_is_that_of_transformers_in_a_large_vocabulary() -> None:
    rows = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    rows[1] *= 4
    for p in (0.2, 0.9, 0.999):
        own = Sampling(temperature=1.0, top_p=p)
        expected = TopPLogitsWarper(p)(torch.zeros(2, 1, dtype=torch.long), rows.clone())
        assert torch.equal(filter_logits(rows, [own, own]).isfinite(), expected.isfinite())


def test_logits_that_are_not_finite_are_an_error_of_their_row_alone() -> None:
    rows = torch.randn(6, V)
    rows[1:3, 3], rows[3:5, 3] = float("nan"), float("inf")
    samplers = [Sampler(Sampling(temperature=t), ()) for t in (1.0, 1.0, 0.0, 1.0, 0.0, 0.0)]
    found = sample_tokens(samplers, rows)
    assert [isinstance(one, NotFinite) for one in found] == [False, *[True] * 4, False]
    assert [len(own.tokens) for own in samplers] == [1, 0, 0, 0, 0, 1]


OPTIONS: dict[str, Any] = {"length": 96, "chunk": 12, "budget": 24}


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


def logits_of(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """What transformers' model says (T, V) after each of the tokens."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def logp(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    return logits_of(model, ids).log_softmax(-1)


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
        raw = logits_of(model, ids)
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
def test_the_tokens_of_prompts_have_transformers_log_probabilities(model, paths, options) -> None:
    lengths = (1, 2, 12, 13, 25, 40, 41, 30, 29)
    names = (None, *METHODS)
    asked = [
        Request(str(i), prompt(n, i), i % 3, name, prompt_logprobs=(0, 2)[i % 2])
        for i, (n, name) in enumerate(zip(lengths, names, strict=True))
    ]
    asked.append(Request("not asked", prompt(40, 6), 5, "ia3"))
    with loaded(Engine(model, slots=6, **OPTIONS, **options), paths) as engine:
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


def test_never_more_logits_than_of_a_chunk(model, monkeypatch) -> None:
    with Engine(model, slots=2, **OPTIONS) as engine:
        seen: list[int] = []
        step = engine._runner.plan.step  # type: ignore[attr-defined]

        def watched(*given: Any) -> Any:
            seen.append(len(given[-1]))
            return step(*given)

        monkeypatch.setattr(engine._runner.plan, "step", watched)  # type: ignore[attr-defined]
        ran(engine, *(Request(str(i), prompt(70, i), 0, prompt_logprobs=0) for i in range(2)))
        assert max(seen) == OPTIONS["budget"]
        seen.clear()
        ran(engine, *(Request(str(i), prompt(70, i), 1) for i in range(2)))
        assert max(seen) <= 4


def test_logits_that_are_not_finite_within_a_prompt_end_the_request(model) -> None:
    with Engine(model, slots=2, fast=False, **OPTIONS) as engine:

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
