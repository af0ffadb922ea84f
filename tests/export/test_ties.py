"""An engine that takes the other of two experts that are as good as equal differs by that alone."""

import pytest
import torch

import lorafold as lf
from gguf_models import saved
from lorafold.exporting.proof import Answers, EngineAnswers, exchanged_experts, last, proof


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = saved("mixtral", tmp_path_factory.mktemp("ties") / "base")
    return lf.load_model(base, storage="fp32", device="cpu")


@pytest.fixture(scope="module")
def prompts():
    """Token ids (24, 40)."""
    return torch.randint(0, 300, (24, 40), generator=torch.Generator().manual_seed(0)).tolist()


def answered(rows, bare):
    none = tuple(() for _ in rows)
    engine = EngineAnswers(rows.clone(), bare.clone(), none, "llama.cpp", "1")
    return Answers(rows, bare, none), engine


def test_the_other_expert_is_no_difference(model, prompts):
    rows = torch.stack([last(model, ids) for ids in prompts])
    ours, theirs = answered(rows, rows.roll(1, 0))
    theirs.adapted.add_(1e-3 * torch.randn(rows.shape))
    far = {}
    for n, ids in enumerate(prompts):
        other = next(exchanged_experts(model, ids), None)
        if other is not None and (other - rows[n]).abs().max() > 0.05:
            far[n] = other
    n = next(iter(far))
    theirs.adapted[n] = far[n]
    plain = proof(ours, theirs, lambda prompt, at: 1.0)
    assert plain.tied == 0
    assert plain.kl == plain.measured
    found = proof(
        ours, theirs, lambda prompt, at: 1.0, lambda n: exchanged_experts(model, prompts[n])
    )
    assert found.tied == 1
    assert found.kl < 2e-6 < found.measured == plain.kl
    assert found.gap < 0.01 < plain.gap
    assert "experts in 1 where two are as good as equal" in str(found)


def test_what_is_far_for_another_reason_stays_far(model, prompts):
    rows = torch.stack([last(model, ids) for ids in prompts])
    ours, theirs = answered(rows, rows.roll(1, 0))
    theirs.adapted[3] += 0.3 * torch.randn(rows.shape[1:])
    found = proof(
        ours, theirs, lambda prompt, at: 1.0, lambda n: exchanged_experts(model, prompts[n])
    )
    assert found.tied == 0
    assert found.kl == found.measured > 1e-4


def test_the_model_is_as_it_was_when_the_first_is_enough(model, prompts):
    """What asks next, texts of another length among it, finds no state moved."""
    before = [last(model, ids) for ids in prompts]
    kept = [exchanged_experts(model, ids) for ids in prompts]
    assert sum(next(one, None) is not None for one in kept) > 1
    for ids, row in zip(prompts, before, strict=True):
        torch.testing.assert_close(last(model, ids), row, rtol=0, atol=0)
        last(model, ids[:2])


def test_a_model_without_experts_has_none(tiny_model):
    assert list(exchanged_experts(tiny_model("llama"), [1, 2, 3])) == []
