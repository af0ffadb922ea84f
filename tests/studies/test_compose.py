"""Compositions of adapters: the laws of their arithmetic, with PEFT and dense code as oracles."""

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorafold as lf
from adapter_cases import adapted_logits, logits, make_adapter, relative
from compose_cases import ROUNDING, Q, run, same, updates, weighted
from fresh_models import fresh_model
from lorafold.composing.updates import RULES, disjoint_mean, inner, truncate_rank
from lorafold.core.rounding import generator_of
from lorafold.errors import LorafoldError
from lorafold.ops.svd import svd_of_product

SPECS: dict[str, dict[str, Any]] = {  # of other ranks, targets and methods
    "a": {"spec": lf.LoRA(rank=4)},
    "b": {
        "targets": Q,
        "spec": lf.LoRA(rank=2, alpha=3, rslora=True, rank_pattern={"1.self_attn.q_proj": 5}),
    },
    "c": {"spec": lf.LoRA(rank=3), "targets": ["v_proj", "lm_head", "embed_tokens"]},
    "vera": {"spec": lf.VeRA(rank=8), "targets": Q},
    "adalora": {"spec": lf.AdaLoRA(rank=3), "targets": ["up_proj", "q_proj"]},
    "loha": {"spec": lf.LoHa(rank=2), "targets": ["v_proj", "up_proj"]},
    "lokr": {"spec": lf.LoKr(rank=2), "targets": ["v_proj", "down_proj"]},
    "lt-sft": {"spec": lf.LTSFT(density=0.1), "targets": ["k_proj", "v_proj"]},
}


@pytest.fixture(scope="module")
def llama(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory) -> Callable[..., list[Path]]:
    """Saved adapters by their names in SPECS, each of another seed."""
    root = tmp_path_factory.mktemp("adapters")
    paths = {
        name: make_adapter(llama, root / name, seed=i, **given)
        for i, (name, given) in enumerate(SPECS.items())
    }
    return lambda *names: [paths[name] for name in names]


@pytest.mark.few(3)
@pytest.mark.parametrize("word", RULES)
def test_one_adapter_with_weight_one_is_itself(word: str, llama, made, tmp_path) -> None:
    density = {"density": 1.0} if RULES[word].prune else {}
    result = run(llama, made("b"), tmp_path / "out", word, weights=(1.0,), **density)
    assert result.truncation_error < ROUNDING
    same(updates(llama, tmp_path / "out"), updates(llama, *made("b")))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2"])
def test_composing_then_folding_is_folding_the_sum(kind: str, tiny_model_dir, tmp_path) -> None:
    base = tiny_model_dir(kind)
    both = [
        make_adapter(base, tmp_path / f"{rank}", seed=rank, spec=lf.LoRA(rank=rank))
        for rank in (2, 5)
    ]
    result = run(base, both, tmp_path / "out", weights=(0.7, -0.3))
    assert (result.weights, result.truncation_error) == ((0.7, -0.3), 0.0)
    same(updates(base, tmp_path / "out"), weighted(base, both, [0.7, -0.3]))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {7}


@pytest.mark.few(3)
@pytest.mark.parametrize("other", ["b", "c", "vera", "adalora", "loha", "lokr", "lt-sft"])
def test_ranks_targets_and_methods_mix(other: str, llama: Path, made: Any, tmp_path: Path) -> None:
    adapters = made("a", other)
    # the smaller side: nothing is cut
    rank = None if other in ("b", "c", "vera", "adalora") else 32
    result = run(llama, adapters, tmp_path / "out", rank=rank, weights=(0.5, 2.0))
    assert result.truncation_error < ROUNDING
    same(updates(llama, tmp_path / "out"), weighted(llama, adapters, [0.5, 2.0]))


