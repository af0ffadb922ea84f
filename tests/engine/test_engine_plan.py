"""A planned step has the logits of transformers' model, whatever else is in its batch."""

import logging
import threading
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from engine_cases import METHODS, prompt, save_adapters
from lorafold.engine import Engine, Request, Sampling, Token
from lorafold.engine.kv_cache import BlockCache
from lorafold.engine.plan import StepPlan, Unplanned, plan_of
from lorafold.errors import LorafoldError

SIZES: Any = {
    "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
WINDOW: Any = SIZES | {"sliding_window": 6}
MIXED = ["sliding_attention", "full_attention"] * 2
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
PLANNED: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": lambda: tf.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),  # biases
    "qwen2-windows": lambda: tf.Qwen2Config(
        **WINDOW, use_sliding_window=True, max_window_layers=2
    ),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=32),  # norms of heads
    "mistral": lambda: tf.MistralConfig(**WINDOW),
    "ministral": lambda: tf.MinistralConfig(**WINDOW, head_dim=16),
    "gemma": lambda: tf.GemmaConfig(**SIZES, head_dim=32),  # scaled embeddings, 1 + gain
    "gemma3": lambda: tf.Gemma3TextConfig(**WINDOW, head_dim=32, layer_types=MIXED),
    "smollm3": lambda: tf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0]),
    "olmo2": lambda: tf.Olmo2Config(**SIZES),  # norms after, and of all queries
    "olmo3": lambda: tf.Olmo3Config(**WINDOW, layer_types=MIXED),
    "granite": lambda: tf.GraniteConfig(**SIZES),
    "phi3": lambda: tf.Phi3Config(**SIZES),  # q, k, v in one matrix
    "seed-oss": lambda: tf.SeedOssConfig(**SIZES, head_dim=32),
}
UNPLANNED: dict[str, tuple[Any, str]] = {
    "gemma2": (lambda: tf.Gemma2Config(**WINDOW, head_dim=32), "caps scores"),
    "glm": (lambda: tf.GlmConfig(**SIZES, head_dim=16), "rotate"),
    "exaone4": (lambda: tf.Exaone4Config(**WINDOW), "logits differ"),
    "scaled": (lambda: tf.GraniteConfig(**SIZES, residual_multiplier=0.2), "logits differ"),
    "stablelm": (lambda: tf.StableLmConfig(**SIZES), "LayerNorm is not an RMS norm"),
    "mixtral": (lambda: tf.MixtralConfig(**SIZES), "its layers have experts, gate"),
    "longrope": (
        lambda: tf.LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "depends on the length",
    ),
    "odd": (lambda: tf.LlamaConfig(**SIZES | {"intermediate_size": 100}), "multiple of 16"),
}


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.1)
    return model


