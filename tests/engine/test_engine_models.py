"""Requests have the tokens of transformers' `generate`, whatever the model."""

from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from conftest import GPT2_SIZE, SIZE
from engine_cases import generated, prompt, together
from lorafold.engine import Engine, Request, Sampling, Token, model_structure
from lorafold.engine.sampler import uniform
from lorafold.errors import LorafoldError

VOCABULARY = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = VOCABULARY | {"hidden_size": 32, "num_hidden_layers": 2}
SMALL, FULL = WIDTH | {"num_attention_heads": 4}, VOCABULARY | SIZE
NO_HEAD_DIM = {k: v for k, v in FULL.items() if k != "head_dim"}

FAMILIES: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**FULL),  # grouped queries
    "qwen2": lambda: tf.Qwen2Config(**NO_HEAD_DIM),  # biases
    "gemma": lambda: tf.GemmaConfig(**FULL),  # tied, scaled embeddings
    "gpt2": lambda: tf.GPT2Config(**GPT2_SIZE, **VOCABULARY),  # learned positions, Conv1D
    "mistral": lambda: tf.MistralConfig(**NO_HEAD_DIM, sliding_window=6),
    # alternating windows, capped scores
    "gemma2": lambda: tf.Gemma2Config(**FULL, sliding_window=6, query_pre_attn_scalar=8),
    "qwen3": lambda: tf.Qwen3Config(**FULL),  # norms of queries and keys
    "mixtral": lambda: tf.MixtralConfig(**NO_HEAD_DIM, num_local_experts=4),
    "opt": lambda: tf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    "neox": lambda: tf.GPTNeoXConfig(**SMALL, intermediate_size=64),  # partial rotary
    # sinks, windows, experts
    "gpt-oss": lambda: tf.GptOssConfig(**FULL, num_local_experts=4, sliding_window=6),
}
SOLO: dict[str, Any] = {
    "mamba": lambda: tf.MambaConfig(**WIDTH, state_size=8),
    "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **VOCABULARY),
}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model


def requests(n: int) -> list[Request]:
    lengths = (3, 17, 1, 40, 8, 23)
    return [Request(str(i), prompt(lengths[i % 6], i), 5 + i % 7) for i in range(n)]


@pytest.mark.few(4)
@pytest.mark.parametrize("invariant", [False, True], ids=["free", "invariant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, invariant: bool) -> None:
    model, asked = model_of(FAMILIES[family]()), requests(9)
    expected = [generated(model, request) for request in asked]
    implementation = model.config._attn_implementation
    with Engine(model, slots=4, length=64, chunk=7, budget=14, invariant=invariant) as engine:
        assert engine.is_batched, engine.structure.unbatched_reason
        assert together(engine, asked, steps_between=1) == expected
    assert model.config._attn_implementation == implementation
    assert [generated(model, request) for request in asked[:2]] == expected[:2]


@pytest.mark.parametrize("family", SOLO)
def test_a_model_without_slots_runs_one_request_at_a_time_and_says_so(family: str) -> None:
    model, asked = model_of(SOLO[family]()), requests(4)
    expected = [generated(model, request) for request in asked]
    with Engine(model, slots=4, length=64) as engine:
        assert not engine.is_batched
        assert "batched" in engine.structure.unbatched_reason
        assert together(engine, asked) == expected
        scores = Request("scores", prompt(3, 1), 2, prompt_logprobs=0)
        with pytest.raises(LorafoldError, match=r"prompt_logprobs: found 0, .* for this model"):
            engine.submit(scores)


@pytest.mark.parametrize("family", SOLO)
def test_a_model_without_slots_computes_each_token_once(family: str) -> None:
    """A state that took a token twice gives other probabilities, and often the same tokens."""
    model, ids = model_of(SOLO[family]()), prompt(9, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with Engine(model, length=64) as engine:
        stream = engine.submit(Request("1", ids, 6, sampling=Sampling(logprobs=0)))
        engine.run()
    found = [event for event in stream.so_far() if isinstance(event, Token)]
    whole = torch.tensor([[*ids, *stream.result().tokens]])
    with torch.no_grad():
        logp = model(whole, use_cache=False).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = logp.gather(1, whole[0, len(ids) :, None])[:, 0].tolist()
    assert [token.logprob for token in found] == pytest.approx(expected, abs=1e-5)


def test_sampled_tokens_follow_from_the_seed_alone() -> None:
    model = model_of(FAMILIES["llama"]())
    asked = [
        Request(str(i), prompt(4 + i, i), 12, sampling=Sampling(temperature=1.0, seed=i % 3))
        for i in range(7)
    ]
    expected = []
    for request in asked:  # by hand: no cache, no engine
        ids = torch.tensor([request.prompt])
        for at in range(request.max_new_tokens):
            with torch.no_grad():
                p = model(ids, use_cache=False).logits[:, -1].softmax(-1)
            drawn = (p.cumsum(-1) > uniform(request.sampling.seed, at)).int().argmax(-1)
            ids = torch.cat([ids, drawn[:, None]], 1)
        expected.append(tuple(ids[0, len(request.prompt) :].tolist()))
    before = torch.random.get_rng_state()
    with Engine(model, slots=3, length=64, chunk=5, budget=10) as engine:
        assert together(engine, asked, steps_between=2) == expected
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_model_is_given_back_as_it_was() -> None:
    model = model_of(FAMILIES["llama"]()).train()
    model.requires_grad_(True)
    classes = [type(m) for m in model.modules()]
    with Engine(model, slots=2, length=32):
        assert not model.training
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert classes == [type(m) for m in model.modules()]


def test_a_model_is_probed_once_until_its_modules_or_what_is_active_change(monkeypatch) -> None:
    model, probed = model_of(FAMILIES["llama"]()), []

    def probe(model: Any) -> model_structure.Structure:
        probed.append(model)
        return found(model)

    found = model_structure.probe
    monkeypatch.setattr(model_structure, "probe", probe)
    before = model_structure.structure_of(model)
    with Engine(model, slots=2, length=32) as engine:
        assert engine.structure is before
    adapter = lf.attach(model, lf.IA3())
    with lf.only(model):
        assert model_structure.structure_of(model) is before
    assert len(probed) == 1
    model_structure.structure_of(model)
    adapter.detach()
    model.resize_token_embeddings(320)
    assert model_structure.structure_of(model).shapes != before.shapes
    assert model_structure.structure_of(model.bfloat16()).unbatched_reason == ""
    assert len(probed) == 4


def test_the_cache_grows_with_its_requests_and_not_with_the_length() -> None:
    model = model_of(FAMILIES["llama"]())
    asked = [Request("0", prompt(5, 0), 4), Request("1", prompt(40, 1), 60)]
    expected = [generated(model, request) for request in asked]
    with Engine(model, slots=2, length=2**40, beyond=True) as engine:
        assert engine.length == engine.kv_tokens < 2**40
        cache = engine._runner.cache  # type: ignore[attr-defined]
        assert together(engine, asked[:1]) == expected[:1]
        address = cache.keys[0].data_ptr()
        assert cache._end == 2  # one block, and the one of zeros
        assert together(engine, asked[1:]) == expected[1:]
        assert cache._end == 6
        assert cache.keys[0].data_ptr() == address
