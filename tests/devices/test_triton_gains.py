"""The kernels of gains, interpreted and compiled, without a GPU."""

from typing import Any

import pytest
import torch

from lorafold.core.rounding import ODD
from lorafold.kernels.triton_kernels import SCALE_CONSTANTS, _TritonScale
from lorafold.ops.scale import BACKWARD, SCALE

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
