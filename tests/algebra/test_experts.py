"""Experts as a storage: the laws on mixtures of every form, against torch and bitsandbytes."""

import copy
import pickle
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import laws
import lorafold as lf
from lorafold.core.active_adapters import RandomSource, seeded_dropout, token_names
from lorafold.core.anatomy import Anatomy, of_attention
from lorafold.core.attach import base_state, selection_of
from lorafold.core.expert_matrices import Matrices, module_at
from lorafold.core.spec import Spec
from lorafold.core.targets import all_linear, block_linears
from lorafold.layers import is_linear, layer_of, parameter_count
from lorafold.layers.bitsandbytes import import_bitsandbytes
from lorafold.models.quantize_on_load import set_model_dtype
from lorafold.ops import grouped as ops
from lorafold.ops.grouped import (
    FrozenMatrices,
    Groups,
    frozen_product,
    low_rank_product,
    sort_into_groups,
)
from lorafold.runtime.assumed_device import DeviceKind, assume_device
from lorafold.training_step.fused_modules import fused
from mixtures import CONFIGS, FORMS, MLA, SHAPE, mixture
from noise import moved

IDS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
H100, A100 = DeviceKind("cuda", (9, 0)), DeviceKind("cuda", (8, 0))
AS_LAID = ("lora", "rslora", "pissa", "olora", "dora", "dora-loha", "dora-vera", "adalora", "vera",
           "loha", "fastfood")  # fmt: skip
METHODS: dict[str, Spec] = {name: laws.METHODS[name] for name in AS_LAID} | {
    "lokr": lf.LoKr(rank=2), "ia3": lf.IA3(), "lt-sft": lf.LTSFT(density=0.1)
}  # fmt: skip
PAIRS = [
    *product(METHODS, ("mixtral", "gpt-oss")),
    *product(("lora", "dora"), ("qwen3-moe", "qwen2-moe", "deepseek-v3")),
    *product(("lora", "dora", "vera", "ia3"), FORMS),
]
CASES = [pytest.param(method, family, id=f"{method}-{family}") for method, family in PAIRS]


def move(adapter: lf.Adapter) -> lf.Adapter:
    return moved(adapter, 0.05)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def experts_of(model: torch.nn.Module) -> list[str]:
    return [path for path, m in Anatomy.of(model).modules if isinstance(m, Matrices)]


@pytest.mark.few(16)
@pytest.mark.parametrize(("method", "family"), CASES)
def test_the_laws(method: str, family: str) -> None:
    model = mixture(family)
    bare, names = logits(model), set(model.state_dict())
    adapter = lf.attach(model, METHODS[method], experts_of(model))
    assert {type(module_at(model, p)).__name__ for p in adapter.matches.paths} == {"Matrices"}
    assert torch.allclose(logits(model), bare, rtol=1e-5, atol=1e-6)
    move(adapter)
    y = logits(model)
    assert (y - bare).norm() > 1e-3 * bare.norm()
    with lf.only(model):
        assert torch.equal(logits(model), bare)
    assert set(base_state(model)) == names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), y)
    adapter.merge()
    assert (logits(model) - y).norm() <= 1e-5 * y.norm()
    assert not [m for m in model.modules() if isinstance(m, Matrices)]


@pytest.mark.few(17)
@pytest.mark.parametrize(("method", "family"), CASES)
def test_gradients_are_those_of_the_folded_weight(method: str, family: str) -> None:
    """Grouped products against autograd through `fold` and the model's own forward, in fp64."""
    model = mixture(family, torch.float64)
    model.config._experts_implementation = "eager"  # the only one of transformers in fp64
    adapter = move(lf.attach(model, METHODS[method], experts_of(model)))
    for delta in adapter.deltas.values():
        delta.double()
    model(IDS).logits.sin().sum().backward()
    ours = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    assert all(g.any() for g in ours.values())
    for p in adapter.parameters():
        p.grad = None
    folded = {}
    for path, delta in adapter.deltas.items():
        layer = layer_of(module_at(model, path))
        w, _ = delta.fold(*layer.dense())
        folded[path] = layer.encode(w, None)["weight"]
    with lf.only(model):
        functional_call(model, folded, (IDS,)).logits.sin().sum().backward()
    for name, p in adapter.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("family", CONFIGS | FORMS)
