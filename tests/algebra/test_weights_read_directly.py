"""Modules whose weight or bias somebody reads, writes, ties or copies: the law holds there."""

import copy
import ctypes
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

import lorafold as lf
from laws import METHODS, NOT_LAID, adapted, move, packed
from lorafold.core.attach import attach_delta, base_state, selection_of
from lorafold.core.folded_weights import FoldedRead
from lorafold.layers import layer_class
from lorafold.methods.bottleneck import BottleneckDelta
from lorafold.methods.lora import LoRADelta
from weight_readers import STORAGES, Past, Product, gradients, past, relative

CASES = [
    pytest.param(m, s, id=f"{m}-{s}") for m in METHODS for s in STORAGES if (m, s) not in NOT_LAID
]


@pytest.mark.few(18)
@pytest.mark.parametrize(("method", "storage"), CASES)
def test_the_law_holds_past_the_forward(method: str, storage: str) -> None:
    root, x = past(method, storage)
    bare = root(x)
    adapter = lf.attach(root, METHODS[method], ["at"])
    assert torch.allclose(root(x), bare, atol=1e-6)
    move(adapter)
    y = root(x)
    assert relative(y, bare) > 1e-3
    if storage != "embedding":
        assert relative(root.at(x), y) < 1e-5
    with lf.only(root):
        assert torch.equal(root(x), bare)
    adapter.merge()
    assert relative(root(x), y) < 1e-6


@pytest.mark.few(18)
@pytest.mark.parametrize(("method", "storage"), CASES)
def test_gradients_reach_the_deltas(method: str, storage: str) -> None:
    """Those of the law, and through a function that takes the tensor as it is."""
    root, x = past(method, storage, torch.float64)
    adapter = lf.attach(root, METHODS[method], ["at"])
    adapter.deltas["at"].double()
    move(adapter)
    served = gradients(adapter, root(x))
    assert all(g is not None and g.any() for g in served)
    layer = layer_class(root.at)(root.at)
    w, b = adapter.deltas["at"].fold(*layer.dense())
    law = gradients(adapter, F.linear(x, w.t() if storage == "embedding" else w, b))
    for ours, plain in zip(served, law, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)
    if storage in ("linear", "no-bias") and method != "bitfit":
        z = Product.apply(x, root.at.weight)
        deep = gradients(adapter, z if root.at.bias is None else z + root.at.bias)
        assert torch.equal(z, F.linear(x, root.at.weight))
        for ours, plain in zip(deep, law, strict=True):
            assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


def encoder(batch_first: bool, dtype: torch.dtype | None = None, **options) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).to(dtype)


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()


def of_torch(kind: str, first: bool, dtype: torch.dtype | None = None) -> nn.Module:
    if kind in ("attention", "no-bias"):
        bias = kind == "attention"
        return nn.MultiheadAttention(16, 2, bias=bias, batch_first=first, dtype=dtype)
    if kind == "norm-first":
        return encoder(first, dtype, norm_first=True, activation="gelu").layers[1]
    return encoder(first, dtype) if kind == "encoder" else encoder(first, dtype).layers[0]


TORCHS = ("attention", "no-bias", "layer", "norm-first", "encoder")


