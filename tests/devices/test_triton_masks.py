"""The kernel of dropout, interpreted and compiled, without a GPU."""

from typing import Any

import pytest
import torch

from lorafold.kernels.triton_kernels import DROPOUT_CONSTANTS, _TritonDropout
from lorafold.ops.dropout import MASKED

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
NAMES = [0, (1 << 40) + 7, (5 << 40) + (3 << 32) + 9, (1 << 62) + 3, 12345678901234]
KEY, SITE = 0x723456789ABCDEF1, 0xFEDCBA98


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return _TritonDropout()


@pytest.mark.parametrize("p", [0.05, 0.5, 1e-4])
@pytest.mark.parametrize("width", [7, 20, 576, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_the_plain_form(
    interpreted: Any, width: int, p: float, dtype: torch.dtype
) -> None:
    x, names = torch.randn(len(NAMES), width).to(dtype), torch.tensor(NAMES)
    found = interpreted.masked(x, p, names, KEY, SITE)
    assert all(map(torch.equal, found, MASKED.plain(x, p, names, KEY, SITE)))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_in_registers(capability: int, tmp_path, monkeypatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = dict.fromkeys(("low", "high", "site"), "i64") | {"width": "i32", "limit": "i32"}
    tensors = {"names": "*i64", "x": "*bf16", "kept": "*bf16", "where": "*u8"}
    types = {**tensors, **numbers} | dict.fromkeys(DROPOUT_CONSTANTS, "constexpr")
    source = ASTSource(fn=_TritonDropout().kernel, signature=types, constexprs=DROPOUT_CONSTANTS)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert ".local" not in made.asm["ptx"]  # nothing is spilled
    assert "mul.hi.u32" in made.asm["ptx"]  # words of 32 bits, as on the CPU
