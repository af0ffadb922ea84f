"""Modules whose weight or bias somebody reads past their forward: the law holds there too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

import lorafold as lf
from laws import METHODS, NOT_LAID, move
from lorafold.core.attach import attach_delta, selection_of
from lorafold.core.served_weights import WeightRead
from lorafold.layers import layer_class
from lorafold.methods.bottleneck import BottleneckDelta
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


def encoder(batch_first: bool, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).to(dtype)


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
TORCHS = {
    "attention": lambda batch_first, dtype: nn.MultiheadAttention(
        16, 2, batch_first=batch_first, dtype=dtype
    ),
    "no-bias": lambda batch_first, dtype: nn.MultiheadAttention(
        16, 2, bias=False, batch_first=batch_first, dtype=dtype
    ),
    "layer": lambda batch_first, dtype: encoder(batch_first, dtype).layers[0],
    "norm-first": lambda batch_first, dtype: encoder(
        batch_first, dtype, norm_first=True, activation="gelu"
    ).layers[1],
    "encoder": encoder,
}


def called(model: nn.Module, x: Tensor, padded: bool = True) -> Tensor:
    """The output at the tokens that are no padding: elsewhere torch's fast path has zeros, and its
    other one has numbers.
    """
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
    model = TORCHS[kind](batch_first, dtype).train(training).requires_grad_(False)
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
    assert "adapter 'it' can't be folded: BottleneckDelta has no form" in str(e.value)
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
    root, x = past("lora", "linear")
    adapter = lf.attach(root, METHODS["lora"], ["at"])
    move(adapter)
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
    fold = WeightRead.folded
    monkeypatch.setattr(WeightRead, "folded", lambda r: folded.append(r.site[-7:]) or fold(r))
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
    model, x = past("lora", "linear") if kind == "past" else (TORCHS[kind](True, None), X)
    move(adapter := lf.attach(model, METHODS["dora"], "all-linear"))
    call = (lambda m: m(x, x, x)[0]) if kind == "attention" else lambda m: m(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(call(compiled), call(model), atol=1e-6)
    graph, plain = (gradients(adapter, call(m)) for m in (compiled, model))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(graph, plain, strict=True))
    with lf.only(model):
        assert torch.allclose(call(compiled), call(model), atol=1e-6)


def test_folding_is_exact_under_autocast() -> None:
    root, x = past("lora", "linear")
    adapter = lf.attach(root, METHODS["lora"], ["at"])
    move(adapter)
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
