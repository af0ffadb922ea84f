"""Estimates against what a real step holds, counted at the allocator, over architectures, methods
and storages.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from torch import nn

import mixtures
from architectures import MULTIMODAL
from conftest import fast_only
from lorafold.api.estimate import bytes_of
from lorafold.core.delta import Delta
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.layers import LAYERS
from lorafold.layers.bitsandbytes import Quantized
from lorafold.memory.estimate import advise, estimate
from lorafold.memory.presets import llama, setting_of
from lorafold.memory.result import verdict
from lorafold.memory.trace import Setting
from lorafold.methods import make_spec
from lorafold.methods.parts.trainable_tokens import TrainableTokens
from lorafold.models.classifier import head_paths
from lorafold.models.fake import fake_model, period
from lorafold.models.quantizations import MADE, STORAGES, Storage, StorageRow
from lorafold.ops import attention
from lorafold.recipe.recipe import Recipe
from memory_cases import BF16, COMMON, CONFIGS, LORA, close

METHODS = [
    "lora",
    "dora",
    "vera",
    "adalora",
    "loha",
    "lokr",
    "ia3",
    "bitfit",
    "houlsby",
    "prefix",
    "prompt",
    "lt-sft",
    "full",
    "linear-probe",
]


@pytest.fixture(autouse=True)
def what_exists_is_not_looked_at_again() -> None:
    """Every estimate and every measurement collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, checkpointing: bool) -> None:
    base = Storage(torch.float32) if method == "full" else BF16
    close(
        CONFIGS["llama"],
        replace(LORA, base=base, spec=make_spec(method), checkpointing=checkpointing),
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_how_soon_blocks_are_alike(name: str) -> None:
    assert period(CONFIGS[name]) == (2 if name == "gemma2" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])  # llama is that of the methods
def test_architectures(name: str) -> None:
    close(CONFIGS[name], LORA)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "method"),
    fast_only([("nf4", "loha"), ("int8", "lora")], product(MADE, ["lora", "loha"])),
)
def test_storages(quantization: str, method: str) -> None:
    close(
        CONFIGS["llama"],
        replace(LORA, base=Storage(torch.bfloat16, quantization), spec=make_spec(method)),
    )


@pytest.mark.slow
def test_a_packed_base_whose_matrices_lie_the_other_way_round() -> None:
    close(CONFIGS["gpt2"], replace(LORA, base=Storage(torch.bfloat16, "nf4")))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_that_are_there_already(method: str) -> None:
    close(
        CONFIGS["llama"],
        replace(LORA, base=Storage(torch.float32), spec=make_spec(method), accumulating=True),
    )


@pytest.mark.slow
def test_a_peak_that_moves_with_the_number_of_blocks() -> None:
    """By the head, which is large, where there are few of them, and by the gradients of many."""
    config = tf.LlamaConfig(**COMMON | {"num_hidden_layers": 20, "vocab_size": 6000})
    setting = Setting(BF16, make_spec("full"), rows=(32,), checkpointing=True)
    terms = close(config, setting)
    assert terms["gradients"] > terms["workspace"] + terms["activations"]


@pytest.mark.slow
def test_rows_of_many_lengths_few_of_whose_tokens_count() -> None:
    close(CONFIGS["llama"], replace(LORA, rows=(30, 200, 90, 55), labelled=60))


@pytest.mark.slow
def test_attention_over_long_documents_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(LORA, checkpointing=True)
    short = close(CONFIGS["llama"], setting)
    monkeypatch.setattr(attention, "LONG", 100)
    long = close(CONFIGS["llama"], setting)
    config = CONFIGS["llama"]
    kept = config.num_hidden_layers * 256 * config.hidden_size * BF16.dtype.itemsize
    assert long["activations"] - short["activations"] == pytest.approx(kept, rel=0.05)


