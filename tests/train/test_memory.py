"""Estimates against what a real step, and the engine that samples, hold at the allocator."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from torch import nn

import lorafold as lf
import mixtures
from architectures import MULTIMODAL
from conftest import fast_only, make_tokenizer
from lorafold.api.estimate import parse_bytes
from lorafold.core.delta import Delta
from lorafold.core.spec import Spec
from lorafold.data.batches import StoredFeed
from lorafold.data.prompts import TokenizedPrompt
from lorafold.data.row_store import SourcePart
from lorafold.engine.runner import SlotRunner
from lorafold.errors import LorafoldError
from lorafold.evaluation.rollouts import Rollouts, RolloutSize
from lorafold.layers import LAYERS
from lorafold.memory.estimate import advise, estimate
from lorafold.memory.estimate_report import verdict
from lorafold.memory.measure import allocated, peak_of
from lorafold.memory.preflight import documents, largest_batch
from lorafold.memory.presets import llama, memory_setting
from lorafold.memory.trace import MemorySetting, trace
from lorafold.methods import make_spec
from lorafold.methods.common.trainable_tokens import TrainableTokens
from lorafold.models.classifier import head_paths
from lorafold.models.fake import fake_model, period
from lorafold.models.quantizations import ON_LOAD, STORAGES, Storage, StorageRow
from lorafold.objectives.algorithm_options import SamplingOptions
from lorafold.objectives.policy import PolicyObjective
from lorafold.ops import attention
from lorafold.recipe.recipe import Recipe
from lorafold.training_step.policy_algorithms import Grpo
from memory_cases import BF16, COMMON, CONFIGS, CPU, LORA, close
from own_storage import PATH, CodesLayer

METHODS = ["lora", "dora", "vera", "adalora", "loha", "lokr", "ia3", "bitfit", "houlsby", "prefix",
           "prompt", "lt-sft", "full", "linear-probe"]  # fmt: skip
FP32 = Storage(torch.float32)
LLAMA = CONFIGS["llama"]
JETMOE = tf.JetMoeConfig(
    vocab_size=500, hidden_size=128, num_hidden_layers=3, num_key_value_heads=2, kv_channels=32,
    intermediate_size=256, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def classifier(model: Any) -> dict[str, Any]:
    return {"modules_to_save": head_paths(model)}


def tokens(model: Any) -> dict[str, Any]:
    rows = TrainableTokens((500, 501, 7), frozenset({500, 501}))
    return {"modules_to_save": ["norm"], "tokens": rows}


def settings() -> Iterator[tuple[str, Any, MemorySetting]]:
    """What is estimated: a name, the model, and what is trained on it, if anything is."""
    for method, again in product(METHODS, (False, True)):
        base = FP32 if method == "full" else BF16
        own = replace(LORA, base=base, spec=make_spec(method), checkpointing=again)
        yield f"{method}{', checkpointed' * again}", LLAMA, own
    for name in ("qwen2", "gemma2", "gpt2"):
        yield name, CONFIGS[name], LORA
    for quantization in ON_LOAD:
        base = Storage(torch.bfloat16, quantization)
        for method in ("lora", "loha"):
            own = replace(LORA, base=base, spec=make_spec(method))
            yield f"{method}, {quantization}", LLAMA, own
        # bitsandbytes' own forward runs there, over fake tensors as over real ones
        yield f"inference, {quantization}", LLAMA, MemorySetting(base, rows=(200, 200))
    other_way = replace(LORA, base=Storage(torch.bfloat16, "nf4"))
    yield "matrices that lie the other way round, nf4", CONFIGS["gpt2"], other_way
    for method in ("lora", "full"):
        there = replace(LORA, base=FP32, spec=make_spec(method), accumulating=True)
        yield f"{method}, gradients are there", LLAMA, there
    yield "rows of many lengths", LLAMA, replace(LORA, rows=(30, 200, 90, 55), labelled=60)
    padded = replace(LORA, rows=(100, 160, 128), packed=False)
    yield "padded rows", LLAMA, replace(padded, labelled=60)
    for name, again in product(("llama", "bert"), (False, True)):
        own = replace(padded, classes=3, beside=classifier, checkpointing=again)
        yield f"classifier, {name}{', checkpointed' * again}", CONFIGS[name], own
    yield "new tokens and a norm", LLAMA, replace(LORA, beside=tokens)
    lora, targets = make_spec("lora"), (None, "attention", "all-linear")
    for name, of, dtype in product(mixtures.CONFIGS, targets, (torch.float32, torch.bfloat16)):
        # experts without an adapter run torch's grouped product, whatever the dtype; gpt-oss's
        # documents of one sequence influence each other, so its rows are padded
        packed = name != "gpt-oss"
        own = MemorySetting(Storage(dtype), of and lora, of, rows=(64, 64), packed=packed)
        yield f"{name}, {of}, {dtype}", mixtures.CONFIGS[name](), own
    for spec in (lora, None):  # JetMoe's router counts: as many for each, where there are no values
        yield f"jetmoe, {spec and 'lora'}", JETMOE, MemorySetting(BF16, spec, rows=(64, 64))
        for name, row in MULTIMODAL.items():
            # Gemma 3's tower is initialized with values that fake tensors lack, its head is tied
            own = MemorySetting(BF16, spec, rows=(96, 64), packed=name != "qwen2.5-vl")
            yield f"{name}, {spec and 'lora'}", row.config(), own
    # while a model is made it may hold embedding and head apart, and ties them then
    large = tf.LlamaConfig(**COMMON | {"vocab_size": 20000}, tie_word_embeddings=True)
    yield "large vocabulary", large, LORA
    yield "large vocabulary, inference", large, MemorySetting(BF16, rows=(100,))


SETTINGS = [pytest.param(config, own, id=name) for name, config, own in settings()]


@pytest.fixture(autouse=True)
def what_exists_is_not_looked_at_again() -> None:
    """Every estimate and every measurement collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.mark.few(5)
