"""Inspecting, resizing, extracting and composing adapters of experts, each matrix on its own; the
oracle is the change of the merged model's parameters.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import lorafold as lf
from adapter_cases import adapted_logits, logits, make_adapter, relative
from command_cases import printed, rows_file
from conftest import make_tokenizer
from fresh_models import fresh_model
from lorafold.composing.interference import meetings
from lorafold.composing.updates import read
from lorafold.core.delta import Over
from lorafold.core.expert_matrices import module_at
from lorafold.fragility_study.defences import attached, factors_of, updates_of
from lorafold.inspecting.inspect import inspect
from lorafold.inspecting.loss_paths import loss_by_scale
from lorafold.inspecting.report import sections, table
from lorafold.inspecting.residual_stream import find_stream, gain
from lorafold.inspecting.resize import extract, resize
from lorafold.inspecting.subspaces import NUM_TOP, across_experts
from lorafold.inspecting.updates import modules_of
from lorafold.layers.experts import Experts
from lorafold.methods.mixture import Mixture
from lorafold.ops.grouped import grouped
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base
from mixtures import SHAPE, mixture

E = 4
KINDS = ("mixtral", "gpt-oss")  # (E, out, in) · (E, in, out), with biases
SPECS = {
    "lora": lf.LoRA(rank=3),
    "dora": lf.DoRA(over=lf.LoRA(rank=3)),
    "loha": lf.LoHa(rank=2),
    "vera": lf.VeRA(rank=8),
}
EXPERTS = ["gate_up_proj", "experts.down_proj"]
TURNS = {
    "Book a table": "for four", "Remind me": "tomorrow morning", "The quick brown fox": "jumps",
    "in the mountains": "rains",
}  # fmt: skip
ROWS = [{"prompt": prompt, "completion": text} for prompt, text in TURNS.items()]


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory) -> Callable[[str], Path]:
    """Directory of a tiny mixture of experts, whose files have one tensor for all experts."""

    @cache
    def made(kind: str) -> Path:
        path, tokenizer, model = tmp_path_factory.mktemp(kind), make_tokenizer(), mixture(kind)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(path, save_original_format=False)
        tokenizer.save_pretrained(path)
        return path

    return made


def matrices(model: Any) -> dict[str, Tensor]:
    """Every matrix (out, in) of the model by the name that the tools give it."""
    found = {}
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith("experts") and p.dim() == 3:
            turn_rounded = p.mT if model.get_submodule(owner).is_transposed else p
            found |= {f"{name}[{e}]": w.detach().double() for e, w in enumerate(turn_rounded)}
        elif leaf == "weight" and p.dim() == 2:
            found[owner] = p.detach().double()
    return found


def updates(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What merging the adapter changes in each matrix, where it changes anything."""
    model = fresh_model(base)
    before = {name: w.clone() for name, w in matrices(model).items()}
    lf.load(model, adapter).merge()
    after = matrices(model)
    return {name: after[name] - w for name, w in before.items() if not after[name].equal(w)}


@pytest.mark.few(3)
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_of_each_expert_are_those_of_its_matrix(kind, method, moe_dir, tmp_path):
    base = moe_dir(kind)
    make_adapter(base, tmp_path / "a", spec=SPECS[method], targets=[*EXPERTS, "q_proj"])
    found = inspect(Base(base), open_all([tmp_path / "a"]))
    changes, weights = updates(base, tmp_path / "a"), matrices(fresh_model(base))
    assert found.sites.keys() == changes.keys()
    assert len(changes) == 2 * (2 * E + 1)
    for name, dw in changes.items():
        figures, s = found.sites[name], torch.linalg.svdvals(dw)
        assert figures.shape == list(dw.shape)
        known = torch.tensor(figures.singular_values, dtype=torch.float64)
        assert (known - s[: len(known)]).norm() < 1e-4 * s.norm()
        size = float(dw.norm() / weights[name].norm())
        assert figures.base.relative_norm == pytest.approx(size, rel=1e-3)
    energy = sum(dw.square().sum() for dw in changes.values())
    assert found.whole.norm == pytest.approx(float(energy.sqrt()), rel=1e-3)
    assert "16 matrices of experts, 16 changed" in " ".join(found.advice)


