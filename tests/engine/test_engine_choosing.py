"""Tokens of many rows that are chosen in one pass: each as alone, each by its distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import TopPLogitsWarper

from engine_cases import choose, sampling
from lorafold.engine import Sampling
from lorafold.engine.sampler import NotFinite, Sampler, chosen, filtered, noise

V = 60
PROMPT = (3, 7, 7, 11)


def test_draws_have_the_probabilities_of_their_distribution() -> None:
    many, p = 5_000, (3 * torch.randn(V, generator=torch.Generator().manual_seed(2))).softmax(-1)
    for seed in (5, 1 << 60):
        draws = torch.stack([noise(seed, i, V) for i in range(many)])
        counts = torch.bincount((p / draws).argmax(-1), minlength=V)
        expected = many * p
        large = expected > 5
        chi = ((counts - expected) ** 2 / expected)[large].sum()
        n = int(large.sum())
        assert abs(float(chi) - n) < 4 * (2 * n) ** 0.5
    seeds = torch.stack([noise(seed, 3, V) for seed in range(many)])
    assert seeds.mean() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(seeds[:, :9].T).fill_diagonal_(0).abs().max() < 0.08


@pytest.mark.parametrize("vocabulary", [300, 3001])
def test_a_row_has_the_token_and_the_bits_that_it_has_alone(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = [replace(sampling(i), seed=i, logprobs=(None, 2)[i % 2]) for i in range(21)]
    settings += [Sampling(1.0, top_p=p, min_p=0.001, logprobs=1) for p in (0.3, 0.9, 0.9999)]
    company = [Sampler(own, PROMPT) for own in settings]
    single = [Sampler(own, PROMPT) for own in settings]
    for _ in range(4):
        rows = torch.randn(len(settings), vocabulary, generator=generator).bfloat16()
        found = chosen(company, rows)
        assert found == [choose(own, row) for own, row in zip(single, rows, strict=True)]
    assert [a.tokens for a in company] == [b.tokens for b in single]


def test_top_p_is_that_of_transformers_in_a_large_vocabulary() -> None:
    rows = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    rows[1] *= 4
    for p in (0.2, 0.9, 0.999):
        own = Sampling(temperature=1.0, top_p=p)
        expected = TopPLogitsWarper(p)(torch.zeros(2, 1, dtype=torch.long), rows.clone())
        assert torch.equal(filtered(rows, [own, own]).isfinite(), expected.isfinite())


def test_an_error_is_of_its_row_alone() -> None:
    rows = torch.randn(4, V)
    rows[1, 3], rows[2, 3] = float("nan"), float("inf")
    samplers = [Sampler(Sampling(temperature=t), ()) for t in (1.0, 1.0, 0.0, 0.0)]
    found = chosen(samplers, rows)
    assert [isinstance(one, NotFinite) for one in found] == [False, True, True, False]
    assert [len(own.tokens) for own in samplers] == [1, 0, 0, 1]