def test_weights_where_none_are_given(llama: Path, made: Any, tmp_path: Path) -> None:
    for word, each in {"linear": 1 / 3, "task-arithmetic": 1.0, "svd": 1 / 3}.items():
        assert run(llama, made("a", "b", "c"), tmp_path / word, word).weights == (each,) * 3


def theirs(
    model: Path, adapters: Sequence[Path], weights: Sequence[float], **how: Any
) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(fresh_model(model), adapters[0], "0")
        for i, path in enumerate(adapters[1:], 1):
            wrapped.load_adapter(path, str(i))
        torch.manual_seed(0)
        names = [str(i) for i in range(len(adapters))]
        wrapped.add_weighted_adapter(names, list(weights), "all", **how)
    modules = wrapped.base_model.model.named_modules()
    layers = {path: m for path, m in modules if "all" in getattr(m, "lora_A", ())}
    return {f"{path}.weight": m.get_delta_weight("all").detach() for path, m in layers.items()}


PRUNED = {"density": 0.25, "svd_rank": 6}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("ours", "kind", "weights", "options"),
    [
        ("linear", "cat", (0.4, -1.2), {}),
        ("svd", "svd", (0.4, -1.2), {}),
        ("svd", "svd", (0.4, 0.7), {"svd_rank": 2}),
        ("magnitude", "magnitude_prune_svd", (0.4, 0.7), PRUNED),
        ("ties", "ties_svd", (0.8, 0.8), PRUNED),
    ],
    ids=["cat", "svd", "svd-rank", "magnitude", "ties"],
)
def test_peft_agrees(ours: str, kind: str, weights: Any, options: Any, llama, tmp_path) -> None:
    adapters = [
        make_adapter(llama, tmp_path / f"{i}", seed=i, spec=lf.LoRA(rank=4, alpha=i + 3))
        for i in (0, 1)
    ]
    own = {name.removeprefix("svd_"): value for name, value in options.items()}
    run(llama, adapters, tmp_path / "out", ours, weights=weights, **own)
    expected = theirs(llama, adapters, weights, combination_type=kind, **options)
    # an SVD by subspace iteration is as good as the whole one, yet not the same where singular
    # values lie close together
    same(updates(llama, tmp_path / "out"), expected, 1e-2 if "density" in options else ROUNDING)