def called(model: nn.Module, x: Tensor, padded: bool = True) -> Tensor:
    """The output at the tokens: at padding torch's two paths differ."""
    batch_first = next(m.batch_first for m in model.modules() if hasattr(m, "batch_first"))
    x = x if batch_first else x.transpose(0, 1)
    mask = PADDED if padded else None
    if isinstance(model, nn.MultiheadAttention):
        y = model(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    else:
        y = model(x, src_key_padding_mask=mask)
    y = y if batch_first else y.transpose(0, 1)
    y = y.to_padded_tensor(0.0, x.shape) if y.is_nested else y
    return F.pad(y, (0, 0, 0, 5 - y.shape[1]))[~PADDED]


@pytest.mark.few(14)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", TORCHS)
def test_torchs_own_transformers(kind: str, training: bool, batch_first: bool, dtype) -> None:
    torch.manual_seed(0)
    model = of_torch(kind, batch_first, dtype).train(training).requires_grad_(False)
    x, size = torch.randn(3, 5, 16).to(dtype), torch.finfo(dtype).eps
    bare = called(model, x)
    adapter = lf.attach(model, lf.LoRA(rank=3, dropout=0.0))
    assert any(path.endswith("out_proj") for path in adapter.sites)
    move(adapter, 0.3)
    y = called(model, x)
    assert relative(y.float(), bare.float()) > 0.1
    y.float().sin().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    with torch.no_grad():
        assert torch.equal(called(model, x), y)
    with lf.only(model):
        assert torch.equal(called(model, x), bare)
    adapter.merge()
    assert relative(called(model, x).float(), y.float()) < max(1e-5, 4 * size)


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_bare_base_takes_torchs_fast_path_and_an_adapter_the_other() -> None:
    model, x = encoder(True).eval(), torch.randn(3, 5, 16)
    with torch.no_grad(), Names() as plain:
        called(model, x, padded=False)
    adapter = lf.attach(model, lf.LoRA(rank=3))
    with torch.no_grad(), Names() as live:
        called(model, x, padded=False)
    with lf.only(model), torch.no_grad(), Names() as bare:
        called(model, x, padded=False)
    assert "_transformer_encoder_layer_fwd.default" in plain.found
    assert bare.found == plain.found
    assert "_transformer_encoder_layer_fwd.default" not in live.found
    adapter.detach()
    with torch.no_grad(), Names() as after:
        called(model, x, padded=False)
    assert after.found == plain.found


def test_a_change_without_a_weight_is_refused_where_it_would_be_passed_by() -> None:
    model, x = encoder(True).eval(), torch.randn(3, 5, 16)
    bottleneck = BottleneckDelta(16, 4, "gelu", torch.device("cpu"))
    nn.init.normal_(bottleneck.up)
    inside = copy.deepcopy(model)
    path = "layers.1.self_attn.out_proj"
    module = model.get_submodule(path)
    attach_delta(module, layer_class(module), "it", bottleneck, selection_of(model), path)
    module.selection.names = ("it",)
    assert module.weight.shape == (16, 16)  # nothing is computed with it
    with pytest.raises(lf.NotMergeable, match="leave the module out of the targets") as e:
        called(model, x, padded=False)
    assert f"{path} (NonDynamicallyQuantizableLinear): the model reads the" in str(e.value)
    assert "adapter 'it' can't be merged: BottleneckDelta is not a change of" in str(e.value)
    assert "\n" not in str(e.value)

    # torch's fast path reads these too, and its other one calls them
    module = inside.get_submodule("layers.1.linear2")
    bare = called(inside, x, padded=False)
    attach_delta(module, layer_class(module), "it", bottleneck, selection_of(inside))
    module.selection.names = ("it",)
    assert relative(called(inside, x, padded=False), bare) > 0.1


def test_two_adapters_lie_upon_each_other() -> None:
    root, x = past("lora", "linear")
    adapters = [
        lf.attach(root, METHODS[method], ["at"], name=name)
        for method, name in (("dora", "lower"), ("ia3", "upper"))
    ]
    for adapter in adapters:
        move(adapter)
    both = root(x)
    assert relative(root.at(x), both) < 1e-5
    alone = []
    for name in ("lower", "upper"):
        with lf.only(root, name):
            alone.append(root(x))
            assert relative(root.at(x), alone[-1]) < 1e-5
    assert min(relative(one, both) for one in alone) > 1e-3
    assert all(g is not None and g.any() for a in adapters for g in gradients(a, root(x)))
    for adapter in adapters:
        adapter.merge()
    assert relative(root(x), both) < 1e-6


def test_a_reading_keeps_the_adapters_that_it_was_read_under() -> None:
    root, x, _ = laid()
    y, weight = root(x), root.at.weight
    with lf.only(root):
        assert relative(F.linear(x, weight, root.at.bias), y) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_that_is_trained_is_served_and_no_other(bias: bool) -> None:
    root = Past(nn.Linear(16, 32, bias=bias))
    lf.attach(root, lf.LoRA(rank=2), ["at"])
    assert (root.at.bias is not None) == bias
    adapter = lf.attach(root, lf.BitFit(), ["at"], name="biases")
    move(adapter)
    assert root.at.bias.shape == (32,)
    expected = adapter.deltas["at"].offset + (root.state_dict()["at.bias"] if bias else 0)
    assert torch.equal(root.at.bias + 0, expected)
    assert all(g.any() for g in gradients(adapter, root(torch.randn(3, 16))))


def with_tokens(ids: tuple[int, ...]) -> tuple[nn.ModuleDict, lf.Adapter]:
    """An embedding, the head that shares its weight, and a linear that has the method."""
    model = nn.ModuleDict({"embed": nn.Embedding(11, 6), "head": nn.Linear(6, 11, bias=False)})
    model["head"].weight, model["beside"] = model["embed"].weight, nn.Linear(6, 6)
    return model, lf.attach(model, lf.LoRA(rank=2), ["beside"], tokens={"embed": ids})


def test_token_rows_are_served_with_those_that_are_new() -> None:
    model, adapter = with_tokens((3, 11, 12))
    move(adapter)
    weight, h = model["embed"].weight, torch.randn(4, 6)
    assert weight.shape == (13, 6)
    assert F.linear(h, weight).shape == (4, 13)
    assert torch.equal(weight[[3, 11, 12]], adapter.deltas["embed"].rows)
    assert torch.equal(weight[:3], model.state_dict()["embed.weight"][:3])


def test_rows_shared_with_the_embedding_get_their_gradient_through_the_head() -> None:
    model, adapter = with_tokens((3, 11))
    rows, h = adapter.deltas["embed"].rows, torch.randn(4, 6)
    Product.apply(h, model["head"].weight).sin().sum().backward()
    deep, rows.grad = rows.grad, None
    F.linear(h, model["head"].weight).sin().sum().backward()
    assert rows.grad.any()
    assert torch.allclose(deep, rows.grad, atol=1e-6)


def test_t5_folds_nothing_and_mamba_what_it_reads(monkeypatch) -> None:
    size = {"vocab_size": 90, "num_layers": 2, "dropout_rate": 0.0}
    t5 = T5ForConditionalGeneration(T5Config(**size, d_model=16, d_ff=32, d_kv=8, num_heads=2))
    size = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**size, state_size=4, time_step_rank=4))
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    folded: list[str] = []
    fold = FoldedRead.folded
    monkeypatch.setattr(FoldedRead, "folded", lambda r: folded.append(r.site[-7:]) or fold(r))
    for model, call, reads in (
        (t5, lambda: t5(input_ids=ids, decoder_input_ids=ids).logits, set()),
        (mamba, lambda: mamba(ids, use_cache=False).logits, {"dt_proj"}),
    ):
        bare = call()
        move(adapter := lf.attach(model, lf.LoRA(rank=3, dropout=0.0)))
        for training in (False, True):
            model.train(training)
            folded.clear()
            y = call()
            assert set(folded) == reads
            assert relative(y, bare) > 1e-2
            assert all(g is not None and g.any() for g in gradients(adapter, y))
        adapter.merge()
        assert relative(call(), y) < 1e-5


