"""`echo`: a completion begins with its prompt, whose tokens have the model's log probabilities."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch

import lorafold as lf
from conftest import make_model_dir
from fresh_models import fresh_model
from serving_cases import Running, running, saved

PROMPT = "Book a table <|im_end|> for four at the Copper Lantern, naïve 日."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = make_model_dir("llama", folder / "base")
    return model, saved(model, {"a": lf.LoRA(rank=2)}, folder / "adapters")


@pytest.fixture(scope="module")
def server(folders):
    with running(*folders) as found:
        yield found


@pytest.fixture(scope="module")
def expected(folders):
    """What transformers' own pass over tokens says of each one, and the likeliest."""
    path, adapters = folders
    model = fresh_model(path)
    lf.load(model, adapters / "a")

    def of(ids: list[int]) -> tuple[list[float], list[float]]:
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return own.tolist(), logp.max(-1).values.tolist()

    return of


def check(choice: Any, ids: list[int], expected: Any) -> None:
    own, best = expected(ids)
    first, *others = choice.logprobs.token_logprobs
    assert first is None
    assert choice.logprobs.top_logprobs[0] is None
    assert others == pytest.approx(own, abs=1e-4)
    tops = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    assert tops == pytest.approx(best, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids)
    offsets = choice.logprobs.text_offset
    assert offsets == sorted(offsets)
    assert 0 == offsets[0] < offsets[-1] <= len(choice.text)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_prompts_have_log_probabilities(server: Running, expected, max_tokens: int) -> None:
    client: Any = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    more = {"ignore_eos": True, "return_token_ids": True}
    asked: dict[str, Any] = {"model": "a", "max_tokens": max_tokens, "temperature": 0, "n": 2}
    asked |= {"echo": True, "logprobs": 1, "extra_body": more}
    prompts = [PROMPT, "It rains."]
    found = client.completions.create(prompt=prompts, **asked)
    assert found.usage.completion_tokens == 4 * max_tokens
    for i, choice in enumerate(found.choices):
        check(choice, choice.prompt_token_ids + choice.token_ids, expected)
        assert choice.text.startswith(prompts[i // 2])
        if not max_tokens:
            assert choice.text == prompts[i // 2]
    ids = found.choices[0].prompt_token_ids
    again = client.completions.create(prompt=ids, **asked).choices[0]
    assert (again.text, again.logprobs) == (found.choices[0].text, found.choices[0].logprobs)
    parts = [c.choices[0] for c in client.completions.create(prompt=PROMPT, stream=True, **asked)]
    parts = [part for part in parts if part.index == 1]
    assert "".join(part.text for part in parts) == again.text
    likely = [p for part in parts if part.logprobs for p in part.logprobs.token_logprobs]
    assert likely == again.logprobs.token_logprobs
    offsets = [p for part in parts if part.logprobs for p in part.logprobs.text_offset]
    assert offsets == again.logprobs.text_offset


def test_an_echo_without_log_probabilities_is_the_text(server: Running) -> None:
    plain = server.text("a", PROMPT)
    assert server.text("a", PROMPT, echo=True) == PROMPT + plain
    streamed = server.complete("a", PROMPT, echo=True, stream=True).events
    assert "".join(one["choices"][0]["text"] for one in streamed) == PROMPT + plain
    assert all(one["choices"][0]["logprobs"] is None for one in streamed)


def test_one_prompt_is_read_once_for_all_its_completions(server: Running) -> None:
    runner = server.engine._runner
    forward, computed = runner.forward, []

    def spied(rows: Any, counts: Any) -> Any:
        computed.append(sum(counts))
        return forward(rows, counts)

    runner.forward = spied  # type: ignore[method-assign]
    many = {"max_tokens": 3, "n": 6, "temperature": 1, "seed": 1, "ignore_eos": True}
    turns = [{"role": "user", "content": "How is the weather in Rome on a day such as this?"}]
    for path, asked in {
        "/v1/completions": {"prompt": "How are you on a day such as this, and why?"},
        "/v1/chat/completions": {"messages": turns},
    }.items():
        computed.clear()
        answer = server.ask(path, {"model": "a"} | asked | many).json
        assert len(answer["choices"]) == 6
        # those that came after it was read compute its last token
        once = answer["usage"]["prompt_tokens"] + 6 * 2
        assert once <= sum(computed) <= once + 5
    runner.forward = forward  # type: ignore[method-assign]
