"""An update's singular parts, their figures, and the tokens and places that its directions read
and write, against dense SVDs, closed forms and planted tokens.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, Olmo2Config

import lorafold as lf
from laws import move
from lorafold.core.delta import set_tensor
from lorafold.errors import LorafoldError
from lorafold.inspecting.inspect import inspect
from lorafold.inspecting.residual_stream import find_stream, gain
from lorafold.inspecting.spectra import (
    advice,
    against_base,
    effective_rank,
    entropy_rank,
    phi,
    pooled,
    stable_rank,
)  # fmt: skip
from lorafold.inspecting.subspaces import compare_updates
from lorafold.inspecting.token_directions import (
    Directions,
    largest_shares,
    mean_nearest,
    nearest,
    read_vectors,
    shares,
)  # fmt: skip
from lorafold.inspecting.updates import Svd, modules_of, svd_of_dense, svd_of_factors
from lorafold.layers import layer_of
from lorafold.methods import make_spec
from lorafold.models.checkpoint import build_on_meta
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
    for site in modules_of(adapter):
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
    svd = svd_of_factors(up, down)
    # in fp32 some processors' sums of so many are off by 2e-4
    up, down = up.double(), down.double()
    gram = torch.linalg.eigvals((up.t() @ up) @ (down @ down.t())).real.sort(descending=True).values
    assert torch.allclose(svd.s.double().square(), gram, rtol=1e-6)


def test_small_singular_values_keep_their_digits():
    u, v = orthonormal(50, 4), orthonormal(40, 4, 1)
    s = torch.tensor([1.0, 1e-3, 1e-6, 1e-9], dtype=torch.float64)
    assert torch.allclose(svd_of_factors(u * s, v.t()).s.double(), s, rtol=1e-6, atol=0)


def test_rank_beyond_the_matrix_and_an_update_of_nothing():
    assert len(svd_of_factors(torch.randn(5, 9), torch.randn(9, 7)).s) == 5
    assert len(svd_of_factors(torch.zeros(5, 2), torch.randn(2, 7)).s) == 0
    assert len(svd_of_dense(torch.zeros(5, 7)).s) == 0
    nothing = svd_of_factors(torch.zeros(5, 2), torch.randn(2, 7))
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
        f"rank {found.rank_95} is enough for 95% of the energy, and the adapter has rank 16:"
        f" resizing it to rank {found.advised_rank} loses {found.advised_loss:.1%} of the energy"
    )
    assert "use a higher rank" in advice(16, pooled([torch.ones(16)]))
    kept = "rank 5 is enough for 95% of the energy, and the adapter has rank 8: keep this rank"
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
    mixed = svd_of_factors(both.u * both.s, both.v.t())  # overlaps with either
    for x, y in ((a, b), (a, mixed), (a, a)):
        expected = float((x.dense() * y.dense()).sum() / (x.dense().norm() * y.dense().norm()))
        found = compare_updates("b", {"m": x}, {"m": y}).sites["m"].cosine
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
    own = {site.path: site for site in modules_of(adapter)}
    adapter.save(tmp_path / "a")
    found = inspect(Base(base), open_all([tmp_path / "a"])).sites
    for path, site in own.items():
        w = site.layer.dense()[0].float()
        norm = float((site.delta.fold(w, None)[0] - w).norm())
        assert found[path].base.norm == pytest.approx(norm, rel=2e-3)
        assert found[path].base.base_norm == pytest.approx(float(w.norm()), rel=2e-3)


LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
LAST = ("self_attn.o_proj", "mlp.down_proj")
GPT2 = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}
PLACES = {  # blocks, readers with their norm, writers, the last norm
    **dict.fromkeys(("llama", "qwen2", "gemma"), ("model.layers", LLAMA, LAST, "model.norm")),
    "gpt2": ("transformer.h", GPT2, ("attn.c_proj", "mlp.c_proj"), "transformer.ln_f"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_readers_and_writers_of_the_residual_stream(kind, tiny_model):
    model = tiny_model(kind)
    blocks, readers, writers, final = PLACES[kind]
    found = find_stream(model)
    expected = {
        f"{blocks}.{i}.{path}": f"{blocks}.{i}.{norm}"
        for i in range(2)
        for path, norm in readers.items()
    }
    assert found.readers == {**expected, "lm_head": final}
    assert {p for p in found.writers if p.startswith(blocks)} == {
        f"{blocks}.{i}.{path}" for i in range(2) for path in writers
    }
    assert found.embedding in found.writers
    assert (found.final_norm, found.size) == (final, 32)


def test_places_where_norms_come_after_and_among_experts():
    size = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 300,
    }  # fmt: skip
    after = find_stream(build_on_meta(Olmo2Config(**size), False))
    assert {p: n for p, n in after.readers.items() if "attn" in p} == {
        f"model.layers.{i}.self_attn.{name}_proj": "" for i in range(2) for name in "qkv"
    }
    assert {p.split(".")[-1] for p in after.writers} == {"embed_tokens", "o_proj", "down_proj"}
    config = MixtralConfig(**size, num_key_value_heads=2, num_local_experts=2)
    experts = find_stream(build_on_meta(config, False))
    assert experts.readers["model.layers.1.self_attn.q_proj"] == "model.layers.1.input_layernorm"
    assert {p: n for p, n in experts.readers.items() if "experts" in p} == {
        f"model.layers.{i}.mlp.experts.gate_up_proj": f"model.layers.{i}.post_attention_layernorm"
        for i in range(2)
    }
    assert {p for p in experts.writers if "layers" in p} == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.o_proj", "mlp.experts.down_proj")
    }


@pytest.mark.parametrize("kind", PLACES)
def test_gain_is_what_the_norm_does_to_a_direction(kind, tiny_model):
    model = tiny_model(kind)
    norm = model.get_submodule(find_stream(model).final_norm)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(32))
        h, v = torch.randn(32), torch.randn(32)
        h -= h.mean()  # LayerNorm takes it away
        bias = getattr(norm, "bias", None)
        read = v @ (norm(h) - (0 if bias is None else bias))
        size = h.square().mean().sqrt()
        expected = float((gain(norm, 32) * v) @ h / size)
        assert float(read) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_nearest_is_brute_force_over_many_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 8, generator=generator).bfloat16()
    directions = torch.randn(8, 5, generator=generator)
    near = nearest(rows, directions)
    similar = torch.nn.functional.cosine_similarity
    cosines = similar(rows.float()[:, :, None], directions[None], dim=1)
    for end, sign in ((near.top, 1), (near.bottom, -1)):
        values, places = (sign * cosines).topk(6, 0)
        assert torch.allclose(end[0], sign * values, atol=1e-5)
        assert torch.equal(end[1], places)


@pytest.mark.parametrize("kind", PLACES)
def test_planted_tokens_are_read_and_written(kind, tiny_model, tiny_model_dir, tmp_path):
    blocks, readers, writers, final = PLACES[kind]
    (reader, norm), source = next(iter(readers.items())), Base(tiny_model_dir(kind))
    token = source.tokenizer().decode([77])

    def found(at: str, norm: str, writes: bool) -> Any:
        """The figures of an adapter of rank 1 at a module, with the token planted on one side."""
        model, path = tiny_model(kind), f"{blocks}.1.{at}"
        end = model.get_output_embeddings() if writes else model.get_input_embeddings()
        adapter = lf.attach(model, lf.LoRA(rank=1, alpha=1, dropout=0.0), [path])
        delta = adapter.deltas[path]
        with torch.no_grad():
            direction = end.weight[77] / gain(model.get_submodule(norm), 32)
            out, inn = delta.delta().shape
            set_tensor(delta, "B", direction[:, None] if writes else torch.randn(out, 1))
            set_tensor(delta, "A", torch.randn(1, inn) if writes else direction[None])
        adapter.save(tmp_path / at)
        return inspect(source, open_all([tmp_path / at])).sites[path]

    def nearest_of(ends: Any) -> tuple[float, str]:
        near = [(e.cosine, e.name) for e in ends.positive]
        return max(near + [(-e.cosine, e.name) for e in ends.negative])

    reads = found(reader, f"{blocks}.1.{norm}", False).reads
    assert nearest_of(reads[0]) == (pytest.approx(1, abs=1e-4), token)
    written = found(writers[1], final, True)
    assert written.reads is None
    assert nearest_of(written.writes[0]) == (pytest.approx(1, abs=1e-4), token)


def test_shares_of_vectors_are_those_of_the_dense_update():
    up, down, vectors = torch.randn(20, 3), torch.randn(3, 12), torch.randn(6, 12)
    svd, dense = svd_of_factors(up, down), up @ down
    unit = torch.nn.functional.normalize(vectors, dim=1)
    expected = (dense @ unit.t()).square().sum(0) / dense.square().sum()
    side = Directions(svd.v, False)
    assert torch.allclose(shares(side, svd.s, vectors), expected, atol=1e-5)
    basis = torch.linalg.qr(torch.randn(12, 12))[0]
    assert float(shares(side, svd.s, basis).sum()) == pytest.approx(1, rel=1e-4)
    top = largest_shares(side, svd.s, list("abcdef"), vectors)
    assert list(top.values()) == sorted(top.values(), reverse=True)
    assert next(iter(top)) == "abcdef"[int(expected.argmax())]


def test_vectors_of_a_file(tmp_path):
    rows = torch.randn(3, 8)
    file = tmp_path / "f.safetensors"
    save_file({"one": torch.ones(8), "decoder": rows, "columns": torch.randn(8, 5)}, file)
    names, matrix = read_vectors(file, 8)
    columns, decoder = [f"columns[{i}]" for i in range(5)], [f"decoder[{i}]" for i in range(3)]
    assert names == [*columns, *decoder, "one"]
    assert torch.equal(matrix[5:8], rows)
    save_file({"wrong": torch.ones(7), "ids": torch.ones(8, dtype=torch.long)}, file)
    told = r"ids: found shape \[8\].*wrong: found shape \[7\], expected \[8\]"
    with pytest.raises(LorafoldError, match=told):
        read_vectors(file, 8)


def test_chance_is_what_random_directions_come_to():
    rows = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    found = mean_nearest(rows, None)
    drawn = torch.nn.functional.normalize(torch.randn(16, 2000), dim=0)
    expected = (torch.nn.functional.normalize(rows, dim=1) @ drawn).amax(0).mean()
    assert found == pytest.approx(float(expected), rel=0.05)
    # all rows on one line; a plane full of rows
    assert mean_nearest(rows[:, :1].expand(-1, 16), None) < found < mean_nearest(rows[:, :2], None)
