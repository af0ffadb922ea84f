"""Completions in batches equal one prompt at a time, and streams equal both."""

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import lorafold as lf
from conftest import make_tokenizer
from lorafold import generation
from lorafold.conversation import Chat
from lorafold.core.attach import selection_of
from lorafold.engine import Engine, Sampling
from lorafold.errors import LorafoldError
from lorafold.generation import complete, stream

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS = len(ALPHABET)
PROMPTS = ["a", "some longer prompt than that", "b c", "xyz", "a longer prompt", "zz top", "q",
           "the end of it all, at last"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token a byte, and an end token."""
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*ALPHABET, "<end>"])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def tiny(kind: str) -> tf.PreTrainedModel:
    torch.manual_seed(1)
    size = {"vocab_size": EOS + 1, "eos_token_id": EOS, "bos_token_id": EOS}
    wide = size | {"hidden_size": 32, "num_hidden_layers": 2}
    llama = wide | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {
        "llama": tf.LlamaConfig(**llama),
        "mistral": tf.MistralConfig(**llama, sliding_window=8),
        "gpt2": tf.GPT2Config(**size, n_embd=32, n_layer=2, n_head=2),
        "mamba": tf.MambaConfig(**wide, state_size=4),
    }[kind]
    model = tf.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():  # sharp enough for answers that differ
        p.data.normal_(std=0.3)
    return model.eval()


def alone(
    model: tf.PreTrainedModel, ids: list[int], n: int, stops: tuple[int, ...] = (EOS,)
) -> list[int]:
    """No batch, no padding, no cache: the likeliest token, again and again."""
    answer: list[int] = []
    while len(answer) < n:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        answer.append(token)
    return answer


def expected(
    model: tf.PreTrainedModel, tokenizer: Any, prompts: list[str], n: int, *stops: int
) -> list[str]:
    answers = [alone(model, tokenizer(p).input_ids, n, (*stops, EOS)) for p in prompts]
    return [tokenizer.decode(ids) for ids in answers]


@pytest.mark.few(1)
@pytest.mark.parametrize("batch", [1, 3, generation.MAX_RUNNING])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_batches_answer_as_each_prompt_alone(kind: str, batch: int, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(generation, "MAX_RUNNING", batch)
    model = tiny(kind)
    answers = complete(model, tokenizer, PROMPTS, 21)
    assert answers == expected(model, tokenizer, PROMPTS, 21)
    assert len(set(answers)) > 1


def test_recurrent_models_keep_their_state(tokenizer) -> None:
    model = tiny("mamba")
    same_length = ["abcd", "efgh", "wxyz"]  # a recurrent model reads padding too
    found = complete(model, tokenizer, same_length, 21)
    assert found == expected(model, tokenizer, same_length, 21)


def test_rows_that_end_leave_and_the_others_go_on(tokenizer) -> None:
    model = tiny("llama")
    free = [alone(model, tokenizer(prompt).input_ids, 40) for prompt in PROMPTS]

    def ends(token: int) -> set[int]:
        return {row.index(token) if token in row else 40 for row in free}

    stop = max(set(free[0]), key=lambda token: len(ends(token)))
    assert len(ends(stop)) > 2  # or this would test nothing
    model.generation_config.eos_token_id = [stop, EOS]
    assert complete(model, tokenizer, PROMPTS, 40) == expected(model, tokenizer, PROMPTS, 40, stop)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stream_is_the_greedy_answer_piece_by_piece(kind: str, tokenizer) -> None:
    model = tiny(kind)
    for prompt in PROMPTS[:3]:
        pieces = list(stream(model, tokenizer, prompt, 16))
        assert "".join(pieces) == expected(model, tokenizer, [prompt], 16)[0]


def test_stream_holds_back_incomplete_characters(tokenizer) -> None:
    model = tiny("llama")
    bytes_of = tokenizer("é").input_ids
    with torch.no_grad():  # whatever is asked, the answer is é, é, ...
        for layer in model.model.layers:
            for p in layer.parameters():
                p.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.zero_()
        model.lm_head.weight[bytes_of[1]] = model.model.embed_tokens.weight[bytes_of[0]]
        model.lm_head.weight[bytes_of[0]] = model.model.embed_tokens.weight[bytes_of[1]]
    assert list(stream(model, tokenizer, "é", 6)) == ["", "é", "", "é", "", "é"]
    # cut within a character
    assert list(stream(model, tokenizer, "é", 3)) == ["", "é", "", "\N{REPLACEMENT CHARACTER}"]


def test_sampling_depends_on_the_seed_alone(tokenizer) -> None:
    model = tiny("llama")
    before = torch.get_rng_state()
    first = "".join(stream(model, tokenizer, "a", 16, Sampling(temperature=2.0, seed=1)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert "".join(stream(model, tokenizer, "a", 16, Sampling(temperature=2.0, seed=1))) == first
    assert "".join(stream(model, tokenizer, "a", 16, Sampling(temperature=2.0, seed=2))) != first


def test_the_model_is_left_as_it_was_and_its_own_decoding_habits_are_not_used(tokenizer) -> None:
    model = tiny("llama").train()
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=9.0)
    habits = model.generation_config
    assert complete(model, tokenizer, ["a"], 8) == expected(model.eval(), tokenizer, ["a"], 8)
    complete(model.train(), tokenizer, ["a"], 8)
    assert model.training
    assert model.generation_config is habits


def test_progress_counts_prompts(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(generation, "MAX_RUNNING", 3)
    seen: list[tuple[int, ...]] = []
    complete(tiny("llama"), tokenizer, PROMPTS, 2, progress=lambda *step: seen.append(step))
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_what_cannot_be_answered_is_refused(tokenizer) -> None:
    with pytest.raises(LorafoldError, match="no tokens"):
        complete(tiny("llama"), tokenizer, ["a", ""], 4)
    with pytest.raises(LorafoldError, match="temperature"):
        list(stream(tiny("llama"), tokenizer, "a", 4, Sampling(temperature=-1.0)))
    assert complete(tiny("llama"), tokenizer, [], 4) == []


def test_sampled_completions_of_many_prompts_have_their_own_stream(tokenizer, monkeypatch) -> None:
    model, sampling = tiny("llama"), Sampling(temperature=1.5, seed=4)
    monkeypatch.setattr(generation, "MAX_RUNNING", 3)
    found = complete(model, tokenizer, PROMPTS, 9, sampling)
    assert found == ["".join(stream(model, tokenizer, p, 9, sampling)) for p in PROMPTS]


METHODS: dict[str, Any] = {
    "lora": lf.LoRA(rank=4, dropout=0.0),
    "dora": lf.DoRA(over=lf.LoRA(rank=3)),
    "ia3": lf.IA3(),
    "prompt": lf.Prompt(tokens=3),
    "prefix": lf.Prefix(tokens=3),
    "houlsby": lf.Bottleneck(size=4),
    "bitfit": lf.BitFit(),
}
STACKS = [*((name,) for name in METHODS), ("lora", "dora"), ("dora", "lora"), ("lora", "prompt")]


def adapted(kind: str, names: tuple[str, ...]) -> tf.PreTrainedModel:
    """A model with these adapters, one over the other, far from their start."""
    model = tiny(kind)
    for i, name in enumerate(names):
        torch.manual_seed(i)
        for p in lf.attach(model, METHODS[name], name=name).parameters():
            p.data.add_(0.2 * torch.randn(p.shape))
    return model.eval()


@pytest.mark.few(2)
@pytest.mark.parametrize("names", STACKS, ids="+".join)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_active_adapters_complete_as_generate_has_it(kind, names, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(generation, "MAX_RUNNING", 3)
    model = adapted(kind, names)
    answers = complete(model, tokenizer, PROMPTS, 12)
    assert answers == [generated(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    with lf.only(model):
        bare = complete(model, tokenizer, PROMPTS, 12)
        assert bare == [generated(model, tokenizer, prompt, 12) for prompt in PROMPTS]
        with torch.inference_mode():
            plain = model(torch.tensor([[5, 6, 7]])).logits
    with torch.inference_mode():
        assert not torch.allclose(model(torch.tensor([[5, 6, 7]])).logits, plain)


def generated(
    model: tf.PreTrainedModel, tokenizer, prompt: str, n: int
) -> str:
    """The completion by transformers' own `generate`."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
        eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("names", [(), ("lora",), ("prefix",)], ids="+".join)
def test_an_iterator_that_is_closed_halfway_gives_the_model_back(names, tokenizer) -> None:
    model = adapted("llama", names).train()
    ids = torch.tensor([[5, 6, 7]])

    def state() -> Any:
        return (
            [type(m) for m in model.modules()],
            [m.training for m in model.modules()],
            [(p.requires_grad, id(p)) for p in model.parameters()],
            selection_of(model).names,
            [sorted(vars(m)) for m in model.modules() if m is not model],
            model.config._attn_implementation,
        )

    before, logits = state(), model(ids).logits
    pieces = stream(model, tokenizer, PROMPTS[1], 40)
    next(pieces)
    assert torch.is_grad_enabled()
    with pytest.raises(LorafoldError, match="another engine is using this model"):
        complete(model, tokenizer, ["a"], 4)
    pieces.close()
    assert state() == before
    assert torch.equal(model(ids).logits, logits)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(model, tokenizer, PROMPTS, 4, progress=interrupt)
    assert state() == before
    assert torch.equal(model(ids).logits, logits)


def test_a_model_that_computes_nan_is_named_so(tokenizer) -> None:
    model = tiny("llama")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(LorafoldError, match="NaN"):
        complete(model, tokenizer, PROMPTS, 4)
    with pytest.raises(LorafoldError, match="NaN"):
        list(stream(model, tokenizer, "a", 4))
    assert not model.training


def test_prompts_may_go_beyond_the_positions_of_the_config(tokenizer) -> None:
    model = tiny("llama")
    model.config.max_position_embeddings = 8
    assert complete(model, tokenizer, PROMPTS, 6) == expected(model, tokenizer, PROMPTS, 6)


N = 40
CONFIGS: dict[str, Any] = {
    "gpt2": tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=N),
    "opt": tf.OPTConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=32,
        max_position_embeddings=N, word_embed_proj_dim=32,
    ),
}  # fmt: skip


