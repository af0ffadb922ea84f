"""What a served weight is to whoever holds it: told about, written to, tied, copied, traced."""

import copy
import ctypes
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafold as lf
from laws import METHODS, adapted, move, packed
from lorafold.core.attach import base_state
from lorafold.methods.lora import LoRADelta
from weight_readers import Product, gradients, past, relative


def test_telling_shape_dtype_and_device_folds_nothing(monkeypatch) -> None:
    root, x = past("lora", "linear", torch.bfloat16)
    move(lf.attach(root, lf.LoRA(rank=2), ["at"]))
    folds = []
    fold = LoRADelta.fold
    monkeypatch.setattr(LoRADelta, "fold", lambda *args: folds.append(1) or fold(*args))
    for name in ("weight", "bias"):
        served, stored = getattr(root.at, name), root.at._parameters[name]
        assert isinstance(served, nn.Parameter)
        for tell in (
            lambda t: (t.shape, t.dtype, t.device, t.layout, t.ndim, t.is_cuda, t.is_meta),
            lambda t: (t.size(), t.size(0), t.dim(), t.numel(), t.stride(), t.is_contiguous()),
            lambda t: (len(t), t.element_size(), t.is_floating_point(), t.is_sparse, t.itemsize),
            lambda t: (torch.is_tensor(t), torch.is_floating_point(t), t.is_nested, t.nbytes),
        ):
            assert tell(served) == tell(stored)
        assert served.requires_grad
    assert not folds
    root(x)  # one for both
    assert len(folds) == 1


def test_who_writes_writes_to_what_is_stored() -> None:
    root, x = past("lora", "linear")
    adapter = lf.attach(root, METHODS["lora"], ["at"])
    move(adapter)
    stored, change = root.at._parameters["weight"], adapter.deltas["at"].delta()
    for write in (
        lambda w: w.fill_(2.0),
        lambda w: nn.init.constant_(w, 2.0),
        lambda w: w.__setitem__(slice(None), 2.0),
        lambda w: w.copy_(torch.full((32, 16), 2.0)),
        lambda w: w.data.fill_(2.0),
        lambda w: setattr(w, "data", torch.full((32, 16), 2.0)),
    ):
        nn.init.zeros_(stored)
        with torch.no_grad():
            write(root.at.weight)
        assert root.at._parameters["weight"] is stored
        assert torch.equal(stored, torch.full_like(stored, 2.0))
    assert torch.allclose(root.at.weight + 0, 2 + change)
    with torch.no_grad():
        root.at.weight *= 2
    assert root.at._parameters["weight"] is stored
    assert torch.equal(stored, torch.full_like(stored, 4.0))
    assert root.at.weight.requires_grad_() is stored
    assert stored.requires_grad
    root(x).sum().backward()
    assert torch.equal(root.at.weight.grad, stored.grad)
    root.at.weight = nn.Parameter(torch.zeros(32, 16))
    assert torch.allclose(root.at.weight + 0, change)
    root.at.weight.label = "mine"
    assert root.at._parameters["weight"].label == root.at.weight.label == "mine"


def test_weights_are_tied_and_resized_as_ever(tiny_model) -> None:
    model = tiny_model("gemma").eval()
    move(lf.attach(model, lf.LoRA(rank=2), ["q_proj"], tokens=(5, 7)))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stored = embedding._parameters["weight"]
    before = stored.clone()
    head.weight = nn.Parameter(torch.zeros_like(stored))
    model.tie_weights()
    assert head._parameters["weight"] is embedding._parameters["weight"] is stored
    other = nn.Linear(32, 300, bias=False)
    other.weight = embedding.weight
    assert other.weight is stored
    model.resize_token_embeddings(310, mean_resizing=False)
    assert torch.equal(model.get_input_embeddings()._parameters["weight"][:300], before)
    assert model.get_input_embeddings().weight.shape == (310, 32)
    ids = torch.tensor([[5, 6, 309]])
    assert model(ids, use_cache=False).logits.shape == (1, 3, 310)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_state_copies_and_moves_are_those_of_what_is_stored(twin_of) -> None:
    root, x = past("lora", "linear")
    stored = {name: p.clone() for name, p in root.state_dict().items()}
    move(lf.attach(root, METHODS["lora"], ["at"]))
    y = root(x)
    assert base_state(root).keys() == stored.keys()
    assert all(torch.equal(p, stored[name]) for name, p in base_state(root).items())
    twin = twin_of(root)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.at._parameters["weight"].zero_()
    assert torch.equal(root(x), y)
    assert relative(twin.double()(x.double()).float(), y) > 0.1
    floating = [t for t in twin.state_dict().values() if t.is_floating_point()]
    assert len(floating) == len(stored) + 2
    assert all(t.dtype is torch.float64 for t in floating)