@pytest.mark.slow
def test_rows_that_are_filled_up() -> None:
    close(CONFIGS["llama"], replace(LORA, rows=(100, 160, 128), labelled=60, packed=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    fast_only([("llama", True), ("bert", False)], product(["llama", "bert"], [False, True])),
)
def test_classifiers(name: str, checkpointing: bool) -> None:
    def beside(model: Any) -> dict[str, Any]:
        return {"modules_to_save": head_paths(model)}

    close(
        CONFIGS[name],
        replace(
            LORA, rows=(100, 160, 128), classes=3, packed=False, beside=beside,
            checkpointing=checkpointing,
        ),
    )


class Halves(nn.Module):
    """A linear whose weights are held in 8 bits and one scale."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", w.float().abs().amax() / 127)
        self.register_buffer("codes", (w.float() / self.scale).round().to(torch.int8))
        self.out_features, self.in_features = w.shape
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes * self.scale).to(x.dtype).t()


class HalvesLayer(Quantized):
    dtype = torch.bfloat16  # type: ignore[assignment]

    def dequantized(self) -> torch.Tensor:
        return (self.module.codes * self.module.scale).to(self.dtype)  # type: ignore[operator]


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
def test_a_storage_and_a_method_that_no_one_here_has_heard_of(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    row = StorageRow(8, packer=f"{__name__}:Halves")
    monkeypatch.setitem(STORAGES, "halves", row)
    monkeypatch.setitem(LAYERS, f"{Halves.__module__}.{Halves.__qualname__}", HalvesLayer)
    own = replace(
        LORA, base=Storage(torch.bfloat16, "halves"), spec=Gain(), checkpointing=checkpointing
    )
    held = close(CONFIGS["llama"], own)
    in_bf16 = estimate(CONFIGS["llama"], replace(own, base=BF16)).terms
    assert held["weights"] < 0.6 * in_bf16["weights"]
    assert held["adapter"] == 4 * 6 * (2 * 128 + 2 * 64 + 2 * 320 + 128)


def test_what_is_trained_beside_the_method() -> None:
    beside = {
        "modules_to_save": ["norm"],
        "tokens": TrainableTokens((500, 501, 7), frozenset({500, 501})),
    }
    close(CONFIGS["llama"], replace(LORA, beside=lambda model: beside))


@cache
def alone() -> dict[str, int]:
    """The terms of LORA."""
    return estimate(CONFIGS["llama"], LORA).terms


@pytest.mark.slow
@pytest.mark.parametrize(
    ("below", "checkpointing"),
    fast_only(
        [("lora", True), ("dora", False), ("ia3", False)],
        product(["lora", "dora", "ia3"], [False, True]),
    ),
)
def test_over_frozen_adapters(below: str, checkpointing: bool) -> None:
    over = replace(LORA, below=((make_spec(below), LORA.beside),) * 2, checkpointing=checkpointing)
    found = close(CONFIGS["llama"], over)
    assert found["weights"] > alone()["weights"]
    assert found["optimizer"] == alone()["optimizer"]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_inference(name: str) -> None:
    found = close(CONFIGS[name], Setting(BF16, rows=(200, 200)))
    assert found["kv_cache"] == 2 * 6 * 2 * 32 * 200 * 2 * 2


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "targets", "dtype"),
    fast_only(
        [
            *((name, "all-linear", torch.float32) for name in mixtures.CONFIGS),
            *product(["mixtral", "gpt-oss"], [None, "attention"], [torch.float32]),
        ],
        product(
            mixtures.CONFIGS, [None, "attention", "all-linear"], [torch.float32, torch.bfloat16]
        ),
    ),
)
def test_mixtures_of_experts(name: str, targets: str | None, dtype: torch.dtype) -> None:
    """Experts without an adapter run torch's grouped product, whatever the dtype."""
    spec = None if targets is None else make_spec("lora")
    # in gpt-oss documents of one sequence influence each other, so that rows are padded
    setting = Setting(Storage(dtype), spec, targets, rows=(64, 64), packed=name != "gpt-oss")
    close(mixtures.CONFIGS[name](), setting)


@pytest.mark.parametrize("spec", ["lora", pytest.param(None, marks=pytest.mark.slow)])
def test_experts_whose_router_counts_their_rows(spec: str | None) -> None:
    """JetMoe's: as many for each, where there are no values."""
    config = tf.JetMoeConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=3, num_key_value_heads=2, kv_channels=32,
        intermediate_size=256, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    close(config, Setting(BF16, spec and make_spec(spec), rows=(64, 64)))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "spec"),
    fast_only(
        [*product(MULTIMODAL, ["lora"]), ("gemma3", None), ("qwen2-audio", None)],
        product(MULTIMODAL, [None, "lora"]),
    ),
)
def test_towers(name: str, spec: str | None) -> None:
    """That of Gemma 3 is initialized with values that fake tensors lack, and its head is tied."""
    config = MULTIMODAL[name].config()
    packed = name != "qwen2.5-vl"
    close(config, Setting(BF16, spec and make_spec(spec), rows=(96, 64), packed=packed))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", MADE)