@pytest.mark.parametrize("kind", ["attention", "layer", "past"])
def test_compiles_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    model, x = past("lora", "linear") if kind == "past" else (of_torch(kind, True), X)
    move(adapter := lf.attach(model, METHODS["dora"], "all-linear"))
    call = (lambda m: m(x, x, x)[0]) if kind == "attention" else lambda m: m(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(call(compiled), call(model), atol=1e-6)
    graph, plain = (gradients(adapter, call(m)) for m in (compiled, model))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(graph, plain, strict=True))
    with lf.only(model):
        assert torch.allclose(call(compiled), call(model), atol=1e-6)


def test_folding_is_exact_under_autocast() -> None:
    root, x, adapter = laid()
    with torch.autocast("cpu", torch.bfloat16):
        y = root(x)
    adapter.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(root(x), y)


def test_small_changes_survive_in_bf16() -> None:
    torch.manual_seed(0)
    root = Past(nn.Linear(256, 512)).bfloat16()
    adapter, bare = lf.attach(root, METHODS["lora"], ["at"]), root.at.weight.double()
    move(adapter, 1e-4)
    with torch.no_grad():
        change = adapter.deltas["at"].delta().double()
        lost = (bare + change).bfloat16().double() - bare  # to the nearest
        realised = root.at.weight.double() - bare
    kept = [((found * change).sum() / change.square().sum()).item() for found in (realised, lost)]
    noise = ((realised - change).norm() / change.norm() / change.numel() ** 0.5).item()
    assert kept[0] == pytest.approx(1, abs=0.05 + 3 * noise)
    assert kept[1] < 0.5
    assert noise < 0.1


def laid(method: str = "lora") -> tuple[Past, Tensor, lf.Adapter]:
    """A module that somebody reads, under a method away from its start."""
    root, x = past(method, "linear")
    adapter = lf.attach(root, METHODS[method], ["at"])
    move(adapter)
    return root, x, adapter


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
    root, x, adapter = laid()
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
    root, x, adapter = laid()
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
    root, x, adapter = laid("dora")
    x.requires_grad_()
    again = gradients(adapter, checkpoint(root, x, use_reentrant=reentrant))
    assert all(map(torch.equal, again, gradients(adapter, root(x))))


@pytest.mark.filterwarnings("ignore")
def test_it_is_traced_and_exported() -> None:
    root, x, _ = laid()
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
    root, *_ = laid()
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