def short(name: str, virtual: int) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.generation_config.eos_token_id = None
    if virtual:
        lf.attach(model, lf.Prompt(tokens=virtual))
    return model


@pytest.mark.parametrize(("name", "virtual"), [("gpt2", 0), ("gpt2", 10), ("opt", 0), ("opt", 10)])
def test_a_completion_ends_with_the_table(name: str, virtual: int, caplog) -> None:
    model, tokenizer, left = short(name, virtual), make_tokenizer(), N - virtual
    prompt = "a b c"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    caplog.set_level(logging.WARNING)
    [whole] = complete(model, tokenizer, [prompt], 2 * N)
    [told] = caplog.messages
    assert told.startswith(f"max_new_tokens {2 * N}: the longest prompt has {len(ids)} tokens and")
    assert f" {left} free positions" in told
    caplog.clear()
    assert complete(model, tokenizer, [prompt], left - len(ids)) == [whole]
    assert caplog.messages == []
    assert "".join(stream(model, tokenizer, prompt, 2 * N)) == whole
    with pytest.raises(lf.LorafoldError, match=f"^prompt: found {left} .* fewer than the {left} "):
        complete(model, tokenizer, [tokenizer.decode(ids[:1] * left)], 5)


def test_a_chat_and_an_engine_are_within_the_table() -> None:
    with Chat(short("gpt2", 10), make_tokenizer(), {"a": "default"}) as chat:
        assert chat.context == N - 10
    for beyond in (False, True):
        with pytest.raises(lf.LorafoldError, match=f"length: found 41, expected at most {N} pos"):
            Engine(short("gpt2", 0), length=N + 1, beyond=beyond)