def test_peft_reads_what_is_composed(llama: Path, made: Any, tmp_path: Path) -> None:
    run(llama, made("a", "b", "c"), tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings under an adapter
        read = peft.PeftModel.from_pretrained(fresh_model(llama), tmp_path / "out").eval()
    assert relative(logits(read), adapted_logits(llama, tmp_path / "out")) < ROUNDING


def elected_mean(changes: Sequence[Tensor]) -> Tensor:
    """TIES' election and disjoint mean, entry by entry in plain Python."""
    out = torch.zeros_like(changes[0])
    for at in itertools.product(*map(range, out.shape)):
        votes = [change[at].item() for change in changes]
        sign = (sum(votes) > 0) - (sum(votes) < 0)
        agreeing = [vote for vote in votes if vote * sign > 0]
        out[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def largest_entries(change: Tensor, density: float) -> Tensor:
    ranked = sorted(change.flatten().tolist(), key=abs, reverse=True)
    least = abs(ranked[round(density * change.numel()) - 1])
    return torch.tensor([[v if abs(v) >= least else 0.0 for v in row] for row in change.tolist()])


def dropped(change: Tensor, density: float, seed: int, name: str) -> Tensor:
    luck = torch.rand(change.shape, generator=generator_of(seed, name)).tolist()
    return torch.tensor([[v / density if u < density else 0.0 for v, u in zip(*rows, strict=True)]
                         for rows in zip(change.tolist(), luck, strict=True)])  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.parametrize("word", ["ties", "dare", "dare-ties", "magnitude"])
def test_pruned_compositions_are_their_plain_formulas(word: str, llama, made, tmp_path) -> None:
    adapters, weights, density, seed = made("a", "b"), (0.6, 1.3), 0.3, 5
    options = {"weights": weights, "density": density, "seed": seed, "rank": 32}
    result = run(llama, adapters, tmp_path / "out", word, **options)
    assert result.truncation_error < ROUNDING
    found, single = updates(llama, tmp_path / "out"), [updates(llama, path) for path in adapters]
    for site in ("1.self_attn.q_proj", "0.self_attn.v_proj", "0.self_attn.k_proj"):
        name = f"model.layers.{site}.weight"
        kept = []
        for i, (own, weight) in enumerate(zip(single, weights, strict=True)):
            if name not in own:  # b has no k_proj
                continue
            path = f"{name.removesuffix('.weight')}/{i}"
            if "dare" in word:
                kept.append(weight * dropped(own[name], density, seed, path))
            else:
                kept.append(weight * largest_entries(own[name], density))
        expected = elected_mean(kept) if "ties" in word else sum(kept)
        # folded fp32 weights give an update to some units in their last place, and near the
        # threshold that may decide
        assert ((found[name] - expected).abs() > 1e-5).float().mean() < 0.01, name
        assert (found[name] != 0).any()


def test_the_disjoint_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    three = [torch.randn(7, 5, generator=generator) for _ in range(3)]
    torch.testing.assert_close(disjoint_mean(three), elected_mean(three))
    assert not disjoint_mean([three[0], -three[0]]).any()


@pytest.mark.parametrize(("out", "rank", "inn"), [(30, 4, 20), (6, 9, 20), (20, 9, 6), (5, 40, 7)])
def test_the_svd_of_a_product_is_that_of_the_matrix(out: int, rank: int, inn: int) -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(out, rank, generator=generator)
    down = torch.randn(rank, inn, generator=generator)
    u, s, vt = svd_of_product(up, down)
    assert len(s) == min(out, rank, inn)
    torch.testing.assert_close((u * s) @ vt, up.double() @ down.double())
    torch.testing.assert_close(s, torch.linalg.svdvals(up.double() @ down.double())[: len(s)])
    for q in (u, vt.T):
        torch.testing.assert_close(q.T @ q, torch.eye(len(s), dtype=torch.float64))


def test_a_cut_is_the_best_one_and_says_what_is_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(30, 6, generator=generator), torch.randn(6, 20, generator=generator)
    exact = up.double() @ down.double()
    tail = torch.linalg.svdvals(exact)[2:].square().sum()
    for change in ((up, down), up @ down):
        b, a, lost = truncate_rank(change, 2)
        assert (b.shape, a.shape) == ((30, 2), (2, 20))
        error = (b.double() @ a.double() - exact).square().sum().item()
        assert lost == pytest.approx(error, rel=1e-4)
        assert lost == pytest.approx(tail.item(), rel=1e-3)
    assert truncate_rank((up, down), 6) == (up, down, 0.0)
    for x, y in itertools.product(((up, down), up @ down), repeat=2):
        assert inner(x, y) == pytest.approx(exact.square().sum().item(), rel=1e-5)


def test_the_stated_error_is_that_of_all_weights(llama: Path, made: Any, tmp_path: Path) -> None:
    for word, options in {"linear": {"rank": 3}, "ties": {"rank": 2}, "svd": {}}.items():
        cut_ = run(llama, made("a", "b"), tmp_path / word, word, **options)
        run(llama, made("a", "b"), tmp_path / f"{word}-whole", word, rank=32)
        found, whole = updates(llama, tmp_path / word), updates(llama, tmp_path / f"{word}-whole")
        lost = sum((found[name] - change).square().sum() for name, change in whole.items())
        total = sum(change.square().sum() for change in whole.values())
        assert cut_.truncation_error == pytest.approx((lost / total).sqrt().item(), rel=1e-3)
        assert 0.01 < cut_.truncation_error < 1


@pytest.mark.parametrize("word", ["ties", "dare"])
def test_the_same_seed_gives_the_same_bytes(word: str, llama, made, tmp_path) -> None:
    for name, seed in {"one": 3, "two": 3, "three": 4}.items():
        torch.rand(1)  # the state of the process does not matter
        run(llama, made("a", "b"), tmp_path / name, word, rank=2, seed=seed)
    one, two, three = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("one", "two", "three")
    )
    assert one == two
    assert (one != three) or word == "ties"


def test_the_record_says_what_was_done(llama: Path, made: Any, tmp_path: Path) -> None:
    run(llama, made("a", "b"), tmp_path / "out", "ties", weights=(1.0, 2.0), seed=7)
    said = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    assert said["composed"]["adapters"] == [str(path) for path in made("a", "b")]
    told = {k: said["composed"][k] for k in ("how", "weights", "density", "seed")}
    assert told == {"how": "ties", "weights": [1.0, 2.0], "density": 0.2, "seed": 7}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(llama))
    assert said["base"]  # a fingerprint, so that another base is refused


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"spec": lf.DoRA(lf.LoRA(rank=2)), "targets": Q}, "self_attn.q_proj"),
        ({"spec": lf.IA3()}, "model.layers.0."),
        ({"spec": lf.LoRA(rank=2), "targets": Q, "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"spec": lf.LoRA(rank=2), "targets": Q, "tokens": [5]}, "embed_tokens"),
        ({"spec": lf.Prompt(tokens=2)}, "update of model"),
    ],
    ids=["dora", "ia3", "module", "tokens", "prompt"],
)
def test_what_is_not_additive_is_refused_by_name(
    given: Any, place: str, llama: Path, made: Any, tmp_path: Path
) -> None:
    strange = make_adapter(llama, tmp_path / "strange", **given)
    with pytest.raises(LorafoldError) as refused:
        run(llama, [*made("a"), strange], tmp_path / "out")
    problem = str(refused.value).partition(" is not added to a weight, so")[0]
    assert problem.startswith(f"{strange}: the update of ")
    assert place in problem
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_told_before_anything_is_written(
    llama: Path, made: Any, tiny_model_dir: Any, tmp_path: Path, monkeypatch
) -> None:
    other = make_adapter(tiny_model_dir("qwen2"), tmp_path / "other")

    def refused(*adapters: Path, word: str = "linear", **options: Any) -> str:
        with pytest.raises(LorafoldError) as error:
            run(llama, adapters, tmp_path / "out", word, **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    a, b, loha = made("a", "b", "loha")
    assert "pass --rank" in refused(a, loha)
    assert "found 1, expected one for each of the 2" in refused(a, b, weights=(1.0,))
    assert "found nonsense, expected one of linear, task-arithmetic" in refused(a, word="nonsense")
    assert "share above 0" in refused(a, word="ties", density=1.5)
    assert "--density: used by --how ties and dare" in refused(a, density=0.3)
    monkeypatch.setitem(sys.modules, "cma", None)
    assert "the package cma is missing; install lorafold[lorahub]" in refused(a, word="lorahub")
    assert "--evaluations: used by --how lorahub only" in refused(a, evaluations=3)
    assert "--gates: used by --how mixture only" in refused(a, gates="token")
    assert "--set: used by --how mixture only" in refused(a, recipe=lf.Recipe(steps=7))
    assert "does not join rows" in refused(a, recipe=lf.Recipe(join="auto"))
    assert "used by --how lorahub and mixture only" in refused(a, examples={"t": [{"text": "x"}]})
    assert "--weight: learned by" in refused(a, b, word="lorahub", weights=(1.0, 1.0))
    assert "--examples" in refused(a, b, word="mixture")
    assert "trained on another base" in refused(a, other)
    assert "found none" in refused()
    (tmp_path / "out").mkdir()
    with pytest.raises(LorafoldError, match="--overwrite"):
        run(llama, [a, b], tmp_path / "out")