def planned(model: Any, blocks: int = 64) -> Any:
    """The step with a cache, all of whose blocks are allocated."""
    cache = BlockCache(blocks, torch.device("cpu"))
    cache.allocate(blocks)
    return partial(StepPlan(model).step, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", PLANNED)
def test_a_step_has_the_logits_of_the_model(family: str, dtype: torch.dtype) -> None:
    model = model_of(PLANNED[family](), dtype)
    step, ids = planned(model), [*prompt(70, 1)]
    with torch.no_grad():
        exact = model_of(PLANNED[family]()).to(torch.float64)
        exact.load_state_dict(model.state_dict())
        expected = exact(torch.tensor([ids]), use_cache=False).logits[0]
        plain = model(torch.tensor([ids]), use_cache=False).logits[0]
    blocks = [5, 1, 9]
    found = step([ids], [0], [blocks], [None], range(70))
    error, of_plain = ((x - expected).norm() / expected.norm() for x in (found, plain))
    assert error < (3e-6 if dtype == torch.float32 else 1.2 * of_plain)
    # alone, token by token, in other blocks, and beside rows of other lengths: the same bits
    for n, id in enumerate(ids):
        alone = step([[id]], [n], [[2, 3, 4]], [None], [0])
        others = [[7, 8], [id], [9]]
        starts, tables = [0, n, 0], [[10], [2, 3, 4], [11]]
        together = step(others, starts, tables, [None] * 3, [2])
        assert torch.equal(alone, together)
        assert torch.equal(alone[0], found[n])


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 21])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_adapters_in_one_step_have_their_own_logits(method, rows, tmp_path) -> None:
    model, low_rank = model_of(PLANNED["qwen2"]()), lf.LoRA(rank=5, rslora=True)
    paths = save_adapters(model, tmp_path, {"a": METHODS[method], "b": low_rank})
    with Engine(model, slots=32, length=64) as engine:
        for name, path in paths.items():
            engine.load(name, path)
        names = [[None, "a", "b"][n % 3] for n in range(rows)]
        asked = [
            Request(str(n), prompt(3 + n, n), 4, name, Sampling(logprobs=0))
            for n, name in enumerate(names)
        ]
        streams = [engine.submit(request) for request in asked]
        engine.run()
        packed = {entry.name: entry.loaded.packed for entry in engine.adapters._entries}
        # the input of down_proj is scaled
        assert [name for name, one in packed.items() if one is None] == ["a"] * (method == "ia3")
    for name, path in paths.items():
        lf.load(model, path, name)
    for name, request, stream in zip(names, asked, streams, strict=True):
        tokens = [event for event in stream.so_far() if isinstance(event, Token)]
        ids = torch.tensor([[*request.prompt, *(t.token for t in tokens)]])
        with torch.no_grad(), lf.only(model, *[name] * bool(name)):
            logp = model(ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
        logp = logp.log_softmax(-1).gather(1, ids[0, len(request.prompt) :, None])[:, 0]
        assert [t.logprob for t in tokens] == pytest.approx(logp.tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", UNPLANNED)
def test_another_model_has_no_plan_and_the_reason_is_told(family, dtype, caplog) -> None:
    config, why = UNPLANNED[family]
    if family == "scaled" and dtype == torch.bfloat16:
        pytest.skip("random layers of this size change the logits by less than bf16 does")
    caplog.set_level(logging.INFO)
    assert plan_of(model_of(config(), dtype)) is None
    [line] = [m for m in caplog.messages if "runs this model through torch" in m]
    assert why in line


def test_a_base_with_an_active_adapter_has_no_plan() -> None:
    model = model_of(PLANNED["llama"]())
    lf.attach(model, lf.LoRA(rank=2), name="there")
    with pytest.raises(Unplanned, match=r"an adapter is active on model\.layers\.0"):
        StepPlan(model)
    with lf.only(model):
        StepPlan(model)


def test_a_running_step_stops_on_request() -> None:
    step = planned(model_of(PLANNED["llama"]()))
    step.func.__self__.stop[0] = 1
    with pytest.raises(LorafoldError, match=r"^stopped$"):
        step([[3]], [0], [[1]], [None], [0])


def test_positions_beyond_the_tables_extend_them() -> None:
    model = model_of(PLANNED["llama"]())
    step, ids = planned(model, 40), [*prompt(1200, 2)]
    found = step([ids], [0], [[*range(1, 40)]], [None], [1199])
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1:]
    assert (found - expected).norm() < 3e-6 * expected.norm()


def test_closing_ends_a_long_prompt_soon() -> None:
    """Not after all of its layers."""
    large = SIZES | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 24}
    model = model_of(tf.LlamaConfig(**large))
    engine = Engine(model, slots=1, chunk=2000, budget=2000)
    stream = engine.submit(Request("1", prompt(2000, 1), 4))
    began, step = threading.Event(), engine._runner.plan._step  # type: ignore[attr-defined]

    def watched(*given: Any) -> int:
        began.set()
        return step(*given)

    engine._runner.plan._step = watched  # type: ignore[attr-defined]
    engine.start()
    assert began.wait(60)
    engine.close()
    assert stream.result().reason == "cancelled"
