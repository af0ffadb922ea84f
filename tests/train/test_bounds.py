"""Rows and packed sequences beyond what a model's tables and chunks reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from lorafold.data.branches import Branched
from lorafold.data.examples import NO_LOSS, Example
from lorafold.errors import LorafoldError
from lorafold.models.positions import positions_of, sequence_of
from lorafold.training.checkpoint import RunDirectory
from lorafold.training_step.losses import CompletionLoss
from lorafold.training_step.packed_attention import packed
from lorafold.training_step.preference_algorithms import Simpo
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import branching

pytestmark = pytest.mark.usefixtures("unestimated")

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}


def gpt_neo(positions: int = 24) -> Any:
    torch.manual_seed(0)
    config = tf.GPTNeoConfig(
        **SMALL, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=6, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return tf.GPTNeoForCausalLM(config).eval()


def llama4(chunk: int) -> Any:
    torch.manual_seed(0)
    config = tf.Llama4TextConfig(
        **SMALL, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=chunk, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return tf.Llama4ForCausalLM(config).eval()


def rows(*lengths: int) -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    drawn = (tuple(torch.randint(1, 300, (n,), generator=draw).tolist()) for n in lengths)
    return [Example(ids, ids) for ids in drawn]


def total(loss: Any, batches: list[Any]) -> float:
    with torch.no_grad():
        return sum(float(loss(**loss.collate(batch, loss.device))) for batch in batches)


@pytest.mark.parametrize("make", [gpt_neo, lambda: llama4(18)], ids=["gpt-neo", "llama4"])
def test_packed_rows_beyond_tables_and_chunks_are_as_they_are_padded(make: Any) -> None:
    """GPT-Neo reads its mask from a buffer of 24 x 24; Llama 4 has chunks of 18."""
    model = make()
    examples = rows(20, 5, 21, 9, 22, 7)
    alone = CompletionLoss(model, False, 0)
    expected = total(alone, [[example] for example in examples])
    with packed(model) as apart:
        assert apart
        loss = CompletionLoss(model, apart, 0)
        parts = loss.micro_batches(examples, 1, 1024)
        batches = [[examples[i] for i in part] for part in parts]
        assert total(loss, batches) == pytest.approx(expected, rel=1e-4)
    assert len(parts) == (1 if sequence_of(model) is None else 4)


def test_completions_beyond_a_chunk_have_a_prompt_each() -> None:
    model = llama4(18)
    draw = iter(rows(15, 5, 4, 6, 5, 4))

    def example() -> Branched:
        shared, *branches = (next(draw).ids for _ in range(3))
        return Branched(shared, tuple(Example(b, (NO_LOSS, *b[1:])) for b in branches))

    examples = [example(), example()]  # 20 and 19 tokens with their prompt, then 11 and 10
    law = Simpo()
    plain = Preferences(model, law, None, 0)
    expected = [total(plain, [[e]]) for e in examples]
    with branching(model) as how:
        assert (how.shares, how.longest) == (True, 18)
        loss = Preferences(model, law, how, 0)
        assert ["lens" in loss.collate([e], loss.device) for e in examples] == [False, True]
        assert [loss.size(e) for e in examples] == [39, 15]
        found = [total(loss, [[e]]) for e in examples]
        assert total(loss, [examples]) == pytest.approx(sum(expected), rel=1e-4)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_mask_in_a_buffer_bounds_rows_and_sequences() -> None:
    assert positions_of(gpt_neo(40)).table == sequence_of(gpt_neo(40)) == 40


def test_a_row_beyond_the_positions_is_refused_before_training(tiny_model_dir, tmp_path) -> None:
    """Of a run that an earlier version began with more than the positions of its model."""
    model = tiny_model_dir("gpt2")
    data = [{"prompt": "a", "completion": " fox" * n} for n in (3, 1024)]
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    RunDirectory(tmp_path / "a").start({"max_length": 1024})
    with pytest.raises(LorafoldError, match="tokens, expected at most the 512 positions of"):
        lf.train(recipe, model=model, data=data, out=tmp_path / "a", resume=True)
