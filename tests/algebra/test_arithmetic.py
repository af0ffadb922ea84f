"""16-bit products in fp32 arithmetic, rounded once, in every operation that multiplies."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arithmetic_cases import IN, OPS, Products, T, W, X
from lorafold.ops import arithmetic as module
from lorafold.ops import cross_entropy
from lorafold.ops.arithmetic import (
    MIN_ROWS,
    is_fp32_faster,
    linear,
    matmul_dtype,
    override_widening,
    widens,
)
from lorafold.ops.operators import plain_implementations


@pytest.fixture(autouse=True)
def in_torch() -> Iterator[None]:
    """The products are those of the plain forms."""
    with plain_implementations():
        yield


def run(op: str, dtype: torch.dtype) -> list[Tensor]:
    given, call = OPS[op]
    inputs = [
        z.detach().to(dtype if dtype is torch.float64 else z.dtype).requires_grad_() for z in given
    ]
    y = call(*inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype))
    return [y.detach(), *(z.grad for z in inputs)]  # type: ignore[list-item]


@pytest.mark.parametrize("op", OPS)
def test_wider_arithmetic_errs_no_more(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "SLAB_ELEMENTS", 16 * IN)  # three runs of W's rows
    # the last chunk is too short to be widened for its own sake
    monkeypatch.setattr(cross_entropy, "CHUNK", T - 10)
    truth = run(op, torch.float64)
    found = {}
    for widened, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        with override_widening(widened=widened), Products() as products:
            found[widened] = run(op, torch.bfloat16)
        assert products.dtypes == {dtype}
    for own, wide, true in zip(found[False], found[True], truth, strict=True):
        error, peer = ((z.double() - true).norm() / true.norm() for z in (wide, own))
        assert wide.dtype is own.dtype
        assert error <= 1.01 * peer
        assert error < 0.01


@override_widening(widened=True)
def test_only_16_bit_products_of_many_rows_are_widened() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert matmul_dtype(X.to(dtype)) is torch.float32
    assert matmul_dtype(X.double()) is torch.float64
    assert matmul_dtype(X[: MIN_ROWS - 1]) is torch.bfloat16
    assert matmul_dtype(X.unflatten(0, (2, -1))) is torch.float32
    assert matmul_dtype(X.to("meta")) is torch.bfloat16


# flags of /proc/cpuinfo, torch's two answers, and whether bf16 and fp16 are better widened
PROCESSORS = {
    "amd": ("AuthenticAMD avx512_bf16", False, True, False, True),
    "intel-amx": ("GenuineIntel avx512_bf16 avx512_fp16 amx_tile amx", True, True, False, False),
    "intel-amx-hidden": ("GenuineIntel avx512_bf16 avx512_fp16", False, True, True, False),
    "amd-avx2": ("AuthenticAMD avx2 f16c", False, False, True, True),
    "intel-laptop": ("GenuineIntel avx2 f16c", False, False, True, True),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_pays_follows_from_the_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info, amx, bf16, *expected = PROCESSORS[name]
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module.Path, "read_text", lambda path: info)
    monkeypatch.setattr(module.Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert [
        module.is_fp32_faster.__wrapped__(dtype) for dtype in (torch.bfloat16, torch.float16)
    ] == expected


def test_other_processors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    assert not module.is_fp32_faster.__wrapped__(torch.bfloat16)


KINDS = {False: torch.bfloat16, True: torch.float32}


@pytest.mark.parametrize("widened", KINDS)
def test_it_holds_until_the_scope_ends(widened: bool) -> None:
    own = is_fp32_faster(torch.bfloat16)
    with override_widening(widened=widened):
        assert matmul_dtype(X) is KINDS[widened]
        with override_widening(widened=not widened):
            assert widens(torch.bfloat16) is widens(torch.float16) is not widened
        assert widens(torch.bfloat16) is widened
    assert widens(torch.bfloat16) is own
    with pytest.raises(ZeroDivisionError), override_widening(widened=not own):
        _ = 1 / 0
    assert widens(torch.bfloat16) is own


def test_another_thread_decides_for_itself() -> None:
    found: list[bool] = []
    with override_widening(widened=not is_fp32_faster(torch.bfloat16)):
        thread = Thread(target=lambda: found.append(widens(torch.bfloat16)))
        thread.start()
        thread.join()
    assert found == [is_fp32_faster(torch.bfloat16)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("widened", KINDS)
def test_a_backward_multiplies_as_its_forward_did(op: str, widened: bool) -> None:
    given, call = OPS[op]
    with plain_implementations(), Products() as products:
        with override_widening(widened=widened):
            y = call(*(z.detach().clone().requires_grad_() for z in given))
        with override_widening(widened=not widened):
            y.backward(torch.ones_like(y))
    assert products.dtypes == {KINDS[widened]}


def test_compiled_code_is_one_graph_for_every_scope() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear, backend=backend, fullgraph=True)
    for widened in KINDS:
        with override_widening(widened=widened):
            assert torch.equal(compiled(X, W), F.linear(X, W))
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        F.linear
    ]
