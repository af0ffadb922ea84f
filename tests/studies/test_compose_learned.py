"""Compositions that learn or measure: mixtures, LoRAHub, interference, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold as lf
from adapter_cases import adapted_logits, logits, make_adapter, relative
from command_cases import error_of, printed, rows_file, words
from compose_cases import ROUNDING, Q, run, same, updates, weighted
from fresh_models import fresh_model
from lorafold.api.merge import merge
from lorafold.composing.interference import pairs_of
from lorafold.composing.methods import BOUND, minimize, write_mixture
from lorafold.composing.request import ComposeRequest, Job
from lorafold.composing.updates import read_updates, short_names
from lorafold.data.rows import read_rows
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.evaluation import EvaluationSettings, evaluate
from lorafold.files.atomic import MANIFEST
from lorafold.models.loading import load_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base

GATINGS = ["global", "layer", "token"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def pair(llama: Path, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    return [
        make_adapter(llama, root / "a", seed=1),
        make_adapter(llama, root / "b", seed=2, spec=lf.LoRA(rank=2), targets=Q),
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("tasks")
    asked = {"json": "Book a table for {}", "words": "Remind me at {}"}
    answers = {"json": '{{"people": {}}}', "words": "I will, at {}."}
    found = []
    for name, ask in asked.items():
        rows = [{"prompt": ask.format(n), "completion": answers[name].format(n)} for n in range(8)]
        found.append(rows_file(root / f"{name}.jsonl", rows))
    return found


def job(model: Path, adapters: list[Path], **options: Any) -> Job:
    given = open_all(adapters)
    request = ComposeRequest(Base(model), given, ("mixture",), Path("unused"), **options)
    opened = (fresh_model(model), load_tokenizer(model))
    updates = read_updates(Base(model), request.adapters)
    return Job(request, updates, lambda: opened, Console(quiet=True))


@pytest.fixture
def mixed(llama: Path, pair: list[Path], tmp_path: Path) -> Callable[[str], Path]:
    def write(gates: str) -> Path:
        write_mixture(job(llama, pair), tmp_path / gates, gates)  # type: ignore[arg-type]
        return tmp_path / gates

    return write


@pytest.mark.parametrize("gates", GATINGS)
def test_a_mixture_starts_as_the_average(gates: str, llama, pair, mixed, tmp_path) -> None:
    run(llama, pair, tmp_path / "average")
    expected = adapted_logits(llama, tmp_path / "average")
    assert relative(adapted_logits(llama, mixed(gates)), expected) < ROUNDING
    assert relative(expected, logits(fresh_model(llama))) > 100 * ROUNDING


@pytest.mark.parametrize(
    ("gates", "count"), [("global", 2), ("layer", 2 * 14), ("token", 2 * (2 * (32 * 6 + 64)))]
)
def test_gates_are_all_that_trains_and_each_once(gates: str, count: int, llama, mixed) -> None:
    model = fresh_model(llama)
    adapter = lf.load(model, mixed(gates), trainable=True)
    assert sum(p.numel() for p in adapter.parameters()) == count
    model(input_ids=torch.arange(3, 13)[None]).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(".deltas." in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("gates", GATINGS)
def test_a_trained_mixture_is_saved_and_read_as_it_is(gates: str, llama, mixed, tmp_path) -> None:
    model, path = fresh_model(llama), mixed(gates)
    adapter = lf.load(model, path, trainable=True)
    start = logits(model)
    generator = torch.Generator().manual_seed(0)
    for p in adapter.parameters():
        p.data += torch.randn(p.shape, generator=generator)
    moved = logits(model)
    assert relative(moved, start) > 100 * ROUNDING
    adapter.save(tmp_path / "again")
    assert relative(adapted_logits(llama, tmp_path / "again"), moved) < ROUNDING
    before, after = (load_file(p / WEIGHTS) for p in (path, tmp_path / "again"))
    assert before.keys() == after.keys()
    kept = [key for key in before if not key.endswith(("gates", "router"))]
    assert all(torch.equal(before[key], after[key]) for key in kept)


def set_gates(path: Path, values: list[float]) -> Path:
    tensors = load_file(path / WEIGHTS)
    tensors["base_model.mixture_gates"] = torch.tensor(values)
    save_file(tensors, path / WEIGHTS)
    (path / MANIFEST).unlink()
    return path


def test_a_mixture_under_fixed_gates_is_a_linear_composition(llama, pair, mixed, tmp_path) -> None:
    path = set_gates(mixed("global"), [0.3, -1.1])
    run(llama, pair, tmp_path / "sum", weights=(0.3, -1.1))
    expected = updates(llama, tmp_path / "sum")
    same(updates(llama, path), expected)  # folded in the model
    merge(str(llama), [path], tmp_path / "merged", device="cpu", certificate=False)  # and on disk
    merged = logits(load_model(tmp_path / "merged", torch.float32))
    assert relative(merged, adapted_logits(llama, path)) < ROUNDING
    run(llama, [path], tmp_path / "composed", weights=(1.0,))  # it is additive itself
    same(updates(llama, tmp_path / "composed"), expected)


@torch.no_grad()
def test_a_router_weighs_the_adapters_token_by_token(llama, pair, mixed) -> None:
    model = fresh_model(llama)
    adapter = lf.load(model, mixed("token"))
    path = "model.layers.1.self_attn.q_proj"
    router = adapter.deltas[path].router
    router.copy_(torch.randn(router.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    module = model.get_submodule(path)
    with lf.only(model):
        expected = module(x)
    gates = torch.softmax(x @ router.T, -1)
    for i, source in enumerate(pair):
        change = updates(llama, source)[f"{path}.weight"]
        expected = expected + gates[..., i : i + 1] * (x @ change.T)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert gates.std() > 0.1
    with pytest.raises(NotMergeable, match="RoutedDelta"):
        adapter.merge()


def test_a_routed_mixture_can_t_be_composed(llama, pair, mixed, tmp_path) -> None:
    with pytest.raises(LorafoldError, match="is not added to a weight"):
        run(llama, [pair[0], mixed("token")], tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("mixture_owner", lambda t: t + 2, "adapter indices of at least 0 and below 2"),
        ("mixture_owner", lambda t: t.float(), "adapter indices of at least 0 and below 2"),
        ("mixture_owner", lambda t: t[1:], "in the other"),
        ("mixture_up", lambda t: t[1:], "expected a factor"),
        ("mixture_down", lambda t: t[:, 1:], "expected a factor"),
        ("mixture_gates", lambda t: t[1:], "expected \\[2\\]"),
    ],
)
def test_a_damaged_mixture_is_refused(key: str, change: Any, message: str, llama, mixed) -> None:
    path = mixed("global")
    tensors = load_file(path / WEIGHTS)
    name = next(k for k in tensors if k.endswith(key))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path / WEIGHTS)
    (path / MANIFEST).unlink()
    with pytest.raises(LorafoldError, match=message):
        lf.load(fresh_model(llama), path)


def test_updates_without_factors_are_cut_into_a_mixture(llama, pair, tmp_path) -> None:
    lokr = make_adapter(llama, tmp_path / "lokr", spec=lf.LoKr(rank=2), targets=["v_proj"])
    adapters = [pair[0], lokr]
    with pytest.raises(LorafoldError, match="pass --rank"):
        write_mixture(job(llama, adapters), tmp_path / "none", "global")
    assert write_mixture(job(llama, adapters, rank=32), tmp_path / "whole", "global") < ROUNDING
    assert 0.001 < write_mixture(job(llama, adapters, rank=4), tmp_path / "cut", "global") < 1
    run(llama, adapters, tmp_path / "average", rank=32)
    average = adapted_logits(llama, tmp_path / "average")
    assert relative(adapted_logits(llama, tmp_path / "whole"), average) < ROUNDING


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_search_finds_a_minimum_within_its_bounds(n: int) -> None:
    goal = [0.9, -0.4, 2.0, 0.1, 0.0][:n]  # one of them out of reach
    tried: list[list[float]] = []

    def cost(x: list[float]) -> float:
        tried.append(x)
        return sum((a - b) ** 2 for a, b in zip(x, goal, strict=True))

    found = minimize(cost, n, 600, 0, lambda done, least: None)
    assert list(found) == pytest.approx([min(g, BOUND) for g in goal], abs=0.02)
    assert all(abs(x) <= BOUND for point in tried for x in point)
    assert minimize(cost, n, 600, 0, lambda done, least: None) == found


def test_the_search_says_how_far_it_is_and_is_never_worse_than_the_average() -> None:
    heard: list[tuple[int, float]] = []

    def hear(done: int, least: float) -> None:
        heard.append((done, least))

    minimize(lambda x: x[0] ** 2 + x[1] ** 2, 2, 12, 0, hear)
    assert [done for done, _ in heard] == list(range(1, 13))
    assert [least for _, least in heard] == sorted((least for _, least in heard), reverse=True)
    found = minimize(lambda x: sum(abs(v - 0.5) for v in x), 2, 4, 0, hear)
    assert found == pytest.approx((0.5, 0.5), abs=1e-6)


def dense(model: Path, a: Path, b: Path) -> dict[str, tuple[Tensor, Tensor]]:
    one, two = updates(model, a), updates(model, b)
    both = one.keys() & two.keys()
    return {name.removesuffix(".weight"): (one[name], two[name]) for name in both}


def test_geometry_is_that_of_the_dense_updates(llama: Path, pair: list[Path]) -> None:
    (found,) = pairs_of(read_updates(Base(llama), open_all(pair)), Console(quiet=True))
    both = dense(llama, *pair)
    assert found.sites.keys() == both.keys()
    assert (found.a, found.b) == ("a", "b")
    for path, (x, y) in both.items():
        at = found.sites[path]
        assert at.cosine == pytest.approx(((x * y).sum() / x.norm() / y.norm()).item(), abs=1e-5)
        assert at.norms == pytest.approx((x.norm().item(), y.norm().item()), rel=1e-4)
        for shared, side in ((at.shared_output, 0), (at.shared_input, 1)):
            bases = [torch.linalg.svd(m.double())[0 if side == 0 else 2] for m in (x, y)]
            ux, uy = (
                u[:, :r] if side == 0 else u[:r].T for u, r in zip(bases, (4, 2), strict=True)
            )
            assert shared == pytest.approx(((ux.T @ uy).square().sum() / 2).item(), abs=1e-3)
        assert (at.chance_output, at.chance_input) == (4 / x.shape[0], 4 / x.shape[1])
        large = [
            m.abs() >= m.abs().flatten().sort(descending=True).values[round(0.2 * m.numel()) - 1]
            for m in (x, y)
        ]
        where = large[0] & large[1]
        conflict = ((x * y < 0) & where).sum().item() / where.sum().item()
        assert at.sign_conflict == pytest.approx(conflict, abs=0.02)
    flat = [torch.cat([m[i].flatten() for m in both.values()]) for i in (0, 1)]
    assert found.overall is not None
    cosine = torch.cosine_similarity(*flat, dim=0).item()
    assert found.overall.cosine == pytest.approx(cosine, abs=1e-5)


def test_an_adapter_meets_itself_and_its_negative(llama, pair, tmp_path) -> None:
    run(llama, pair[:1], tmp_path / "minus", "task-arithmetic", weights=(-1.0,))
    opened = open_all([pair[0], pair[0], tmp_path / "minus"])
    three = pairs_of(read_updates(Base(llama), opened), Console(quiet=True))
    for found, sign in zip(three, (1, -1, -1), strict=True):
        assert found.overall is not None
        assert found.overall.cosine == pytest.approx(sign, abs=1e-5)
        assert found.overall.sign_conflict == pytest.approx(0 if sign > 0 else 1)
        assert found.overall.shared_input == pytest.approx(1)
    assert "cosine -1.000" in str(three[1])
    assert "most opposed at" in str(three[1])


def test_names_are_short_where_they_can_be() -> None:
    assert short_names(["x/a", "y/b"]) == ("a", "b")
    assert short_names(["x/a", "y/a"]) == ("x/a", "y/a")
    assert short_names(["x/a", "x/a"]) == ("x/a#1", "x/a#2")


def test_the_command_says_weights_error_and_place(llama, pair, tmp_path) -> None:
    given = {"model": llama, "adapter": pair, "out": tmp_path / "out"}
    said = printed("compose", **given, weight=[0.5, -2], rank=3)
    assert said["weights"] == [0.5, -2]
    assert said["out"] == str(tmp_path / "out")
    assert 0 < said["truncation_error"] < 1
    assert "interference" not in said
    lf.load(fresh_model(llama), tmp_path / "out")


@pytest.mark.slow
def test_interference_is_what_evaluation_finds(llama, pair, tasks, tmp_path) -> None:
    given = {"model": llama, "adapter": pair, "out": tmp_path / "out", "storage": "fp32"}
    said = printed("compose", **given, how=["linear", "ties"], data=tasks)
    found = said["interference"]["tasks"]
    assert list(found) == ["json.jsonl", "words.jsonl"]
    made = {word: tmp_path / "out" / word for word in ("linear", "ties")}
    live = {"base": [], "a": [pair[0]], "b": [pair[1]]}
    live |= {word: [path] for word, path in made.items()}
    compositions = said["compositions"].items()
    assert {word: one["out"] for word, one in compositions} == {w: str(p) for w, p in made.items()}
    losses, alone_ = set(), EvaluationSettings(completions=False)
    for path in tasks:
        assert list(found[path.name]) == list(live)
        for name, adapters in live.items():
            model = fresh_model(llama)
            for i, adapter in enumerate(adapters):
                lf.load(model, adapter, f"x{i}")
            alone = evaluate(model, load_tokenizer(llama), read_rows(str(path)), 1024, alone_)
            assert found[path.name][name]["loss"] == pytest.approx(alone.loss, rel=1e-5)
            assert found[path.name][name]["n"] == 8
            assert found[path.name][name]["exact_match"] == 0
            losses.add(round(alone.loss, 5))
    assert len(losses) == 10  # all differ, so that none could stand for another
    (geometry,) = said["interference"]["geometry"]
    assert -1 <= geometry["overall"]["cosine"] <= 1


@pytest.mark.slow
def test_what_is_learned_is_better_on_its_examples(llama, pair, tasks, tmp_path) -> None:
    """Random adapters hurt, so learning leaves less of them than the average has."""
    words = ["linear", "lorahub", "mixture"]
    given = {"model": llama, "adapter": pair, "out": tmp_path / "out", "storage": "fp32"}
    learning = {"evaluations": 30, "set": "steps=25", "no_completions": True}
    said = printed("compose", **given, how=words, data=tasks, examples=tasks, **learning)
    found = said["interference"]["tasks"].values()
    mean = {word: sum(row[word]["loss"] for row in found) for word in words}
    for name in ("lorahub", "mixture"):
        assert mean[name] < mean["linear"]
        assert said["compositions"][name]["weights"] != [0.5, 0.5]
        record = json.loads((tmp_path / "out" / name / "lorafold.json").read_text())["composed"]
        assert (record["how"], record["weights"]) == (name, said["compositions"][name]["weights"])
        weights = said["compositions"][name]["weights"]
        same(updates(llama, tmp_path / "out" / name), weighted(llama, pair, weights))


def test_half_of_the_rows_are_set_apart_for_what_learns(llama, pair, tasks, tmp_path) -> None:
    given = {"model": llama, "adapter": pair, "out": tmp_path / "out", "storage": "fp32"}
    learning = {"how": "mixture", "gates": "token", "set": "steps=2", "no_completions": True}
    said = printed("compose", **given, data=tasks, **learning)
    assert {row[name]["n"] for row in said["interference"]["tasks"].values() for name in row} == {4}
    assert said["weights"] is None
    trained = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    assert trained["data"]["rows"] == 8
    assert trained["composed"]["adapters"] == [str(path) for path in pair]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--how", "nonsense"], "--how: found nonsense, expected one of"),
        (["--how", "ties", "--how", "ties"], "--how ties: given several times"),
        (["--weight", "1"], "--weight: found 1"),
        (["--data", "missing.jsonl"], "error: missing.jsonl: there is no such file"),
        (["--set", "step=3"], "did you mean steps"),
    ],
    ids=" ".join,
)
def test_the_command_refuses_what_is_wrong(
    arguments: list[str], part: str, llama: Path, pair: list[Path], tmp_path: Path
) -> None:
    given = words("compose", model=llama, adapter=pair, out=tmp_path / "out")
    assert part in error_of(*given, *arguments)
    assert not (tmp_path / "out").exists()