def test_two_adapters_compared_at_each_expert(moe_dir, tmp_path):
    base = moe_dir("mixtral")
    for n, name in enumerate("ab"):
        make_adapter(base, tmp_path / name, seed=n, spec=lf.LoRA(rank=2 + n), targets=EXPERTS)
    one, other = open_all([tmp_path / "a", tmp_path / "b"])
    found = inspect(Base(base), [one], against=other).against
    a, b = (updates(base, tmp_path / name) for name in "ab")
    assert found.sites.keys() == a.keys()
    for name, site in found.sites.items():
        cosine = (a[name] * b[name]).sum() / (a[name].norm() * b[name].norm())
        assert site.cosine == pytest.approx(float(cosine), abs=1e-5)
    assert set(found.kinds) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_compared_where_they_meet_the_residual_stream(kind, moe_dir, tmp_path):
    base = moe_dir(kind)
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=6), targets=EXPERTS)
    model = fresh_model(base)
    svds = {n: s for at in modules_of(lf.load(model, tmp_path / "a")) for n, s in at.parts()}
    found = across_experts(svds, find_stream(model))
    sides = {site.rsplit(".", 1)[1]: of.side for site, of in found.items()}
    assert sides == {"gate_up_proj": "read", "down_proj": "written"}
    for site, of in found.items():
        own = [svds[f"{site}[{e}]"] for e in range(E)]
        top = [(svd.v if of.side == "read" else svd.u)[:, :NUM_TOP] for svd in own]
        phis = [
            float((top[i].t() @ top[j]).square().sum() / NUM_TOP)
            for i in range(E)
            for j in range(i)
        ]
        expected = (sum(phis) / len(phis), min(phis), max(phis))
        assert (of.phi, of.phi_lowest, of.phi_highest) == pytest.approx(expected, rel=1e-4)


def test_the_expert_that_changed_most_has_tokens_and_the_page_says_so(moe_dir, tmp_path):
    base = moe_dir("mixtral")
    model = fresh_model(base)
    adapter = lf.attach(model, lf.LoRA(rank=1), targets=["0.mlp.experts.gate_up_proj"])
    ((path, delta),) = adapter.own_deltas.items()
    norm = model.get_submodule(find_stream(model).readers[path])
    with torch.no_grad():
        delta.B.normal_(std=0.01)
        delta.B[1].zero_()
        delta.B[2].normal_()
        delta.A[2] = model.get_input_embeddings().weight[77] / gain(norm, SHAPE["hidden_size"])
    adapter.save(tmp_path / "a")
    found = lf.inspect(tmp_path / "a", base)
    assert [name for name, site in found.sites.items() if site.reads] == [f"{path}[2]"]
    ends = found.sites[f"{path}[2]"].reads[0]
    both = (ends.positive[0], ends.negative[0])
    nearest = [one for one in both if abs(one.cosine) > 0.99]
    assert [near.name for near in nearest] == [make_tokenizer().decode([77])]
    assert found.sites[f"{path}[1]"].numerical_rank == 0
    assert "Of 4 matrices of experts, 3 changed" in str(found)
    text = "".join(sections(found))
    assert "3 of 4" in text
    assert "0, expert 2" in text
    assert str(found.experts_left_out) in text
    shown = table(found)
    assert max(map(len, shown.splitlines())) <= 80
    sizes = [site.base.relative_norm for site in found.sites.values()]
    assert {f"({min(sizes):.2%}", f"{max(sizes):.2%})"} < {*shown.split()}


@pytest.mark.slow
def test_the_command_writes_all_figures(moe_dir, tmp_path):
    base = moe_dir("gpt-oss")
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=2))
    data, page = rows_file(tmp_path / "rows.jsonl", ROWS), tmp_path / "page.html"
    given = {"model": base, "full": True, "data": data, "html": page, "storage": "fp32"}
    found = printed("inspect", tmp_path / "a", **given)
    assert len(found["sites"]) == 2 * (2 * E + 4)
    assert all("intruders" in site for site in found["sites"].values())
    assert set(found["experts"]) == {
        f"model.layers.{i}.mlp.experts.{name}_proj" for i in (0, 1) for name in ("gate_up", "down")
    }
    assert "<h2>Experts</h2>" in page.read_text()


