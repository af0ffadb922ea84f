"""A training step computes on a GPU what it does on the CPU, and planted defects are found."""

from typing import Any

import pytest
import torch

from device_cases import Case, apart, gemma3, lfm2, llama, mixtral
from lorafold.methods.lora import LoRADelta
from lorafold.ops import attention, dropout
from lorafold.ops.packed_documents import Documents

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.0}, "rslora": {"dropout": 0.0}, "pissa": {"dropout": 0.0},
    "olora": {"dropout": 0.0}, "dora": {"dropout": 0.0}, "adalora": {"dropout": 0.0},
    "vera": {"dropout": 0.0}, "loha": {}, "lokr": {}, "ia3": {}, "bitfit": {}, "full": {},
    "lt-sft": {}, "fish": {}, "houlsby": {}, "pfeiffer": {}, "prompt": {}, "prefix": {},
    "fastfood": {},
}  # fmt: skip
# relative: fp32 by another order of sums; in 16 bits two roundings
OFF = {"fp32": 1e-5, "bf16": 3e-2, "nf4": 3e-2, "int8": 3e-2}


def agrees(case: Case, off: float | None = None) -> Any:
    """What the device counted, once both agree."""
    found, expected = case.both()
    assert apart(found, expected) <= (off or OFF[case.storage])
    return found.count


@pytest.mark.few(8)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", OFF)
def test_every_method_on_every_storage(method: str, storage: str) -> None:
    case = Case(method, METHODS[method], storage)
    if method in ("full", "lt-sft", "fish", "pissa", "olora") and storage in ("nf4", "int8"):
        pytest.skip("of a base that is not quantized")
    # the gradient of one scale of a vector is a sum of terms that nearly cancel
    off = {"fp32": 2e-5}.get(storage, 0.3) if method == "fastfood" else None
    count = agrees(case, off)
    assert count.synchronizations.total() <= 2, count.told()


@pytest.mark.few(3)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix", "prompt"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_layouts(method: str, packed: bool, checkpointing: bool) -> None:
    options = METHODS[method]
    count = agrees(Case(method, options, "fp32", packed=packed, checkpointing=checkpointing))
    # transformers' own masks of padded rows ask three times
    assert count.synchronizations.total() <= (2 if packed else 4), count.told()


@pytest.mark.few(2)
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_dropout_drops_the_same_elements(method: str, storage: str) -> None:
    agrees(Case(method, {"dropout": 0.1}, storage))


@pytest.mark.few(3)
@pytest.mark.parametrize("config", [mixtral, gemma3, lfm2], ids=lambda c: c.__name__)
@pytest.mark.parametrize("storage", ["fp32", "nf4", "bf16"])
def test_other_architectures(config: Any, storage: str) -> None:
    agrees(Case("lora", {"dropout": 0.0}, storage, config(), packed=config is not lfm2))


@pytest.mark.few(2)
@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "ia3"])
def test_experts(method: str, storage: str) -> None:
    options = {"dropout": 0.1} if method == "lora" else METHODS[method]
    agrees(Case(method, options, storage, mixtral()))


BUDGETS = {  # launches of a block in a step, forward and backward
    "lora": (Case("lora", {"dropout": 0.0}), 89),
    "lora-dropout": (Case("lora", {"dropout": 0.05}), 100),
    "nf4-dropout": (Case("lora", {"dropout": 0.05}, "nf4"), 142),
    "dora-nf4": (Case("dora", {"dropout": 0.0}, "nf4"), 208),
    "adalora": (Case("adalora", {"dropout": 0.0}), 208),
    "experts": (Case("lora", {"dropout": 0.0}), 150),
    "experts-nf4": (Case("lora", {"dropout": 0.0}, "nf4"), 174),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_block_launches_no_more_than_its_budget(name: str) -> None:
    case, most = BUDGETS[name]
    counts = []
    for blocks in (1, 2):
        case.config = mixtral(blocks, 32) if name.startswith("experts") else llama(blocks)
        counts.append(case.on(True).count)
    one, two = counts
    assert two.synchronizations.total() <= 1, two.told()
    assert (two.launches - one.launches).total() <= most, (two.lines - one.lines).most_common(40)


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
    monkeypatch.setattr(attention, "flash_supports", lambda *_: True)
    with pytest.raises(AssertionError):
        case(head_dim=size).on(True)


def test_a_value_that_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LoRADelta.scaled
    monkeypatch.setattr(LoRADelta, "scaled", lambda self: before(self) if self.B.sum() < 9 else 0)
    count = case().on(True).count
    waits = {line: n for line, n in count.synchronizations.items() if "core/delta.py" in line}
    assert sum(waits.values()) == 14, count.told()  # one for each of 7 linears in 2 blocks


@pytest.mark.parametrize(("capability", "size"), [((7, 5), 16), ((7, 0), 16), ((9, 0), 20)])
def test_what_has_no_kernel_takes_tiles(monkeypatch, capability, size) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    found, expected = case(head_dim=size).both()
    assert apart(found, expected) < 3e-2
    assert not any("varlen" in name for name in found.count.launches)
    assert found.count.synchronizations.total() <= 2, found.count.told()
