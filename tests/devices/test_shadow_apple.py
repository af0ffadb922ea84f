"""On Apple's GPU no path is taken that only CUDA or a CPU has, and no float64 gets there."""

from typing import Any

import pytest
import torch

from device_cases import HERE, Case, apart, gemma3, mixtral, rows

pytestmark = HERE
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1}, "dora": {"dropout": 0.0}, "adalora": {"dropout": 0.0},
    "vera": {"dropout": 0.0}, "lokr": {}, "ia3": {}, "houlsby": {}, "prefix": {}, "full": {},
    "fastfood": {},
}  # fmt: skip


def agrees(case: Case, off: float) -> None:
    found, expected = case.both()
    assert apart(found, expected) <= off


@pytest.mark.few(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_methods(method: str, packed: bool) -> None:
    agrees(Case(method, METHODS[method], "fp32", packed=packed), 2e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_16_bits(storage: str) -> None:
    agrees(Case("lora", {"dropout": 0.0}, storage), 3e-2)


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [mixtral, gemma3], ids=lambda c: c.__name__)
def test_other_architectures(config: Any) -> None:
    agrees(Case("lora", {"dropout": 0.0}, "fp32", config()), 2e-5)


def test_float64_is_refused_there() -> None:
    with pytest.raises(TypeError, match=r"doesn't support torch\.float64"):
        Case("lora", {}, "fp32", examples=rows((4,)), loaded=in_doubles).on(True)


def in_doubles() -> Any:
    return torch.nn.Linear(2, 2, dtype=torch.float64)