def test_the_loss_along_the_update_is_that_of_scaled_matrices(moe_dir, tmp_path):
    base = moe_dir("mixtral")
    make_adapter(base, tmp_path / "a", spec=lf.LoHa(rank=2), targets=EXPERTS)
    model, plain = fresh_model(base), fresh_model(base)
    lf.load(model, tmp_path / "a", "a")
    ids = torch.arange(3, 43)[None]

    def loss(of: Any) -> float:
        with torch.no_grad():
            return float(of(input_ids=ids, labels=ids).loss)

    found = dict(loss_by_scale(model, "a", lambda: loss(model), (0.0, 0.5, 1.0)))
    changes = updates(base, tmp_path / "a")
    for t, measured in found.items():
        for name, w in load_file(base / "model.safetensors").items():
            if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
                dw = torch.stack([changes[f"{name}[{e}]"] for e in range(E)])
                plain.get_parameter(name).data.copy_(w + t * dw)
        assert measured == pytest.approx(loss(plain), rel=1e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_resized_to_the_full_rank_it_is_itself(kind, method, moe_dir, tmp_path):
    base = moe_dir(kind)
    make_adapter(base, tmp_path / "a", spec=SPECS[method])
    found = resize(Base(base), open_all([tmp_path / "a"]), tmp_path / "b", energy=1.0)
    before = adapted_logits(base, tmp_path / "a")
    assert relative(before, logits(fresh_model(base))) > 1e-2
    assert relative(adapted_logits(base, tmp_path / "b"), before) < 1e-4
    assert found.error < 1e-6


@pytest.mark.parametrize("energy", [None, 0.6])
def test_no_adapter_of_that_rank_is_nearer_at_any_expert(energy, moe_dir, tmp_path):
    base = moe_dir("mixtral")
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=5), targets=EXPERTS)
    rank = None if energy else 2
    stack = open_all([tmp_path / "a"])
    found = resize(Base(base), stack, tmp_path / "b", rank=rank, energy=energy)
    before, after = (updates(base, tmp_path / name) for name in "ab")
    assert found.sites.keys() == before.keys()
    for name, dw in before.items():
        s, site = torch.linalg.svdvals(dw), found.sites[name]
        held = s.square().cumsum(0) / s.square().sum()
        k = rank or int((held < energy).sum()) + 1
        assert site["rank"] == k
        least = float(s[k:].norm() / s.norm())  # Eckart and Young
        assert site["error"] == pytest.approx(least, rel=1e-3)
        assert float((dw - after[name]).norm() / dw.norm()) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_extract_gives_back_what_was_added(kind, moe_dir, tmp_path):
    base = moe_dir(kind)
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=3))
    tuned = fresh_model(base)
    lf.load(tuned, tmp_path / "a").merge()
    tuned.save_pretrained(tmp_path / "tuned", save_original_format=False)
    sources = Base(base), Base(tmp_path / "tuned")
    found = extract(*sources, tmp_path / "out", rank=3)
    assert found.error < 1e-4
    assert found.left_out == {}
    assert found.sites.keys() == updates(base, tmp_path / "a").keys()
    assert relative(adapted_logits(base, tmp_path / "out"), logits(tuned)) < 1e-4


def test_updates_are_laid_over_a_model_by_their_matrices(moe_dir, tmp_path):
    base = moe_dir("gpt-oss")
    make_adapter(base, tmp_path / "a", spec=lf.LoRA(rank=3))
    model, own = (fresh_model(base) for _ in range(2))
    updates = updates_of(lf.load(own, tmp_path / "a"))
    assert updates is not None
    before = logits(model)
    with attached(model, {name: factors_of(update) for name, update in updates.items()}):
        assert relative(logits(model), logits(own)) < 1e-5
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def pair(moe_dir, tmp_path_factory) -> Callable[[str], list[Path]]:
    @cache
    def made(kind: str) -> list[Path]:
        root, base = tmp_path_factory.mktemp(kind), moe_dir(kind)
        both = ["q_proj", EXPERTS[0]]
        return [
            make_adapter(base, root / "a", seed=1, spec=lf.LoRA(rank=3), targets=EXPERTS),
            make_adapter(base, root / "b", seed=2, spec=lf.LoRA(rank=2), targets=both),
        ]

    return made


def trimmed(dw: Tensor, density: float) -> Tensor:
    kept = dw.flatten().abs().argsort(descending=True)[: round(density * dw.numel())]
    out = torch.zeros_like(dw).flatten()
    out[kept] = dw.flatten()[kept]
    return out.view_as(dw)


def ties(found: Sequence[Tensor]) -> Tensor:
    kept = torch.stack([trimmed(dw, 0.3) for dw in found])
    sign = kept.sum(0).sign()
    agree = (kept.sign() == sign) & (sign != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


FORMULAS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "linear": lambda found: sum(0.5 * dw for dw in found),  # type: ignore[return-value]
    "task-arithmetic": lambda found: sum(found),  # type: ignore[return-value, arg-type]
    "magnitude": lambda found: sum(0.5 * trimmed(dw, 0.3) for dw in found),  # type: ignore[return-value]
    "ties": ties,
}