@pytest.mark.parametrize(("config", "setting"), SETTINGS)
def test_an_estimate_is_what_a_step_takes(config: Any, setting: MemorySetting) -> None:
    close(config, setting)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_how_soon_blocks_are_alike(name: str) -> None:
    assert period(CONFIGS[name]) == (2 if name == "gemma2" else 1)


@pytest.mark.slow
def test_a_peak_that_moves_with_the_number_of_blocks() -> None:
    """By the head, which is large, where there are few of them, and by the gradients of many."""
    config = tf.LlamaConfig(**COMMON | {"num_hidden_layers": 20, "vocab_size": 6000})
    setting = MemorySetting(BF16, make_spec("full"), rows=(32,), checkpointing=True)
    terms = close(config, setting)
    assert terms["gradients"] > terms["workspace"] + terms["activations"]


@pytest.mark.slow
def test_attention_over_long_documents_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(LORA, checkpointing=True)
    short = close(LLAMA, setting)
    monkeypatch.setattr(attention, "SAVE_FROM_LENGTH", 100)
    long = close(LLAMA, setting)
    config = LLAMA
    kept = config.num_hidden_layers * 256 * config.hidden_size * BF16.dtype.itemsize
    assert long["activations"] - short["activations"] == pytest.approx(kept, rel=0.05)