def test_all_linear_includes_experts_and_leaves_routers_alone(family: str) -> None:
    model = mixture(family)
    adapter = lf.attach(model, lf.LoRA(rank=2))
    sites = set(adapter.matches.paths)
    every = {path for path, m in Anatomy.of(model).modules if isinstance(m, Matrices)}
    assert every
    assert every <= sites
    assert Anatomy.of(model).routers
    assert not Anatomy.of(model).routers & sites
    assert family == "gpt-oss" or "experts" not in adapter.unreached.blocks  # its biases
    attention_only = lf.attach(mixture(family), lf.LoRA(rank=2), "attention").matches.paths
    assert {path for path in every & set(attention_only) if not of_attention(path)} == set()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4", "longcat", "dbrx"])
def test_dropout_is_the_same_when_a_block_is_computed_again(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = mixture(family)
        adapter = move(lf.attach(model, lf.LoRA(rank=3, dropout=0.3)))
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        torch.manual_seed(1)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4", "longcat", "dbrx"])
def test_a_row_has_its_own_dropout_among_others(family: str) -> None:
    model = mixture(family)
    move(lf.attach(model, lf.LoRA(rank=3, dropout=0.3)))
    model.train()
    names = token_names(torch.arange(len(IDS))[:, None], torch.arange(IDS.shape[1]))

    def output(rows: slice) -> torch.Tensor:
        with torch.no_grad(), seeded_dropout(selection_of(model), RandomSource(5, names[rows])):
            return model(IDS[rows], use_cache=False).logits

    whole, before = output(slice(None)), torch.get_rng_state()
    for i in range(len(IDS)):
        torch.testing.assert_close(output(slice(i, i + 1)), whole[i : i + 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_lies_over_another() -> None:
    model = mixture("mixtral")
    first = move(lf.attach(model, lf.LoRA(rank=2, dropout=0.0), name="first"))
    second = move(lf.attach(model, lf.DoRA(lf.LoRA(rank=2, dropout=0.0)), name="second"))
    y = logits(model)
    with pytest.raises(lf.NotMergeable, match="'first' is attached below"):
        second.merge()
    first.merge()
    second.merge()
    assert (logits(model) - y).norm() <= 1e-5 * y.norm()


def groups_of(number: int, rows: int) -> Groups:
    of = torch.randint(0, number - 1, (rows,), generator=torch.Generator().manual_seed(3))
    return sort_into_groups(of[of != 1], number)[0]  # the second and the last have no rows


@pytest.mark.parametrize("place", ["cpu", "h100"])
@pytest.mark.parametrize(("rows", "number"), [(3, 8), (40, 5), (400, 4), (1000, 3)])
def test_groups_are_sorted_and_filled_up(rows: int, number: int, place: str) -> None:
    of = torch.randint(0, number - 1, (rows,), generator=torch.Generator().manual_seed(4))
    with assume_device(H100) if place == "h100" else nullcontext():
        groups, taken, places = sort_into_groups(of, number)
    step = groups.step
    assert step == 2 ** max(0, (rows // (4 * number)).bit_length() - 1)
    filled = [-(-n // step) * step for n in torch.bincount(of, minlength=number).tolist()]
    assert list(groups.sizes[:-1]) == filled[:-1]
    assert torch.equal(groups.tiles.repeat_interleave(step), groups.of_row)
    assert len(taken) == len(groups.of_row) == sum(groups.sizes)
    assert torch.equal(taken[places], torch.arange(rows))
    assert torch.equal(groups.of_row[places], of)
    assert torch.equal(torch.bincount(groups.of_row, minlength=number), torch.tensor(groups.sizes))
    if place == "cpu":
        assert 0 <= groups.sizes[-1] - filled[-1] < step * max(1, number // 4)
        assert torch.equal(groups.of_row, groups.of_row.sort().values)
        assert [at for e, at in groups.spans()][-1].stop == sum(groups.sizes)
        return
    assert groups.known is None  # the sizes stay on the device
    assert sum(groups.sizes) == (-(-rows // step) + number) * step
    for other in (A100, DeviceKind("cuda", (12, 0))):  # for which torch has no such kernel
        with assume_device(other):
            assert sort_into_groups(of, number)[0].ends is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_grouped_products_are_those_of_plain_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    groups = groups_of(5, 40)
    n = len(groups.of_row)
    x, onto = torch.randn(n, 6, dtype=dtype), torch.randn(n, 7, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    w, down, up = (torch.randn(5, *s, dtype=wide) for s in ((7, 6), (2, 6), (7, 2)))
    frozen = FrozenMatrices(lambda e, d: w[e].to(d), w.to, groups)

    def plain(w: Tensor) -> Tensor:
        return torch.einsum("soi,si->so", w.to(dtype)[groups.of_row], x)

    error = 1e-12 if dtype is torch.float64 else 2e-2
    for y, reference in (
        (ops.product(x, w, groups), plain(w)),
        (frozen_product(x, onto, frozen, 7), plain(w) + onto),
        (low_rank_product(x, frozen, down, up, None, 1.0), plain(w + up @ down)),
    ):
        assert y.dtype is dtype
        assert (y - reference).norm() <= error * reference.norm()


def test_gradients_of_grouped_products_are_right() -> None:
    torch.manual_seed(0)
    groups = groups_of(4, 12)
    n = len(groups.of_row)
    sizes = (n, 3), (4, 5, 3), (4, 2, 3), (4, 5, 2), (n, 5)
    x, m, down, up, onto = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in sizes)
    w = m.detach()
    frozen = FrozenMatrices(lambda e, dtype: w[e].to(dtype), w.to, groups)
    check = torch.autograd.gradcheck
    assert check(lambda x, m: ops.product(x, m, groups), (x, m))
    assert check(lambda x, o: frozen_product(x, o, frozen, 5), (x, onto))
    assert check(lambda x, a, b: low_rank_product(x, frozen, a, b, None, 1.0), (x, down, up))


def test_products_of_all_groups_at_once_are_as_exact() -> None:
    torch.manual_seed(0)
    of, sides = torch.randint(0, 4, (60,)), ((16, 24), (8, 24), (16, 8))
    w, down, up = (torch.randn(5, *s) * s[1] ** -0.5 for s in sides)
    w = w.bfloat16()
    with assume_device(H100):
        together = sort_into_groups(of, 5)
    found = {}
    for name, (groups, taken, places), dtype in (
        ("exact", together, torch.float64), ("at once", together, torch.bfloat16),
        ("one by one", sort_into_groups(of, 5), torch.bfloat16),
    ):  # fmt: skip
        frozen = FrozenMatrices(lambda e, d: w[e].to(d), w.to, groups)
        rows = torch.randn(60, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
        x = rows.to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        a, b = (t.to(wide).requires_grad_() for t in (down, up))
        assert frozen.at_once(x, 16) == (name == "at once")
        y = low_rank_product(x[taken], frozen, a, b, None, 0.5)[places]
        z = frozen_product(x[taken], y.new_ones(len(taken), 16), frozen, 16)[places]
        (y.sin() + z.cos()).sum().backward()
        found[name] = [t.double() for t in (y, z, x.grad, a.grad, b.grad)]  # type: ignore[union-attr]
    for exact, at_once, one_by_one in zip(*found.values(), strict=True):
        allowed = 2 * (one_by_one - exact).norm() + 1e-3 * exact.norm()
        assert (at_once - exact).norm() <= allowed


def as_stored(matrices: Matrices, w: Tensor) -> Tensor:
    """All matrices (E, out, in) as the plain parameter has them."""
    stored = w.mT if matrices.stored.transposed else w
    return stored.flatten(0, 1) if matrices.stored.flat else stored


def saved(family: str, folder: Path) -> Path:
    mixture(family, torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.few(8)
@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS | FORMS)
def test_quantized_experts(family: str, storage: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = lf.load_model(folder, storage=storage)
    assert parameter_count(model) == parameter_count(plain)
    own = {path: m for path, m in Anatomy.of(model).modules if isinstance(m, Matrices)}
    functional = import_bitsandbytes().functional
    for path, matrices in own.items():
        stored = plain.get_parameter(path)
        layer = layer_of(matrices)
        parameter = matrices.owner._parameters[matrices.name]
        if storage == "nf4":
            bytes_ = parameter.nbytes + parameter.quant_state.absmax.nbytes
            assert bytes_ <= 0.27 * 2 * stored.numel()
            whole = functional.dequantize_4bit(parameter.data, parameter.quant_state)
        else:
            codes, scales, _ = functional.int8_vectorwise_quant(stored.flatten(0, -2).half())
            whole = (codes * (scales / 127)[:, None]).bfloat16()
        dense = layer.dense()[0].bfloat16()
        assert torch.equal(as_stored(matrices, dense), whole.view(stored.shape))
    with torch.no_grad():
        for path, matrices in own.items():
            plain.get_parameter(path).copy_(as_stored(matrices, layer_of(matrices).dense()[0]))
        for path, m in Anatomy.of(model).modules:
            if type(m).__module__.startswith("bitsandbytes."):
                plain.get_parameter(f"{path}.weight").copy_(layer_of(m).dense()[0])
    set_model_dtype(model, torch.float32)
    if family in CONFIGS:  # without an adapter
        path = next(iter(own)).rpartition(".")[0]
        x, index = torch.randn(7, 64), torch.randint(0, 4, (7, 2))
        mixed = [m.get_submodule(path)(x, index, torch.full((7, 2), 0.5)) for m in (model, plain)]
        assert (mixed[0] - mixed[1]).norm() <= 1e-5 * mixed[1].norm()
    adapter = lf.attach(model, lf.DoRA(lf.LoRA(rank=3, dropout=0.0)))
    expected = logits(plain)
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()
    move(adapter)
    y = logits(model)
    adapter.merge()
    assert (logits(model) - y).norm() <= 1e-5 * y.norm()
    assert model.get_parameter(next(iter(own))).is_floating_point()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "llama4", "dbrx"])
def test_estimate_of_a_mixture_is_what_a_step_takes(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model")
    for base in ("bf16", "nf4"):
        recipe = lf.Recipe(storage=base, rank=4)
        found = lf.estimate(folder, "lora", batch=2, max_length=64, recipe=recipe, measure=True)
        assert found.measured == pytest.approx(found.total, rel=0.05)


@pytest.mark.parametrize(("family", "router"), [("mixtral", "gate"), ("gpt-oss", "router")])
def test_a_target_that_is_a_router_is_refused(family: str, router: str) -> None:
    model = mixture(family)
    expected = r"mlp\.\w+: unsupported by LoRA: a router.*such as experts.gate_up_proj"
    with pytest.raises(lf.LorafoldError, match=expected):
        lf.attach(model, lf.LoRA(rank=2), [router])
    assert not [m for m in model.modules() if hasattr(m, "deltas")]


def test_a_router_trains_if_it_is_asked_for() -> None:
    model = mixture("mixtral")
    adapter = lf.attach(model, lf.LoRA(rank=2), EXPERTS, modules_to_save=["mlp.gate"])
    move(adapter)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    y = logits(model)
    adapter.merge()
    assert (logits(model) - y).norm() <= 1e-5 * y.norm()


def test_every_bias_trains_but_those_of_experts_and_routers() -> None:
    model = mixture("gpt-oss")
    adapter = lf.attach(model, lf.LoRA(rank=2), "attention", bias="all")
    move(adapter)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert not [path for path in adapter.sites if "mlp" in path]


def test_a_mixture_trains_on_the_fast_path_and_says_what_it_adapts() -> None:
    model = mixture("mixtral")
    adapter = lf.attach(model, lf.LoRA(rank=2))
    assert "all-linear: 8 modules and 4 expert parameters (16 matrices)" in repr(adapter)
    with fused(model) as found:
        assert str(found) == "fast path: 2 of 2 blocks"
        model(IDS, labels=IDS).loss.backward()
    fast = [p.grad.clone() for p in adapter.parameters()]
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for a, p in zip(fast, adapter.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.few(13)
@pytest.mark.parametrize("method", [n for n in lf.methods.METHODS if n != "linear-probe"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_every_method_trains_with_its_own_targets(family: str, method: str) -> None:
    model = mixture(family)
    adapter = lf.attach(model, lf.methods.METHODS[method]())
    model.train()
    model(IDS, labels=IDS).loss.backward()
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def adapted(name: str) -> tuple[Any, lf.Adapter]:
    model = mixture(name)
    return model, move(lf.attach(model, lf.LoRA(rank=2, dropout=0.0)))


def test_only_the_chosen_experts_of_a_token_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's own forward multiplies each of the 24 tokens by all 4 experts, here by 2."""
    seen: list[int] = []
    plain = sort_into_groups
    monkeypatch.setattr(
        "lorafold.layers.experts.sort_into_groups",
        lambda of, number: seen.append(len(of)) or plain(of, number),
    )
    model, _ = adapted("llama4")
    with torch.no_grad():
        model(IDS)
    assert seen == [2 * IDS.numel()] * 2


@pytest.mark.parametrize(("name", "child"), [("llama4", "feed_forward"), ("dbrx", "ffn.experts")])
def test_experts_apart_from_what_routes_to_them_are_refused(name: str, child: str) -> None:
    model = mixture(name)
    holder = next(
        m.owner
        for path, m in Anatomy.of(model).modules
        if isinstance(m, Matrices) and f".{child}." in path
    )
    expected = f"found a lone {type(holder).__name__}, expected one in the module that"
    with pytest.raises(lf.LorafoldError, match=expected):
        lf.attach(holder, lf.LoRA(rank=2), list(dict(holder.named_parameters())))
    assert not any(isinstance(m, Matrices) for m in holder.modules())


@pytest.mark.parametrize("name", FORMS)
def test_the_model_has_its_own_forward_again_when_an_adapter_leaves(name: str) -> None:
    model = mixture(name)
    before = [type(m) for m in model.modules()]
    adapter = lf.attach(model, lf.LoRA(rank=2))
    assert [type(m) for m in model.modules()] != before
    stored = model.state_dict()
    other = mixture(name)
    lf.attach(other, lf.LoRA(rank=2))
    other.load_state_dict(stored, strict=True)
    adapter.detach()
    assert [type(m) for m in model.modules()] == before


OTHERS = {
    "llama4": ("feed_forward.router", 0.6),
    "jetmoe": ("mlp.router.layer", 0.8),
    "dbrx": ("ffn.router.layer", 0.8),
}


def drawn(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    return model


def without_gradient(model: Any, adapter: lf.Adapter) -> list[str]:
    move(adapter)
    model(input_ids=IDS).logits.sin().sum().backward()
    token_names = adapter.named_parameters()
    return [name for name, p in token_names if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name", OTHERS)
def test_experts_without_a_row_are_frozen_and_called_experts(name: str, monkeypatch) -> None:
    """DBRX's were `other`, and the routers of two of them were adapted."""
    monkeypatch.setattr("lorafold.core.expert_matrices.FORMS", {})
    router, least = OTHERS[name]
    model = mixture(name)
    assert any(path.endswith(router) for path in Anatomy.of(model).routers)
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0))
    assert not any(router in path for path in adapter.deltas)
    frozen = adapter.unreached.as_json()["blocks"]
    assert frozen["experts"] > least
    assert frozen.get("other", 0) < 0.002
    assert 0 < frozen["router"] < 0.01
    assert without_gradient(model, adapter) == []


def test_an_indexer_gets_no_adapter() -> None:
    """It had three, of which none ever got a gradient."""
    config = tf.DeepseekV32Config(
        **SHAPE | {"num_key_value_heads": 4} | MLA | {"qk_rope_head_dim": 8},
        moe_intermediate_size=32, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, index_n_heads=2, index_head_dim=16, index_topk=4,
    )  # fmt: skip
    model = drawn(config)
    assert len(Anatomy.of(model).indexers) == 2
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0))
    assert not any(".indexer." in path for path in adapter.deltas)
    assert 0.01 < adapter.unreached.as_json()["blocks"]["indexers"] < 0.1
    assert without_gradient(model, adapter) == []
    # a base is quantized as before
    others = set(block_linears(model, is_linear)) - set(all_linear(model, is_linear))
    assert {path.rpartition(".")[2] for path in others} == {"wq_b", "wk", "weights_proj"}
    adapter.detach()
    lf.attach(model, lf.LoRA(rank=2), ["wq_b"])  # by name, as an earlier adapter has it
