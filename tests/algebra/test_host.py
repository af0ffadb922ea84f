"""What the host knows of tensors that it sent, on torch's meta device, which can't be read."""

import pytest
import torch

from lorafold.ops.host_tensors import add_int, on_host, rows_at, select_rows, send

META = torch.device("meta")


@pytest.mark.parametrize("inference", [False, True])
def test_what_was_sent_is_known_without_asking(inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.arange(6).view(2, 3)
        found = send(x, META)
        assert found.device == META
        assert on_host(found) is x
        assert torch.equal(on_host(add_int(found, 5)), x + 5)
    assert send(x, torch.device("cpu")) is x
    assert on_host(x) is x


def test_what_has_changed_since_is_asked_for() -> None:
    found = send(torch.arange(4), META)
    found.add_(1)
    with pytest.raises(NotImplementedError, match="meta"):
        on_host(found)
    with pytest.raises(NotImplementedError, match="meta"):
        on_host(torch.zeros(3, device=META))  # it was never sent


def test_a_graph_keeps_nothing_beside_a_tensor() -> None:
    def shifted(x: torch.Tensor) -> torch.Tensor:
        return add_int(send(x, META), 5)

    found = torch.compile(shifted, backend="eager", fullgraph=True)(torch.arange(4))
    assert (found.device, found.shape) == (META, (4,))
    with pytest.raises(NotImplementedError, match="meta"):
        on_host(found)


def test_rows() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert select_rows(x, range(5)) is x
    assert torch.equal(select_rows(x, [3, 0]), x[[3, 0]])
    assert torch.equal(select_rows(x, []), x[:0])
    at = torch.tensor([0, 2, 4])
    assert torch.equal(rows_at(x, at), x[at])
    assert torch.autograd.gradcheck(lambda x: rows_at(x, at), (x,))