class GainDelta(Delta):
    """y = g (W x): keeps W x for the backward."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(size))

    def forward(
        self, layer: Any, x: torch.Tensor, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = layer(x) * self.g.to(x.dtype)
        return y if onto is None else y + onto

    def fold(self, w: torch.Tensor, b: torch.Tensor | None) -> Any:
        return self.g[:, None] * w, b


@dataclass(frozen=True)
class Gain(Spec):
    targets: ClassVar[str] = "all-linear"

    def build(self, layer: Any) -> GainDelta:
        return GainDelta(layer.shape[0])


@pytest.mark.few(1)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_storage_and_a_method_that_no_one_here_has_heard_of(monkeypatch, checkpointing) -> None:
    monkeypatch.setitem(STORAGES, "codes", StorageRow(8, packer="own_storage:Codes"))
    monkeypatch.setitem(LAYERS, PATH, CodesLayer)
    own = replace(
        LORA, base=Storage(torch.bfloat16, "codes"), spec=Gain(), checkpointing=checkpointing
    )
    held = close(LLAMA, own)
    in_bf16 = estimate(LLAMA, replace(own, base=BF16)).terms
    assert held["weights"] < 0.6 * in_bf16["weights"]
    assert held["adapter"] == 4 * 6 * (2 * 128 + 2 * 64 + 2 * 320 + 128)


@cache
def alone() -> dict[str, int]:
    """The terms of LORA."""
    return estimate(LLAMA, LORA).terms


@pytest.mark.slow
@pytest.mark.parametrize(
    ("below", "checkpointing"),
    fast_only(
        [("lora", True), ("dora", False), ("ia3", False)],
        product(["lora", "dora", "ia3"], [False, True]),
    ),
)
def test_over_frozen_adapters(below: str, checkpointing: bool) -> None:
    frozen = make_spec(below), lambda model: {}
    over = replace(LORA, below=(frozen, frozen), checkpointing=checkpointing)
    found = close(LLAMA, over)
    assert found["weights"] > alone()["weights"]
    assert found["optimizer"] == alone()["optimizer"]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_inference(name: str) -> None:
    found = close(CONFIGS[name], MemorySetting(BF16, rows=(200, 200)))
    assert found["kv_cache"] == 2 * 6 * 2 * 32 * 200 * 2 * 2


def test_layers_whose_kinds_their_configuration_works_out() -> None:
    setting = MemorySetting(BF16, make_spec("lora"), rows=(8,), packed=False)
    found = estimate(CONFIGS["mamba"], setting)
    assert found.terms["weights"] == 2 * sum(
        p.numel() for p in fake_model(CONFIGS["mamba"], BF16, 6).parameters()
    )


@pytest.mark.slow
def test_what_is_advised_fits() -> None:
    config, setting = LLAMA, replace(LORA, rows=(128,) * 8)
    memory = estimate(config, replace(LORA, rows=(128,) * 4)).total + 1000
    found = advise(config, setting, memory)
    assert (found.fits, found.batch) == (False, 4)
    assert found.length < setting.length
    assert estimate(config, replace(setting, rows=(found.length,) * 8)).total <= memory
    words, lines = dict(found.changes), verdict(found, setting)
    checkpointed = estimate(config, replace(setting, checkpointing=True)).total
    assert words["gradient checkpointing"] == checkpointed
    assert max(words.values()) <= memory
    assert {"batch 4", f"length {found.length}"} <= set(words)
    assert lines[0].startswith("does not fit: ")
    assert any(line.startswith("would fit with gradient checkpointing: ") for line in lines)
    assert advise(config, replace(LORA, rows=(64, 64)), memory).fits


def test_a_model_that_no_machine_here_holds() -> None:
    terms = estimate(llama("70b"), MemorySetting(BF16, rows=(64,))).terms
    parameters = (
        80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 2 * 32000 * 8192 + 8192
    )
    assert terms["weights"] == pytest.approx(2 * parameters, rel=1e-6)
    assert terms["kv_cache"] == 2 * 80 * 8 * 128 * 64 * 2


@pytest.mark.parametrize(
    ("mode", "fields", "labelled", "message"),
    [
        ("nosuch", {}, None, "unknown method 'nosuch'"),
        ("lora", {"lr": 1e-3}, None, "found lr, which the estimate does not use"),
        ("full", {"storage": "nf4"}, None, "full trains the base's own weights"),
        ("lora", {}, 127, "expected at most 126"),
    ],
)
def test_what_can_not_be_asked(mode: str, fields: dict, labelled: int, message: str) -> None:
    with pytest.raises(LorafoldError, match=message):
        memory_setting(mode, Recipe(**fields), 2, 64, labelled=labelled)


def test_sizes() -> None:
    found = {"24GB": 24 * 10**9, "24 gib": 24 * 2**30, "500MB": 5 * 10**8, "1.5T": 15 * 10**11}
    assert {text: parse_bytes(text) for text in found} == found
    for text, said in {"lots": "expected a size", "24": "did you mean 24GB"}.items():
        with pytest.raises(LorafoldError, match=said):
            parse_bytes(text)


TWO_BLOCKS = tf.LlamaConfig(**{**COMMON, "num_hidden_layers": 2})
DRAWN = RolloutSize(slots=24, group=12, prompt=20, max_new_tokens=40)


def sampling(
    dtype: torch.dtype, drawn: RolloutSize | None = DRAWN, **changes: Any
) -> MemorySetting:
    lora = lf.LoRA(rank=8, dropout=0.0)
    return MemorySetting(Storage(dtype), lora, rows=(16,), draws=drawn, **changes)


def cached(rollouts: Rollouts) -> int:
    runner = rollouts.engine._runner
    assert isinstance(runner, SlotRunner)
    return len(runner.cache.references) * runner.cache.block_bytes


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_bytes_of_the_engine_and_of_its_keys_and_values(dtype: torch.dtype) -> None:
    asked = sampling(dtype)
    expected = trace(TWO_BLOCKS, asked, TWO_BLOCKS.num_hidden_layers)
    model = fake_model(TWO_BLOCKS, asked.base, TWO_BLOCKS.num_hidden_layers)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    lf.attach(model, asked.spec)
    before = allocated(CPU)
    rollouts = Rollouts(model, make_tokenizer(), group=12, max_new_tokens=DRAWN.max_new_tokens)
    rollouts.open(DRAWN.prompt, DRAWN.slots)
    ids = tuple(range(5, 5 + DRAWN.prompt))
    prompts = [TokenizedPrompt(ids, {"prompt": "ask"}, "row 1")] * 2
    held = []
    rollouts.sample(prompts, 0, progress=lambda *_: held.append(cached(rollouts)))
    mapped = sum(pool.nbytes for pool in rollouts.engine._runner.cache._pools())  # type: ignore[attr-defined]
    engine = allocated(CPU) - mapped - before
    assert 0.9 < max(held) / expected.slots <= 1  # the last block of each, if it is needed
    assert 0.9 < engine / expected.engine < 1.05
    peak = peak_of(lambda: rollouts.sample(prompts, 1), CPU) - mapped - before - engine
    peak += max(held)
    assert 0.5 < peak / expected.sampling_peak < 1.05  # without the step's own activations
    rollouts.close()


def test_the_peak_is_that_of_the_step_or_of_drawing() -> None:
    without = estimate(TWO_BLOCKS, sampling(torch.float32, None)).terms
    long = estimate(TWO_BLOCKS, sampling(torch.float32, RolloutSize(64, 8, 20, 2000))).terms
    assert without["engine"] == without["kv_cache"] == 0 < without["activations"]
    assert long["kv_cache"] == 64 * 2048 * 2 * 2 * 2 * 32 * 4
    assert long["activations"] == long["gradients"] == long["logits"] == 0


def test_shorter_completions_fill_a_sequence() -> None:
    """Planned are those that are as long as they may be, of which fewer fit."""
    drawing = PolicyObjective(Grpo(), SamplingOptions(group=4, max_new_tokens=20))
    prompts = [TokenizedPrompt((1,) * n, {}, "") for n in (10, 12, 14)]
    feed = StoredFeed(prompts, [SourcePart(3)], 3, 1, 0)
    found = [
        largest_batch(recipe, feed, drawing, sampling(torch.float32, None))
        for recipe in (Recipe(batch=3, steps=1, max_length=n) for n in (150, 1000))
    ]
    whole = sum(n for prompt in prompts for n in documents([drawing.trained(prompt)]))
    assert [sum(one.rows) for one in found] == [150, whole]
    assert [one.draws for one in found] == [RolloutSize(12, 4, 14, 20)] * 2
