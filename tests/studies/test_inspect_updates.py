"""An update's singular parts and their figures, against dense SVDs and closed forms."""

import pytest
import torch

import lorafold as lf
from laws import move
from lorafold.inspecting.inspect import inspect
from lorafold.inspecting.spectra import (
    advice,
    against_base,
    effective_rank,
    entropy_rank,
    phi,
    pooled,
    stable_rank,
)  # fmt: skip
from lorafold.inspecting.subspaces import compared
from lorafold.inspecting.updates import Svd, of_dense, of_factors, sites
from lorafold.layers import layer_of
from lorafold.methods import make_spec
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base
from update_cases import orthonormal, planted

RANKED = ["lora", "rslora", "pissa", "olora", "vera", "adalora"]
DENSE = ["loha", "lokr", "dora", "fish", "ia3"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", RANKED + DENSE)
def test_the_parts_are_those_of_the_dense_update(method, kind, tiny_model):
    model = tiny_model(kind)
    options = {"rank": 4} if method in (*RANKED, "loha", "lokr", "dora") else {}
    adapter = lf.attach(model, make_spec(method, **options))
    move(adapter)
    for site in sites(adapter):
        w = layer_of(model.get_submodule(site.path)).dense()[0].detach()
        ((name, svd),) = site.parts()
        assert name == site.path
        dense = (site.delta.fold(w.double(), None)[0] - w.double()).detach()
        assert (site.rank is not None) == (method in RANKED)
        assert (svd.dense() - dense).norm() < 1e-5 * dense.norm()
        expected = torch.linalg.svdvals(dense)[: len(svd.s)]
        assert torch.allclose(svd.s.double(), expected, rtol=1e-3, atol=1e-5 * float(expected[0]))
        assert torch.allclose(svd.u.t() @ svd.u, torch.eye(len(svd.s)), atol=1e-4)
        assert torch.allclose(svd.v.t() @ svd.v, torch.eye(len(svd.s)), atol=1e-4)


def test_factors_are_never_multiplied_out():
    n = 400_000  # the update itself would take 640 GB
    up, down = torch.randn(n, 3), torch.randn(3, n)
    svd = of_factors(up, down)
    # in fp32 some processors' sums of so many are off by 2e-4
    up, down = up.double(), down.double()
    gram = torch.linalg.eigvals((up.t() @ up) @ (down @ down.t())).real.sort(descending=True).values
    assert torch.allclose(svd.s.double().square(), gram, rtol=1e-6)


def test_small_singular_values_keep_their_digits():
    u, v = orthonormal(50, 4), orthonormal(40, 4, 1)
    s = torch.tensor([1.0, 1e-3, 1e-6, 1e-9], dtype=torch.float64)
    assert torch.allclose(of_factors(u * s, v.t()).s.double(), s, rtol=1e-6, atol=0)


def test_rank_beyond_the_matrix_and_an_update_of_nothing():
    assert len(of_factors(torch.randn(5, 9), torch.randn(9, 7)).s) == 5
    assert len(of_factors(torch.zeros(5, 2), torch.randn(2, 7)).s) == 0
    assert len(of_dense(torch.zeros(5, 7)).s) == 0
    nothing = of_factors(torch.zeros(5, 2), torch.randn(2, 7))
    assert effective_rank(nothing.s, 0.95) == 0
    assert against_base(nothing, torch.randn(5, 7)).amplification is None
    assert advice(2, pooled([nothing.s])) == "the update is zero: training changed nothing"


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equal_values_have_every_rank_alike(k):
    s = torch.full((k,), 0.3)
    assert stable_rank(s) == pytest.approx(k)
    assert entropy_rank(s) == pytest.approx(k)
    assert [effective_rank(s, share) for share in (0.9, 0.95, 0.99, 1.0)] == [k] * 4


def test_the_entropy_rank_is_of_the_singular_values_shares_of_their_sum():
    """Roy and Vetterli 2007, definition 1: of (3, 1) that is exp(H(3/4, 1/4)), 4 / 3^(3/4)."""
    assert entropy_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)


def test_effective_rank_is_the_least_that_holds_the_share():
    s = 0.7 ** torch.arange(12, dtype=torch.float64)
    for share in (0.5, 0.9, 0.95, 0.99):
        k = effective_rank(s, share)
        whole = float(s.square().sum())
        assert float(s[:k].square().sum()) >= share * whole > float(s[: k - 1].square().sum())
        assert effective_rank(100 * s, share) == k


def test_advice_states_what_resizing_loses():
    s = torch.tensor([3.0, 2.0, 1.5, 1.2, 1.0, 0.9] + [0.4] * 10)
    found = pooled([s])
    squares = s.double().square()
    assert found.rank_95 == effective_rank(s, 0.95)
    lost = float(squares[int(found.advised_rank) :].sum() / squares.sum())
    assert found.advised_loss == pytest.approx(lost)
    assert advice(16, found) == (
        f"rank {found.rank_95} holds 95% of the energy, and the adapter has rank 16: resizing it to"
        f" rank {found.advised_rank} loses {found.advised_loss:.1%} of the energy"
    )
    assert "use a higher rank" in advice(16, pooled([torch.ones(16)]))
    kept = "rank 5 holds 95% of the energy, and the adapter has rank 8: keep this rank"
    assert advice(8, pooled([torch.tensor([1.0] * 5 + [0.1] * 3)])) == kept

