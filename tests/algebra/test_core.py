"""The core without a transformer: attachment, selection, and what an attached model stays."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.core.attach import adapted_modules, base_state
from lorafold.fold.plan import plan_fold
from lorafold.layers import LAYERS, layer_of
from noise import moved
from own_storage import PATH, Codes, CodesLayer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))


def shake(adapter: lf.Adapter, seed: int = 1) -> lf.Adapter:
    return moved(adapter, 0.3, seed)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))


def test_the_module_stays_what_it_was() -> None:
    model = net()
    keys, text = set(model.state_dict()), type(model[0]).__name__
    shake(lf.attach(model, lf.LoRA(rank=2)))
    assert set(base_state(model)) == keys
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]).__name__ == text
    assert not model.state_dict(keep_vars=True)["0.weight"].requires_grad
    result = model.load_state_dict(net().state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_a_twin_is_complete_and_independent(twin_of) -> None:
    model = net()
    shake(lf.attach(model, lf.LoRA(rank=2), name="a"))
    shake(lf.attach(model, lf.LoRA(rank=3), name="b"), 2)
    twin = twin_of(model.eval())
    assert torch.equal(twin(X), model(X))
    with lf.only(twin, "b"):
        assert not torch.equal(twin(X), model(X))
    assert torch.equal(twin(X), model(X))


def test_only_selects_and_the_bare_base_is_bit_for_bit() -> None:
    model = net().eval()
    bare = model(X)
    shake(lf.attach(model, lf.LoRA(rank=2), name="a"))
    a = model(X)
    shake(lf.attach(model, lf.LoRA(rank=2), name="b"), 2)
    both = model(X)
    with lf.only(model):
        assert torch.equal(model(X), bare)
        with lf.only(model, "a"):
            assert torch.equal(model(X), a)
        assert torch.equal(model(X), bare)
    assert torch.equal(model(X), both)
    with pytest.raises(lf.LorafoldError, match="attached adapters: a, b"):
        lf.only(model, "c")


def test_a_second_adapter_leaves_the_first_trainable_and_detaching_all_thaws_the_base() -> None:
    model = net()
    a = lf.attach(model, lf.LoRA(rank=2), name="a")
    b = lf.attach(model, lf.LoRA(rank=2), name="b")
    assert all(p.requires_grad for p in a.parameters())
    a.detach()
    assert [name for _, m in adapted_modules(model) for name in m.deltas] == ["b", "b"]
    b.detach()
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert set(model[0].__dict__) == set(nn.Linear(2, 2).__dict__)


def test_parts_adapted_on_their_own_come_under_one_selection() -> None:
    inner = net()
    outer = nn.Sequential(inner, nn.Linear(5, 3)).eval()
    base = outer(X)
    shake(lf.attach(inner, lf.LoRA(rank=2), name="a"))
    shake(lf.attach(outer, lf.LoRA(rank=2), name="b"))
    with lf.only(outer):
        assert torch.equal(outer(X), base)
    with lf.only(inner, "a"):
        only_a = outer(X)
    with lf.only(outer, "a"):
        assert torch.equal(outer(X), only_a)


def test_targets() -> None:
    block = nn.ModuleDict({"attn_q": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(4, 9)})
    q, fc = "layers.0.attn_q", "layers.0.fc"
    every = {None: (q, fc), "attention": (q,), "mlp": (fc,), r".*\.\d\.(fc|attn_q)": (q, fc)}
    for name, (targets, paths) in zip("abcd", every.items(), strict=True):
        assert lf.attach(model, lf.LoRA(), targets, name).matches.paths == paths
    named = lf.attach(model, lf.LoRA(), ["fc", "head"], "names").matches.by_pattern
    assert named == {"fc": (fc,), "head": ("head",)}
    told = r"'fx' matches no module; similar names: fc.*'haed' matches no module; .*: head"
    with pytest.raises(lf.LorafoldError, match=told):
        lf.attach(model, lf.LoRA(), ["fc", "fx", "haed"], "typo")
    with pytest.raises(lf.LorafoldError, match="in use"):
        lf.attach(model, lf.LoRA(), name="a")
    with pytest.raises(lf.LorafoldError, match=r"layers: unsupported by LoRA"):
        lf.attach(model, lf.LoRA(), ["layers"], "list")
    assert "typo" not in str([list(m.deltas) for _, m in adapted_modules(model)])


def test_overrides_by_pattern_and_the_printed_counts() -> None:
    model = net()
    adapter = lf.attach(
        model, lf.LoRA(rank=4, alpha=8, rank_pattern={"2": 2}, alpha_pattern={"2": 6}), ["0", "2"]
    )
    assert [d.A.shape[0] for d in adapter.deltas.values()] == [4, 2]
    assert [d.scale for d in adapter.deltas.values()] == [2.0, 3.0]
    count = 4 * (6 + 8) + 2 * (8 + 5)
    base = 6 * 8 + 8 + 8 * 5
    assert f"{count} parameters, {count / base:.2%} of the model's {base}" in repr(adapter)
    assert "  0: 1 modules\n  2: 1 modules\n" in repr(adapter)


def test_an_adapter_over_another_is_not_merged_first() -> None:
    model = net().eval()
    a, b = (shake(lf.attach(model, lf.LoRA(rank=2), name=n)) for n in "ab")
    y = model(X)
    assert plan_fold(model, ["a", "b"]).problems == ()
    assert all("'a' is attached" in why for _, why in plan_fold(model, ["b"]).problems)
    with pytest.raises(lf.NotMergeable, match="adapter 'a' is attached below; merge that first"):
        b.merge()
    assert set(a.deltas) == set(b.deltas)
    assert torch.equal(model(X), y)
    a.merge()
    b.merge()
    assert torch.allclose(model(X), y, atol=1e-6)


class InFp32(CodesLayer):
    dtype = torch.float32


@pytest.mark.parametrize("spec", [lf.LoRA(rank=2), lf.DoRA()], ids=["lora", "dora"])
def test_a_module_may_hold_all_of_its_matrix_in_buffers(spec, monkeypatch) -> None:
    monkeypatch.setitem(LAYERS, PATH, InFp32)
    model = nn.Sequential(Codes(torch.randn(8, 6))).eval()
    assert layer_of(model[0]).device == torch.device("cpu")
    adapter = shake(lf.attach(model, spec, ["0"]))
    for _ in range(2):
        with torch.no_grad():
            w, _ = adapter.deltas["0"].fold(model[0].codes * model[0].scale, None)
            assert torch.allclose(model(X), X @ w.t(), atol=1e-5)
            model[0].codes.mul_(-1).add_(3)  # a change of the codes is seen
    with pytest.raises(lf.LorafoldError, match="ReLU: found no parameter and no buffer, expected"):
        _ = layer_of(nn.ReLU()).device
