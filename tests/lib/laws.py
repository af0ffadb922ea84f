"""The laws, for every method on every base: one table, so that a new method is one row.

identity    a fresh delta changes nothing
the law     folding then calling equals calling, or the method says NotMergeable
gradients   every parameter of a moved delta receives one, that of the folded weight
state       it can be carried over, and a deep copy computes the same
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.pytorch_utils import Conv1D

import lorafold as lf
from lorafold.core.spec import Spec
from lorafold.layers import layer_of
from lorafold.layers.bitsandbytes import set_compute_dtype
from lorafold.layers.compressed import CompressedLinear, QuantizationFormat
from lorafold.models.quantizations import QUANTIZED, STORAGES

METHODS: dict[str, Spec] = {
    "lora": lf.LoRA(rank=3, dropout=0.0),
    "rslora": lf.LoRA(rank=3, dropout=0.0, rslora=True),
    "lora-gaussian": lf.LoRA(rank=3, dropout=0.0, init="gaussian"),
    "pissa": lf.PiSSA(rank=3),
    "pissa-whole-svd": lf.PiSSA(rank=3, alpha=6, niter=0),
    "olora": lf.OLoRA(rank=3, alpha=6),
    "dora": lf.DoRA(lf.LoRA(rank=3, dropout=0.0)),
    "dora-loha": lf.DoRA(lf.LoHa(rank=3)),
    "dora-lokr": lf.DoRA(lf.LoKr(rank=3)),
    "dora-pissa": lf.DoRA(lf.PiSSA(rank=3)),
    "dora-vera": lf.DoRA(lf.VeRA(rank=8)),
    "adalora": lf.AdaLoRA(rank=3),
    "vera": lf.VeRA(rank=8),
    "loha": lf.LoHa(rank=3),
    "lokr": lf.LoKr(rank=1),
    "lokr-both": lf.LoKr(rank=1, decompose_both=True, decompose_factor=8),
    "ia3": lf.IA3(feedforward=[]),
    "ia3-inputs": lf.IA3(feedforward=["0"]),
    "bitfit": lf.BitFit(),
    "lt-sft": lf.LTSFT(density=0.2),
    "fish": lf.FishMask(density=1.0),
    "fastfood": lf.Fastfood(dimension=40),
}


def packed(kind: str) -> nn.Module:
    plain = nn.Linear(16, 32)
    module = STORAGES[kind].pack(plain.weight)
    module.bias = plain.bias
    return module


def compressed(codes: QuantizationFormat) -> nn.Module:
    """A linear with random codes and scales, as files have them."""
    module = CompressedLinear(nn.Linear(16, 32), codes, torch.bfloat16)
    for name, p in module.named_parameters():
        if name == codes.scale:
            nn.init.uniform_(p, 0.01, 0.02)
        elif p.dtype == torch.float8_e4m3fn:
            p.data = torch.randn(p.shape).mul(8).to(p.dtype)
        elif name == "weight_packed":
            p.data = torch.randint(-(2**31), 2**31 - 1, p.shape, dtype=torch.int32)
    return module


def to(root: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in root.to(dtype).modules():
        set_compute_dtype(module, dtype)
    return root


BASES = {
    "linear": (lambda: nn.Linear(16, 32), lambda g: torch.randn(3, 5, 16, generator=g)),
    "no-bias": (
        lambda: nn.Linear(16, 32, bias=False),
        lambda g: torch.randn(3, 5, 16, generator=g),
    ),
    "conv1d": (lambda: Conv1D(32, 16), lambda g: torch.randn(3, 5, 16, generator=g)),
    "embedding": (
        lambda: nn.Embedding(16, 32),
        lambda g: torch.randint(0, 16, (3, 5), generator=g),
    ),
    "convolution-1d": (
        lambda: nn.Conv1d(6, 32, 3, stride=2, padding=1),
        lambda g: torch.randn(3, 6, 11, generator=g),
    ),
    "convolution-2d": (
        lambda: nn.Conv2d(6, 32, (3, 2), stride=(1, 2), padding="valid", dilation=(2, 1)),
        lambda g: torch.randn(3, 6, 9, 8, generator=g),
    ),
    "convolution-groups": (
        lambda: nn.Conv2d(6, 32, 3, padding="same", padding_mode="reflect", groups=2, bias=False),
        lambda g: torch.randn(3, 6, 5, 4, generator=g),
    ),
    "grouped": (
        lambda: DeepseekV4GroupedLinear(16, 32, n_groups=4),
        lambda g: torch.randn(3, 5, 4, 16, generator=g),
    ),
    "nf4": (lambda: packed("nf4"), lambda g: torch.randn(3, 5, 16, generator=g)),
    "int8": (lambda: packed("int8"), lambda g: torch.randn(3, 5, 16, generator=g)),
    "fp8": (
        lambda: compressed(QuantizationFormat("float", 8, 8)),
        lambda g: torch.randn(3, 5, 16, generator=g),
    ),
    "int4": (
        lambda: compressed(QuantizationFormat("int", 1, 8, bits=4, packed=True)),
        lambda g: torch.randn(3, 5, 16, generator=g),
    ),
}

# (method, base) for which the method is not defined; `attach` refuses them
NOT_LAID: set[tuple[str, str]] = {
    ("ia3-inputs", "embedding"),
    ("bitfit", "embedding"),
    ("ia3-inputs", "grouped"),
    ("bitfit", "grouped"),
    *(("ia3-inputs", base) for base in BASES if base.startswith("convolution")),
}

CASES = [
    pytest.param(m, b, id=f"{m}-{b}") for m in METHODS for b in BASES if (m, b) not in NOT_LAID
]


def adapted(
    method: str, base: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, torch.Tensor, lf.Adapter]:
    torch.manual_seed(0)
    make, inputs = BASES[base]
    root = to(nn.Sequential(make()), dtype)
    x = inputs(torch.Generator().manual_seed(1))
    x = x.to(dtype) if x.is_floating_point() else x
    return root, x, lf.attach(root, METHODS[method], ["0"])


def move(adapter: lf.Adapter, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def identity_at_start(method: str, base: str) -> None:
    root, x, _ = adapted(method, base)
    with lf.only(root):
        bare = root(x)
    # which kernel convolves, and so the order of its sum, follows from the processor, and from
    # whether the weight is trained
    allowed = 1e-6 if base.startswith("convolution") else 0.0
    torch.testing.assert_close(root(x), bare, rtol=allowed, atol=allowed)


def folding_then_calling_equals_calling(method: str, base: str) -> None:
    root, x, adapter = adapted(method, base)
    with lf.only(root):
        bare = root(x)
    move(adapter)
    y = root(x)
    assert (y - bare).norm() > 1e-3 * bare.norm()
    adapter.merge()
    assert type(root[0]) is (nn.Linear if base in QUANTIZED else type(BASES[base][0]()))
    assert (root(x) - y).norm() <= 1e-6 * y.norm()


def every_parameter_receives_a_gradient(method: str, base: str) -> None:
    root, x, adapter = adapted(method, base)
    move(adapter)
    root(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def gradients_are_those_of_the_folded_weight(method: str, base: str) -> None:
    """The fused path against autograd through fold: the same function in two ways."""
    root, x, adapter = adapted(method, base, torch.float64)
    adapter.deltas["0"].double()
    move(adapter)
    root(x).sin().sum().backward()
    fused = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    layer = layer_of(root[0])
    w, b = adapter.deltas["0"].fold(*layer.dense())
    y = layer.op(x, w)
    (y if b is None else y + layer.each(b)).sin().sum().backward()
    for ours, plain in zip(fused, (p.grad for p in adapter.parameters()), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


def state_round_trip_and_deepcopy(method: str, base: str) -> None:
    root, x, adapter = adapted(method, base)
    move(adapter)
    twin = copy.deepcopy(root)
    other, _, fresh = adapted(method, base)
    fresh.load_state_dict({k: v.clone() for k, v in adapter.state_dict().items()})
    assert torch.equal(twin(x), root(x))
    assert torch.equal(other(x), root(x))


LAWS: tuple[Callable[[str, str], None], ...] = (
    identity_at_start,
    folding_then_calling_equals_calling,
    every_parameter_receives_a_gradient,
    gradients_are_those_of_the_folded_weight,
    state_round_trip_and_deepcopy,
)
