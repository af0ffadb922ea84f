"""The kind of arithmetic that is said for a scope, in the processor's place."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from arithmetic_cases import OPS, Products, W, X
from lorafold.ops.arithmetic import arithmetic, linear, multiplying, widening_pays, widens
from lorafold.ops.operators import plainly

KINDS = {False: torch.bfloat16, True: torch.float32}


@pytest.mark.parametrize("widened", KINDS)
def test_it_holds_until_the_scope_ends(widened: bool) -> None:
    own = widening_pays(torch.bfloat16)
    with multiplying(widened=widened):
        assert arithmetic(X) is KINDS[widened]
        with multiplying(widened=not widened):
            assert widens(torch.bfloat16) is widens(torch.float16) is not widened
        assert widens(torch.bfloat16) is widened
    assert widens(torch.bfloat16) is own
    with pytest.raises(ZeroDivisionError), multiplying(widened=not own):
        _ = 1 / 0
    assert widens(torch.bfloat16) is own


def test_another_thread_decides_for_itself() -> None:
    found: list[bool] = []
    with multiplying(widened=not widening_pays(torch.bfloat16)):
        thread = Thread(target=lambda: found.append(widens(torch.bfloat16)))
        thread.start()
        thread.join()
    assert found == [widening_pays(torch.bfloat16)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("widened", KINDS)
def test_a_backward_multiplies_as_its_forward_did(op: str, widened: bool) -> None:
    given, call = OPS[op]
    with plainly(), Products() as products:
        with multiplying(widened=widened):
            y = call(*(z.detach().clone().requires_grad_() for z in given))
        with multiplying(widened=not widened):
            y.backward(torch.ones_like(y))
    assert products.dtypes == {KINDS[widened]}


def test_compiled_code_is_one_graph_for_every_scope() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear, backend=backend, fullgraph=True)
    for widened in KINDS:
        with multiplying(widened=widened):
            assert torch.equal(compiled(X, W), F.linear(X, W))
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        F.linear
    ]
