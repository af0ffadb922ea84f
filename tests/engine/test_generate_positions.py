"""Completions end where a table of positions does, and what does not fit in it is one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from conftest import make_tokenizer
from lorafold.conversation import Chat
from lorafold.engine import Engine
from lorafold.generation import complete, stream

N = 40
CONFIGS: dict[str, Any] = {
    "gpt2": tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=N),
    "opt": tf.OPTConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=32,
        max_position_embeddings=N, word_embed_proj_dim=32,
    ),
}  # fmt: skip


def made(name: str, virtual: int) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.generation_config.eos_token_id = None
    if virtual:
        lf.attach(model, lf.Prompt(tokens=virtual))
    return model


@pytest.mark.parametrize(("name", "virtual"), [("gpt2", 0), ("gpt2", 10), ("opt", 0), ("opt", 10)])
def test_a_completion_ends_with_the_table(
    name: str, virtual: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer, left = made(name, virtual), make_tokenizer(), N - virtual
    prompt = "a b c"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    [whole] = complete(model, tokenizer, [prompt], 2 * N)
    [told] = caplog.messages
    assert told.startswith(f"max_new_tokens {2 * N}: the longest prompt has {len(ids)} tokens and")
    assert f" {left} positions" in told
    caplog.clear()
    assert complete(model, tokenizer, [prompt], left - len(ids)) == [whole]
    assert caplog.messages == []
    assert "".join(stream(model, tokenizer, prompt, 2 * N)) == whole
    with pytest.raises(lf.LorafoldError, match=f"^prompt: found {left} .* fewer than the {left} "):
        complete(model, tokenizer, [tokenizer.decode(ids[:1] * left)], 5)


def test_a_chat_and_an_engine_are_within_the_table() -> None:
    with Chat(made("gpt2", 10), make_tokenizer(), {"a": "default"}) as chat:
        assert chat.context == N - 10
    for beyond in (False, True):
        with pytest.raises(lf.LorafoldError, match=f"length: found 41, expected at most {N} pos"):
            Engine(made("gpt2", 0), length=N + 1, beyond=beyond)