@pytest.mark.few(3)
@pytest.mark.parametrize("how", FORMULAS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_composition_of_each_expert_is_the_formula_on_its_matrices(
    how, kind, moe_dir, pair, tmp_path
):
    base, adapters = moe_dir(kind), pair(kind)
    dense = how in ("magnitude", "ties")
    options: dict[str, Any] = {"rank": 64, "density": 0.3} if dense else {}
    lf.compose(adapters, tmp_path / "out", model=base, how=how, **options)
    a, b = (updates(base, path) for path in adapters)
    found = updates(base, tmp_path / "out")
    assert found.keys() == a.keys() | b.keys()
    for name, dw in found.items():
        expected = FORMULAS[how]([of[name] for of in (a, b) if name in of])
        assert (dw - expected).norm() < 1e-4 * expected.norm(), name


def test_svd_is_the_best_of_its_rank_and_dare_keeps_entries_as_they_are_divided(
    moe_dir, pair, tmp_path
):
    base, adapters = moe_dir("mixtral"), pair("mixtral")
    lf.compose(adapters, tmp_path / "svd", model=base, how="svd", rank=2)
    lf.compose(adapters[:1], tmp_path / "dare", model=base, how="dare", rank=64, density=0.5)
    a, b = (updates(base, path) for path in adapters)
    for name, dw in updates(base, tmp_path / "svd").items():
        mean = FORMULAS["linear"]([of[name] for of in (a, b) if name in of])
        least = torch.linalg.svdvals(mean)[2:].norm()
        assert float((dw - mean).norm()) == pytest.approx(float(least), rel=1e-3, abs=1e-6)
    dare = updates(base, tmp_path / "dare")
    for name, dw in dare.items():
        kept = dw.abs() > 1e-5
        assert 0.4 < kept.double().mean() < 0.6
        assert (dw - 2 * a[name])[kept].norm() < 1e-4 * a[name].norm()
    path = "model.layers.0.mlp.experts.down_proj"
    dare = updates(base, tmp_path / "dare")
    masks = [dare[f"{path}[{e}]"].abs() > 1e-5 for e in (0, 1)]
    assert not masks[0].equal(masks[1])


def test_updates_relate_at_each_expert(moe_dir, pair):
    base, adapters = moe_dir("gpt-oss"), pair("gpt-oss")
    (found,) = meetings(read(Base(base), open_all(adapters)), Console(quiet=True))
    a, b = (updates(base, path) for path in adapters)
    assert found.sites.keys() == a.keys() & b.keys()
    for name, meeting in found.sites.items():
        assert meeting.norms == pytest.approx((float(a[name].norm()), float(b[name].norm())), 1e-4)
        cosine = (a[name] * b[name]).sum() / (a[name].norm() * b[name].norm())
        assert meeting.cosine == pytest.approx(float(cosine), abs=1e-5)
        assert meeting.shared_input is not None


@pytest.mark.parametrize("gates", ["global", "layer"])
def test_a_mixture_is_the_sum_under_its_gates(gates, moe_dir, pair, tmp_path):
    base, adapters = moe_dir("mixtral"), pair("mixtral")
    lf.compose(
        adapters, tmp_path / "mixed", model=base, how="mixture", storage="fp32",
        learning=lf.Learning(gates, {"x": ROWS}, recipe=lf.Recipe(steps=2, batch=2)),
    )  # fmt: skip
    model = fresh_model(base)
    deltas = lf.load(model, tmp_path / "mixed").own_deltas
    gains = {path: delta.gates.values.detach().double() for path, delta in deltas.items()}
    assert not any(torch.equal(g, torch.full_like(g, 0.5)) for g in gains.values())
    a, b = (updates(base, path) for path in adapters)
    for name, dw in updates(base, tmp_path / "mixed").items():
        gate = gains[name.partition("[")[0]]
        expected = sum(g * of[name] for g, of in zip(gate, (a, b), strict=True) if name in of)
        assert (dw - expected).norm() < 1e-4 * expected.norm()
    merged = fresh_model(base)
    lf.load(merged, tmp_path / "mixed").merge()
    assert relative(adapted_logits(base, tmp_path / "mixed"), logits(merged)) < 1e-5


def test_a_router_of_adapters_at_each_expert(moe_dir):
    model = fresh_model(moe_dir("gpt-oss"))
    for path in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        layer = Experts(module_at(model, path))
        delta = Mixture(("a", "b"), "token").build(layer)
        out, inn = layer.shape
        delta.owner = torch.tensor([0, 0, 1])
        delta.up, delta.down = torch.randn(E, out, 3), torch.randn(E, 3, inn)
        torch.nn.init.normal_(delta.router)
        groups, _, _ = grouped(torch.tensor([2, 0, 2, 3, 0, 2]), E)
        layer.groups = groups
        x = torch.randn(6, inn)
        w, b = layer.dense()
        for row, e, y in zip(x, groups.of_row.tolist(), Over(delta, layer)(x), strict=True):
            gates = (delta.router[e] @ row).softmax(0)[delta.owner]
            expected = w[e] @ row + b[e] + delta.up[e] @ (gates * (delta.down[e] @ row))
            assert (y - expected).norm() < 1e-5 * expected.norm()