def test_pooled_loss_weighs_sites_by_their_energy():
    large, small = torch.tensor([100.0]), torch.tensor([0.1] * 40)
    assert pooled([large, small]).rank_95 == 1
    assert pooled([small]).rank_95 == 38


def test_phi_by_brute_force():
    a, b = orthonormal(30, 5), orthonormal(30, 7, 1)
    grid = phi(a, b)
    for i in range(1, 6):
        for j in range(1, 8):
            first, second = a[:, :i] @ a[:, :i].t(), b[:, :j] @ b[:, :j].t()  # projectors
            expected = float((first @ second).trace()) / min(i, j)
            assert float(grid[i - 1, j - 1]) == pytest.approx(expected, abs=1e-12)


def test_similarity_of_two_updates_is_that_of_the_dense_ones():
    a, b = planted(20, 30, [3.0, 1.0, 0.5]), planted(20, 30, [2.0, 1.0], seed=7)
    both = Svd(torch.cat([a.u, b.u], 1), torch.cat([a.s, b.s]), torch.cat([a.v, b.v], 1))
    mixed = of_factors(both.u * both.s, both.v.t())  # overlaps with either
    for x, y in ((a, b), (a, mixed), (a, a)):
        expected = float((x.dense() * y.dense()).sum() / (x.dense().norm() * y.dense().norm()))
        found = compared("b", {"m": x}, {"m": y}).sites["m"].cosine
        assert found == pytest.approx(expected, abs=1e-5)


def test_amplification_of_a_base_s_own_direction():
    base = planted(24, 16, [5.0, 3.0, 2.0, 0.5])
    w = base.dense()
    for i in range(4):
        update = Svd(base.u[:, i : i + 1], torch.tensor([0.7]), base.v[:, i : i + 1])
        found = against_base(update, w)
        s, whole = float(base.s[i]), float(base.s.square().sum())
        assert found.amplification == pytest.approx(0.7 / s, rel=1e-4)
        assert found.projection == pytest.approx(s, rel=1e-4)
        assert found.relative_norm == pytest.approx(0.7 / whole**0.5, rel=1e-4)
        assert found.strength_read == pytest.approx(s**2 * 16 / whole, rel=1e-4)
        assert found.strength_written == pytest.approx(s**2 * 24 / whole, rel=1e-4)


def test_projection_by_dense_svd():
    w, update = torch.randn(24, 16), planted(24, 16, [2.0, 1.0, 0.4])
    u, _, vt = torch.linalg.svd(update.dense())
    size = float((u[:, :3].t() @ w @ vt[:3].t()).norm())
    found = against_base(update, w)
    assert found.projection == pytest.approx(size, rel=1e-4)
    first = against_base(update, w, 1)
    assert first.amplification == pytest.approx(2 / abs(float(u[:, 0] @ w @ vt[0])), rel=1e-4)
    assert first.relative_norm == found.relative_norm
    assert found.amplification == pytest.approx(float(update.dense().norm()) / size, rel=1e-4)


def test_random_directions_have_the_projection_and_the_strength_of_chance():
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -2, 30)
    found = [against_base(planted(40, 30, [1.0] * 4, seed=10 * i + 100), w) for i in range(300)]
    powers = {"projection": 2, "random_projection": 2, "strength_read": 1, "strength_written": 1}
    mean = {
        name: sum(getattr(f, name) ** power for f in found) / len(found)
        for name, power in powers.items()
    }
    assert mean["projection"] == pytest.approx(mean["random_projection"], rel=0.1)
    assert mean["strength_read"] == pytest.approx(1, rel=0.1)
    assert mean["strength_written"] == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("storage", ["nf4", "bf16"])
def test_the_base_of_an_update_is_the_one_that_was_trained_on(storage, tiny_model_dir, tmp_path):
    """What DoRA adds to a weight depends on the weight: on the dequantized one in QLoRA."""
    base = tiny_model_dir("llama-wide")
    model = lf.load_model(base, storage=storage)
    adapter = lf.attach(model, lf.DoRA(lf.LoRA(rank=2, dropout=0.0)), ["q_proj"])
    move(adapter)
    own = {site.path: site for site in sites(adapter)}
    adapter.save(tmp_path / "a")
    found = inspect(Base(base), open_all([tmp_path / "a"])).sites
    for path, site in own.items():
        w = site.layer.dense()[0].float()
        norm = float((site.delta.fold(w, None)[0] - w).norm())
        assert found[path].base.norm == pytest.approx(norm, rel=2e-3)
        assert found[path].base.base_norm == pytest.approx(float(w.norm()), rel=2e-3)
