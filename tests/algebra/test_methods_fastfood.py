"""Fastfood and VeRA: one vector, or one pair of projections, for all matrices."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.core.delta import SETTINGS
from lorafold.errors import LorafoldError
from lorafold.methods import make_spec
from lorafold.ops.walsh import hadamard_factors, walsh
from noise import moved


def hadamard(n: int) -> torch.Tensor:
    return (
        torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / n**0.5
    )


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128])
def test_the_transform_is_its_definition_and_its_own_inverse(n: int) -> None:
    x = torch.randn(3, 2, n)
    assert torch.allclose(walsh(x, *hadamard_factors(n)), x @ hadamard(n), atol=1e-5)
    assert torch.allclose(walsh(walsh(x, *hadamard_factors(n)), *hadamard_factors(n)), x, atol=1e-5)


def adapted(dimension: int) -> tuple[nn.Sequential, lf.Adapter]:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    adapter = lf.attach(root, make_spec("fastfood", dimension=dimension), ["0", "2"])
    return root, moved(adapter)


def test_the_rate_of_a_head_is_any_number_above_0() -> None:
    assert make_spec("fastfood", head_lr=1).head_lr == 1
    for wrong in (0, -1.0, "1", None):
        with pytest.raises(LorafoldError, match=r"head_lr: found .*, expected a number above 0"):
            make_spec("fastfood", head_lr=wrong)


@pytest.mark.few(2)
@pytest.mark.parametrize("dimension", [5, 64, 1000])
def test_each_update_is_the_projection_of_one_vector(dimension: int) -> None:
    root, adapter = adapted(dimension)
    first = root[0].deltas["default"]
    signs, order, v = first.subspace.signs, first.subspace.order, first.subspace.vector
    n = len(signs)
    assert sum(p.numel() for p in adapter.parameters()) == dimension + 2
    for i in (0, 2):
        delta = root[i].deltas["default"]
        filled = torch.cat([v, torch.zeros(n - dimension)])
        blocks = [
            hadamard(n) @ (g.float() * (hadamard(n) @ (signs * filled))[order])
            for g in delta.gaussians
        ]
        expected = (
            delta.scale
            * torch.cat(blocks)[: delta.delta().numel()]
            / (len(blocks) * dimension) ** 0.5
        )
        assert torch.allclose(delta.delta().flatten(), expected, atol=1e-6)


def test_it_keeps_lengths_and_angles_but_for_chance() -> None:
    root = nn.Sequential(nn.Linear(128, 128))
    adapter = lf.attach(root, make_spec("fastfood", dimension=64), ["0"])
    delta = root[0].deltas["default"]
    images = []
    for i in range(64):
        with torch.no_grad():
            delta.subspace.vector.copy_(torch.eye(64)[i])
            images.append(delta.delta().flatten() * 8)
    gram = torch.stack(images) @ torch.stack(images).t()
    assert (gram.diagonal() - 1).abs().max() < 0.1
    assert (gram - gram.diagonal().diag()).abs().max() < 0.1
    assert len(list(adapter.parameters())) == 2


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_a_vector_of_its_own_in_all_matrices(change) -> None:
    root, _ = adapted(40)
    twin, x = change(root), torch.randn(3, 24)
    assert torch.allclose(twin(x), root(x))
    before = root(x)
    with torch.no_grad():
        twin[0].deltas["default"].subspace.vector.add_(1)
    assert torch.equal(root(x), before)
    assert not torch.allclose(twin[2].deltas["default"].delta(), root[2].deltas["default"].delta())


def test_only_the_vector_and_the_scales_are_stored(tiny_model, tmp_path) -> None:
    from safetensors.torch import load_file

    model, x = tiny_model("llama"), torch.arange(5, 25)[None]
    adapter = lf.attach(model, make_spec("fastfood", dimension=100, seed=3))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    path = adapter.save(tmp_path / "a")
    stored = load_file(path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == 100 + len(adapter.sites)
    again = tiny_model("llama")
    lf.load(again, path)
    assert torch.allclose(again(x).logits, model(x).logits)


def test_a_dimension_below_one_is_refused() -> None:
    with pytest.raises(LorafoldError, match="dimension: found 0"):
        make_spec("fastfood", dimension=0)


def with_vera() -> tuple[nn.Sequential, lf.Adapter]:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    adapter = lf.attach(root, lf.VeRA(rank=8), ["0", "2"])
    return root, moved(adapter)


def projections(root: nn.Sequential) -> set[int]:
    return {id(root[i].deltas["default"].projections) for i in (0, 2)}


CHANGES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "double": lambda m: copy.deepcopy(m).double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_projections_stay_shared_and_are_no_parameters(change: str) -> None:
    root, adapter = with_vera()
    twin = CHANGES[change](root)
    x = torch.randn(3, 24)
    assert len(projections(twin)) == 1
    assert projections(twin) != projections(root)
    assert torch.allclose(twin(x.to(next(twin.parameters()).dtype)).float(), root(x), atol=1e-6)
    assert {n.rsplit(".", 1)[-1] for n, _ in adapter.named_parameters()} == {"d", "b"}
    assert {k.rsplit(".", 1)[-1] for k in adapter.state_dict()} == {"d", "b", SETTINGS}
    shared = root[0].deltas["default"].projections
    assert (tuple(shared.A.shape), tuple(shared.B.shape)) == ((8, 32), (32, 8))