def test_two_objects_of_one_state() -> None:
    """A forward may keep things on its module."""

    class Counting(nn.LayerNorm):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = nn.Parameter(x.detach().mean(), requires_grad=False)
            return super().forward(x)

    root = nn.Sequential(Counting(4))
    lf.attach(root, lf.BitFit(), ["0"])
    root(torch.ones(2, 4))
    root(torch.ones(2, 4))
    assert root[0].calls == 2
    assert root.state_dict()["0.seen"] == 1


def test_a_forward_that_was_replaced_before_attaching_is_served_too() -> None:
    root, x = nn.Sequential(nn.Linear(16, 32)), torch.randn(3, 16)
    root[0].forward = root[0].forward  # as hooks of accelerate's keep it
    bare = root(x)
    move(adapter := lf.attach(root, lf.LoRA(rank=2), ["0"]))
    y = root(x)
    assert relative(y, bare) > 1e-2
    adapter.merge()
    assert relative(root(x), y) < 1e-6


def test_gradients_of_torch_func() -> None:
    root, x = past("lora", "linear")
    move(adapter := lf.attach(root, METHODS["lora"], ["at"]))
    names = {n: p.detach() for n, p in root.named_parameters() if "deltas" in n}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(root, parameters, (x,)).sin().sum()

    found = torch.func.grad(loss)(names, x)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(found.values(), gradients(adapter, root(x)), strict=True)
    )
    each = torch.vmap(torch.func.grad(loss), (None, 0))(names, x)
    assert all(torch.allclose(each[n].sum(0), g, atol=1e-5) for n, g in found.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_is_recomputed_under_checkpointing(reentrant: bool) -> None:
    root, x = past("lora", "linear")
    move(adapter := lf.attach(root, METHODS["dora"], ["at"]))
    x.requires_grad_()
    again = gradients(adapter, checkpoint(root, x, use_reentrant=reentrant))
    assert all(map(torch.equal, again, gradients(adapter, root(x))))


@pytest.mark.filterwarnings("ignore")
def test_it_is_traced_and_exported() -> None:
    root, x = past("lora", "linear")
    move(lf.attach(root, METHODS["lora"], ["at"]))
    y = root(x)
    assert torch.allclose(torch.jit.trace(root, (x,))(x), y, atol=1e-6)
    assert torch.allclose(torch.export.export(root, (x,)).module()(x), y, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(root(x), y)


def test_a_parameter_that_changed_before_the_backward_is_found_out() -> None:
    root, x = past("lora", "linear")
    adapter = lf.attach(root, METHODS["lora"], ["at"])
    y = Product.apply(x, root.at.weight)
    move(adapter)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_bias_beside_no_weight() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias

    root = nn.Sequential(Shift())
    bare = root[0].bias
    move(adapter := lf.attach(root, lf.BitFit(), ["0"]))
    assert torch.equal(root(torch.zeros(4)), adapter.deltas["0"].offset)
    assert root[0].bias.shape == (4,)
    with pytest.raises(lf.NotMergeable, match=r"0 \(Shift\): .* Shift has no weight"):
        root[0].bias + 1
    adapter.detach()
    assert root[0].bias is bare


def test_without_values_it_has_the_shapes_alone() -> None:
    root, x = past("lora", "linear")
    lf.attach(root, METHODS["dora"], ["at"])
    assert root.to("meta")(x.to("meta")).shape == (3, 5, 32)


def test_an_address_stays_good() -> None:
    root, _ = past("lora", "linear")
    move(lf.attach(root, METHODS["lora"], ["at"]))
    served = root.at.weight
    numbers = (ctypes.c_float * (32 * 16)).from_address(served.data_ptr())
    _ = [torch.full((32, 16), -1.0) for _ in range(64)]
    assert torch.equal(torch.tensor(numbers).view(32, 16), served.detach())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_numbers_are_not_served(kind: str) -> None:
    root, x, adapter = adapted("lora", kind)
    move(adapter)
    module = root[0]
    assert module.weight.dtype is module._parameters["weight"].dtype
    if kind == "nf4":
        assert module.weight.quant_state is module._parameters["weight"].quant_state
    with pytest.raises(lf.NotMergeable, match="stores a quantized weight"):
        module.weight + 1
    assert torch.equal(module.bias + 0, module._parameters["bias"])
    y = root(x)
    again = nn.Sequential(packed(kind))
    again.load_state_dict(base_state(root), strict=kind == "int8")
    adapter.merge()
    assert relative(root(x), y) < 1e-6
