"""Prompt tuning alone: against its definition, embeddings in front of the input; the rest is in
test_methods_prefix.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import lorafold as lf

IDS = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma"])
def test_it_is_the_model_with_embeddings_in_front(kind: str, tiny_model) -> None:
    model, plain = tiny_model(kind), tiny_model(kind)
    delta = next(iter(lf.attach(model, lf.Prompt(tokens=4)).deltas.values()))
    front = delta.embeddings.detach().clone().requires_grad_(True)
    inputs = torch.cat([front.expand(3, -1, -1), plain.get_input_embeddings()(IDS)], 1)
    expected, found = plain(inputs_embeds=inputs).logits[:, 4:], model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(delta.embeddings.grad, front.grad, rtol=1e-3, atol=1e-6)


def test_it_begins_as_tokens_of_the_vocabulary_or_spread_like_them(tiny_model) -> None:
    model = tiny_model("llama")
    weight = model.get_input_embeddings().weight
    torch.manual_seed(3)
    vocabulary = lf.attach(model, lf.Prompt(tokens=6), name="a").deltas["model"].embeddings
    torch.manual_seed(3)
    assert torch.equal(vocabulary, weight[torch.randint(len(weight), (6,))])
    random = (
        lf.attach(model, lf.Prompt(tokens=50, init="random"), name="b").deltas["model"].embeddings
    )
    # 1,600 draws: standard error 2%
    assert random.std().item() == pytest.approx(weight.std().item(), rel=0.1)


def test_the_prompt_runs_once_for_a_cache_and_lies_with_it(tiny_model) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, lf.Prompt(tokens=4))
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda m, args: lengths.append(args[0].shape[1])
    )
    with torch.no_grad():
        output = model(IDS, use_cache=True, cache=None)
        output = model(IDS[:, :1], cache=output.cache)
        # a cache that the model made itself comes without: once more
        assert lengths == [4, 9, 4, 1]
        twin = copy.deepcopy(output.cache)
        next(adapter.parameters()).zero_()
        a = model(IDS[:, :1], cache=output.cache).logits
        assert torch.equal(model(IDS[:, :1], cache=twin).logits, a)
    assert lengths == [4, 9, 4, 1, 1, 1]
    assert output.cache.get_seq_length() == 11


def test_gradients_accumulate_over_the_whole_batch(tiny_model) -> None:
    model = tiny_model("llama")
    (p,) = lf.attach(model, lf.Prompt(tokens=4)).parameters()

    def gradient(ids: Tensor) -> Tensor:
        return torch.autograd.grad(model(ids).logits.square().sum(), [p])[0]

    torch.testing.assert_close(
        gradient(IDS), sum(gradient(row[None]) for row in IDS), rtol=1e-4, atol=1e-6
    )