def test_inference_on_a_quantized_base(quantization: str) -> None:
    """bitsandbytes' own forward runs there, over fake tensors as over real ones."""
    close(CONFIGS["llama"], Setting(Storage(torch.bfloat16, quantization), rows=(200, 200)))


def test_layers_whose_kinds_their_configuration_works_out() -> None:
    found = estimate(CONFIGS["mamba"], Setting(BF16, make_spec("lora"), rows=(8,), packed=False))
    assert found.terms["weights"] == 2 * sum(
        p.numel() for p in fake_model(CONFIGS["mamba"], BF16, 6).parameters()
    )


@pytest.mark.slow
def test_a_large_vocabulary_is_held_once() -> None:
    """While a model is made it may hold embedding and head apart, and ties them then."""
    config = tf.LlamaConfig(**COMMON | {"vocab_size": 20000}, tie_word_embeddings=True)
    close(config, Setting(BF16, rows=(100,)))
    close(config, LORA)


@pytest.mark.slow
def test_what_is_advised_fits() -> None:
    config, setting = CONFIGS["llama"], replace(LORA, rows=(128,) * 8)
    memory = estimate(config, replace(LORA, rows=(128,) * 4)).total + 1000
    found = advise(config, setting, memory)
    assert (found.fits, found.batch) == (False, 4)
    assert found.length < setting.length
    assert estimate(config, replace(setting, rows=(found.length,) * 8)).total <= memory
    words = dict(found.changes)
    assert (
        words["gradient checkpointing"]
        == estimate(config, replace(setting, checkpointing=True)).total
    )
    assert max(words.values()) <= memory
    assert {"batch 4", f"length {found.length}"} <= set(words)
    assert verdict(found, setting)[0].startswith("does not fit: ")
    assert any(
        line.startswith("would fit with gradient checkpointing: ")
        for line in verdict(found, setting)
    )
    assert advise(config, replace(LORA, rows=(64, 64)), memory).fits


def test_a_model_that_no_machine_here_holds() -> None:
    terms = estimate(llama("70b"), Setting(BF16, rows=(64,))).terms
    parameters = (
        80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 2 * 32000 * 8192 + 8192
    )
    assert terms["weights"] == pytest.approx(2 * parameters, rel=1e-6)
    assert terms["kv_cache"] == 2 * 80 * 8 * 128 * 64 * 2


@pytest.mark.parametrize(
    ("mode", "fields", "message"),
    [
        ("nosuch", {}, "unknown method 'nosuch'"),
        ("lora", {"lr": 1e-3}, "found lr, which an estimate does not use"),
        ("full", {"storage": "nf4"}, "full trains the base's own weights"),
    ],
)
def test_what_can_not_be_asked(mode: str, fields: dict, message: str) -> None:
    with pytest.raises(LorafoldError, match=message):
        setting_of(mode, Recipe(**fields), 1, 64)


def test_labels_are_no_more_than_there_are() -> None:
    with pytest.raises(LorafoldError, match="expected at most 126"):
        setting_of("lora", Recipe(), 2, 64, labelled=127)


def test_sizes() -> None:
    assert [bytes_of(text) for text in ("24GB", "24 gib", "500MB", "1.5T")] == [
        24 * 10**9,
        24 * 2**30,
        5 * 10**8,
        15 * 10**11,
    ]
    with pytest.raises(LorafoldError, match="expected a size"):
        bytes_of("lots")
    with pytest.raises(LorafoldError, match="did you mean 24GB"):
        bytes_of("24")
