"""Defects that only a GPU would show, planted one by one, are found on shadows."""

from typing import Any

import pytest
import torch

from device_cases import Case, apart, llama
from lorafold.methods.lora import LoRADelta
from lorafold.ops import attention, dropout
from lorafold.ops.packed_documents import Documents


def case(p: float = 0.0, **config: Any) -> Case:
    return Case("lora", {"dropout": p}, "bf16", llama(**config))


def test_an_operand_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRADelta, "scaled", lambda self: (self.B, self.A.cpu(), self.scale))
    with pytest.raises(RuntimeError, match="same device"):
        case().on(True)


def test_numbers_taken_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self: Any) -> Any:
        return self.B, torch.from_numpy(self.A.detach().numpy()), self.scale

    monkeypatch.setattr(LoRADelta, "scaled", scaled)
    with pytest.raises(TypeError, match="can't convert cuda"):
        case().on(True)


def test_a_mask_drawn_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(x: Any, p: float, site: Any) -> Any:
        where = torch.rand(x.shape) < p
        return x.masked_fill(where, 0), where

    monkeypatch.setattr(dropout, "dropped", dropped)
    with pytest.raises(RuntimeError, match="same device"):
        case(0.1).on(True)


def test_a_generator_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(x: Any, p: float, site: Any) -> Any:
        where = torch.rand(x.shape, device=x.device, generator=torch.Generator()) < p
        return x.masked_fill(where, 0), where

    monkeypatch.setattr(dropout, "dropped", dropped)
    with pytest.raises(RuntimeError, match="device type for generator"):
        case(0.1).on(True)


def test_borders_left_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def borders(self: Documents, device: torch.device) -> Any:
        ends = torch.tensor([0, *self.lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends, ends

    monkeypatch.setattr(Documents, "_borders", borders)
    with pytest.raises(RuntimeError, match="same device"):
        case().on(True)


@pytest.mark.parametrize("size", [20, 264])
def test_a_head_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(attention, "takes", lambda *_: True)
    with pytest.raises(AssertionError):
        case(head_dim=size).on(True)


def test_a_value_that_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LoRADelta.scaled
    monkeypatch.setattr(LoRADelta, "scaled", lambda self: before(self) if self.B.sum() < 9 else 0)
    count = case().on(True).count
    waits = {line: n for line, n in count.synchronizations.items() if "core/delta.py" in line}
    assert sum(waits.values()) == 14, count.told()  # one for each of 7 linears in 2 blocks


@pytest.mark.parametrize(("capability", "size"), [((7, 5), 16), ((7, 0), 16), ((9, 0), 20)])
def test_what_has_no_kernel_takes_tiles(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], size: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    found, expected = case(head_dim=size).both()
    assert apart(found, expected) < 3e-2
    assert not any("varlen" in name for name in found.count.launches)
    assert found.count.synchronizations.total() <= 2, found.count.told()
