"""The sampler computes what transformers' logits processors compute, and texts are what decoding
the whole completion gives.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from conftest import make_tokenizer
from engine_cases import check, choose, processors, prompt, sampling
from lorafold.engine import Engine, Request, Sampling
from lorafold.engine.sampler import NotFinite, Sampler, Unfit, filtered, noise
from lorafold.engine.sequence import Text
from lorafold.errors import LorafoldError

V = 60
PROMPT = (3, 7, 7, 11)


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
            expected = int((scores.softmax(-1)[0] / noise(4, step, V)).argmax())
        else:
            expected = int(scores.argmax())
        assert choose(sampler, logits(step)).token == expected
        ids.append(expected)


def test_filters_keep_at_least_the_likeliest() -> None:
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        (kept,) = filtered(logits(0)[None], [Sampling(temperature=1.0, **settings)])
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
        chosen = [choose(sampler, logits(i)).token for i in range(10)]
        assert set(chosen[:5]) <= {5, 6}
        assert not set(chosen[5:]) <= {5, 6}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("own", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite_raise(bad: float, own: Sampling) -> None:
    row = logits(0)
    row[7] = bad
    with pytest.raises(NotFinite):
        choose(Sampler(own, PROMPT), row)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1.0}, "temperature: found -1.0, expected 0 or more"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {1: float("inf")}}, "finite"),
        ({"stop": ("",)}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_p": 2.0, "top_k": -1}, "top_k.*top_p"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(LorafoldError, match=says):
        Sampling(**settings)


def pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    text, found = Text(tokenizer, stop), []
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


def test_every_setting_of_the_cases_is_a_sampling() -> None:
    assert len({str(sampling(i)) for i in range(7)}) == 7


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
            chosen = [choose(sampler, logits(i)).token for i in range(9)]
            assert all(0 <= token < (V if mask is None else 9) for token in chosen)


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    tiny, greedy = (Sampler(Sampling(temperature=t), PROMPT) for t in (1e-40, 0.0))
    for i in range(20):
        assert choose(tiny, logits(i)).token == choose(greedy, logits(i)).token


@pytest.mark.parametrize(
    "name", ["temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
def test_what_float32_does_not_hold_is_refused_by_name(name: str) -> None:
    for value in (1e39, 10**400, float("inf")):
        with pytest.raises(LorafoldError, match=f"^{name}: found .*finite number of float32"):
            Sampling(**{name: value})
    with pytest.raises(LorafoldError, match=r"^logit_bias: found 1e\+39"):
        Sampling(logit_bias={3: 1e39})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_admits_nothing_is_the_requests_own_fault(temperature: float) -> None:
    own = Sampling(temperature=temperature, regex="a")
    with pytest.raises(Unfit, match=r"^regex: .*no token may follow"):
        choose(Sampler(own, PROMPT, lambda tokens: torch.zeros(V, dtype=torch.bool)), logits(0))
