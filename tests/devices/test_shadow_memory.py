"""An estimate for a GPU counts what a step on fake tensors that are on cuda:0 holds."""

import gc
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import lorafold as lf
from device_cases import moved
from lorafold.memory import trace as tracing
from lorafold.memory.presets import llama
from lorafold.memory.trace import MemorySetting, trace
from lorafold.models.quantizations import Storage
from lorafold.runtime.assumed_device import DeviceKind

BF16 = Storage(torch.bfloat16)
LORA, DORA = lf.LoRA(rank=16), lf.DoRA(lf.LoRA(rank=16))
ROWS = (256, 512, 1024)
SETTINGS = {
    "lora": MemorySetting(BF16, LORA, rows=ROWS),
    "lora-8k": MemorySetting(BF16, LORA, rows=(8192,)),
    "no-dropout": MemorySetting(BF16, lf.LoRA(rank=16, dropout=0.0), rows=ROWS),
    "rank-64": MemorySetting(BF16, lf.LoRA(rank=64), rows=ROWS),
    "dora": MemorySetting(BF16, DORA, rows=ROWS),
    "qlora": MemorySetting(Storage(torch.bfloat16, "nf4"), LORA, rows=ROWS),
    "int8": MemorySetting(Storage(torch.bfloat16, "int8"), LORA, rows=ROWS),
    "full": MemorySetting(BF16, lf.Full(), rows=ROWS),
    "checkpointing": MemorySetting(BF16, LORA, rows=ROWS, checkpointing=True),
    "qlora-checkpointing": MemorySetting(
        Storage(torch.bfloat16, "nf4"), LORA, rows=(8192,), checkpointing=True
    ),
    "padded": MemorySetting(BF16, LORA, rows=(512, 512), packed=False),
    "fp32": MemorySetting(Storage(torch.float32), LORA, rows=ROWS),
}
MIB = 1 << 20


def efficient(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """The kernel that CUDA computes masked attention with, which a CPU build does not choose."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        inf = float("-inf")
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, inf)
    bias = None if attn_mask is None else attn_mask.expand(*q.shape[:2], *attn_mask.shape[-2:])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]


def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models and inputs of a trace made on the device."""
    made, token_ids = tracing.fake_model, tracing.token_ids

    def model(*given: Any) -> Any:
        return moved(made(*given), lambda x: x.to("cuda:0"))

    monkeypatch.setattr(tracing, "fake_model", model)
    monkeypatch.setattr(tracing, "token_ids", lambda *shape: token_ids(*shape).to("cuda:0"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", efficient)
    monkeypatch.setattr(tracing, "assume_device", lambda kind: nullcontext())


@pytest.mark.few(3)
@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, setting = llama("7b"), replace(SETTINGS[name], device_kind=DeviceKind("cuda", (9, 0)))
    expected = trace(config, setting, 2)
    gc.collect()
    there(monkeypatch)
    found = trace(config, setting, 2)
    for term in ("activations", "forward", "backward", "gradients", "optimizer", "adapter"):
        ours, theirs = getattr(expected, term), getattr(found, term)
        assert abs(ours - theirs) <= max(0.03 * theirs, 2 * MIB), (term, ours / MIB, theirs / MIB)
