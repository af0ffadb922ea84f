"""The kernels of gains and of dropout, interpreted and compiled, without a GPU."""

from typing import Any

import pytest
import torch

from lorafold.core.rounding import ODD
from lorafold.kernels.triton_kernels import (
    DROPOUT_CONSTANTS,
    SCALE_CONSTANTS,
    _TritonDropout,
    _TritonScale,
)
from lorafold.ops.dropout import MASKED
from lorafold.ops.scale_and_add import BACKWARD, SCALE

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return _TritonScale()


@pytest.mark.parametrize("shape", [(2, 9, 20), (70, 576), (1, 3)], ids=str)
@pytest.mark.parametrize("more", ["", "c", "onto", "c onto"])
def test_bits_are_those_of_the_plain_form(interpreted, shape: tuple[int, ...], more: str) -> None:
    torch.manual_seed(0)
    y, z, onto = (torch.randn(shape).bfloat16() for _ in range(3))
    g, c = 1 + 1e-3 * torch.randn(shape[-1]), torch.randn(shape[-1])
    given = y, g, c if "c" in more else None, onto if "onto" in more else None
    assert torch.equal(interpreted.scale(*given), SCALE.plain(*given))
    if len(shape) == 3:  # gains of each row of the batch
        each = (t if t is None or t.dim() > 1 else torch.stack([t, 2 * t])[:, None] for t in given)
        given = tuple(each)
        assert torch.equal(interpreted.scale(*given), SCALE.plain(*given))
    gy, gg, gc = interpreted.scale_backward(z, y, g, "c" in more)
    plain = BACKWARD.plain(z, y, g, "c" in more)
    unit = 2.0**-7  # the interpreter cuts bf16 off, where a GPU rounds to the nearest
    assert torch.allclose(gy.float(), plain[0].float(), rtol=unit, atol=0)
    assert torch.allclose(gg, (z.float() * y.float()).flatten(0, -2).sum(0), rtol=1e-5, atol=1e-5)
    assert torch.allclose(gc, plain[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_they_compile_in_registers(capability: int, tmp_path, monkeypatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = {"size": "i64", "width": "i32"}
    kernels = _TritonScale()
    forward, backward = kernels.forward, kernels.backward
    inputs = {"y": "*bf16", "g": "*fp32", "c": "*fp32", "onto": "*bf16", "out": "*bf16"}
    of_forward = SCALE_CONSTANTS | {"ODD": ODD, "OFFSET": True, "ONTO": True}
    back = {"z": "*bf16", "y": "*bf16", "g": "*fp32", "found": "*bf16", "parts": "*fp32"}
    of_backward = SCALE_CONSTANTS | {"OFFSET": True}
    for kernel, tensors, constants in (
        (forward, inputs, of_forward), (backward, back, of_backward),
    ):  # fmt: skip
        more = {"each": "i32"} if kernel is forward else {}
        types = {**tensors, **numbers, **more, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert ".local" not in made.asm["ptx"]  # nothing is spilled


NAMES = [0, (1 << 40) + 7, (5 << 40) + (3 << 32) + 9, (1 << 62) + 3, 12345678901234]
KEY, SITE = 0x723456789ABCDEF1, 0xFEDCBA98


@pytest.fixture
def interpreted_dropout(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return _TritonDropout()


@pytest.mark.parametrize("p", [0.05, 0.5, 1e-4])
@pytest.mark.parametrize("width", [7, 20, 576, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_those_of_the_plain_form(interpreted_dropout, width, p, dtype) -> None:
    x, names = torch.randn(len(NAMES), width).to(dtype), torch.tensor(NAMES)
    found = interpreted_dropout.masked(x, p, names, KEY, SITE)
    assert all(map(torch.equal, found, MASKED.plain(x, p, names, KEY, SITE)))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_dropout_compiles_in_registers(capability: int, tmp_path, monkeypatch) -> None:
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
