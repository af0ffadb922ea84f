"""The comparison on a tiny model: real rows, kept as they finish, and a page that stands alone."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from conftest import lorafold
from lorafold.api.arguments import as_rows
from lorafold.comparing import run
from lorafold.comparing.measure import ComparisonTask, Variant, measure
from lorafold.comparing.report import markdown, page
from lorafold.comparing.run import compare, in_own_process, key
from lorafold.data.row_store import Rows, SourcePart
from lorafold.errors import LorafoldError
from lorafold.methods.lora import LoRA
from lorafold.recipe.fitting import fitting, spec_of, without
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(12)]

# dropout is no option of full
RECIPE = Recipe(steps=3, batch=4, storage="fp32", max_length=64, dropout=0.0)


def task_of(model: Path, recipe: Recipe = RECIPE, rows: Any = ROWS) -> ComparisonTask:
    return ComparisonTask(Base(model, device="cpu"), rows, rows[:4], "rows", recipe)


def test_rows_of_another_weight_are_measured_anew(tiny_model_dir) -> None:
    keys = set()
    for weight in (1.0, 0.5, 4.0):
        rows = Rows(ROWS, (SourcePart(6), SourcePart(6, weight)))
        task = replace(task_of(tiny_model_dir("llama"), rows=rows), held_out=ROWS[:4])
        keys.add(key(task, "lora"))
        pickle.dumps(task)  # methods are measured in processes of their own
    assert len(keys) == 3


def test_rows_reach_the_process_that_measures() -> None:
    """Also once their shapes are known, as those of held-out rows from a file are."""
    rows = as_rows(ROWS)
    assert rows.shapes
    again = pickle.loads(pickle.dumps(rows))
    assert (again, again.shapes, again.sha256) == (rows, rows.shapes, rows.sha256)


@pytest.mark.slow
def test_the_figures_are_those_of_an_evaluation_of_the_adapter(tiny_model_dir, tmp_path) -> None:
    """The rows are rendered with the recipe's template, as they were in training."""
    base, recipe = tiny_model_dir("llama"), RECIPE.model_copy(update={"chat_template": "none"})
    found = measure(task_of(base, recipe), "lora", 0)
    lf.train(recipe, data=ROWS, model=base, out=tmp_path / "a", device="cpu")
    evaluated = lf.evaluate(base, ROWS[:4], adapters=tmp_path / "a", max_length=64, device="cpu")
    assert (found.loss, found.exact_match) == (evaluated.loss, evaluated.exact_match)


@pytest.mark.slow
def test_a_process_that_ends_before_it_is_done_is_told() -> None:
    class Ends(ComparisonTask):
        def __reduce__(self) -> tuple[Any, ...]:
            return os._exit, (1,)

    ends = Ends(Base("smollm2"), ROWS, ROWS, "rows", RECIPE)
    with pytest.raises(LorafoldError, match="lora: the process that measures it ended before"):
        in_own_process(ends, "lora", 0)


def test_the_recipe_says_how_much_is_held_out_once(tiny_model_dir, tmp_path, monkeypatch) -> None:
    model, seen = tiny_model_dir("llama"), list[ComparisonTask]()

    def none(task: ComparisonTask, *_: Any) -> list[Any]:
        seen.append(task)
        raise LorafoldError("seen")

    monkeypatch.setattr("lorafold.comparing.run.compare", none)
    for fraction, expected in ((0.5, 5), (0.0, 1)):
        recipe = Recipe(steps=1, eval_fraction=fraction)
        with pytest.raises(LorafoldError, match="seen"):
            lf.compare(tmp_path, model=model, data=ROWS[:10], methods=["lora"], recipe=recipe)
        task = seen.pop()
        assert (len(task.held_out), len(task.rows)) == (expected, 10 - expected)
        assert task.recipe.eval_fraction == 0.0


@pytest.mark.slow
def test_classifiers_are_compared_too(tiny_model_dir, tmp_path: Path) -> None:
    labels = ("even", "odd")
    texts = [{"text": f"the cat sat {n} times", "label": labels[n % 2]} for n in range(12)]
    recipe = RECIPE.model_copy(update={"objective": "classify"})
    task = task_of(tiny_model_dir("llama"), recipe, texts)
    both = [Variant("linear-probe"), Variant("lora")]
    base, probe, lora = compare(task, both, [0], tmp_path, lambda *_: None)
    assert (base.method, base.trainable_parameters) == ("base", None)
    assert base.loss_interval is not None
    assert probe.trainable_parameters < lora.trainable_parameters
    for row in (probe, lora):
        assert row.mergeable
        assert row.exact_match is not None
        assert row.forgetting_kl is row.latency_attached is row.latency_merged is None
        assert row.prefill_merged is not None
    page([base, probe, lora], "Methods", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<svg") == 3


def test_the_option_for_methods_is_a_list() -> None:
    names = ("--methods", "nosuch,lora", "--methods", "neither, dora")
    done = lorafold("compare", "--out", "unused", *names)
    assert done.returncode == 2
    assert "unknown method nosuch, neither; expected one of" in done.stderr


def test_options_reach_the_methods_that_have_them() -> None:
    shared = {"rank_pattern": {"q_proj": 8}, "options": {"init": "gaussian"}}
    recipe = Recipe(rank=4, dropout=0.1, steps=7, **shared)
    assert fitting(recipe, "lora") == recipe
    dora = fitting(recipe, "dora")
    assert (dora.rank, dora.options) == (4, {"init": "gaussian"})
    assert fitting(recipe, "bitfit") == Recipe(steps=7, method="bitfit")


@pytest.mark.parametrize(("over", "dropout"), [("loha", None), ("lora", 0.1), (None, 0.1)])
def test_dora_takes_a_recipes_dropout_over_any_method(over: str | None, dropout: Any) -> None:
    recipe = Recipe(method="dora", dropout=0.1, options={} if over is None else {"over": over})
    assert getattr(spec_of(recipe).over, "dropout", None) == dropout
    assert fitting(recipe, "dora").dropout == dropout
    said = None if dropout else "dropout left out: dora over loha has no such option"
    assert without(recipe) == said


@pytest.mark.slow
def test_rows_are_measured_kept_and_shown(tiny_model_dir, tmp_path: Path, monkeypatch) -> None:
    task, told = task_of(tiny_model_dir("llama")), list[str]()
    three = [Variant("lora"), Variant("houlsby"), Variant("full")]

    def tell(row: Any, done: int, total: int) -> None:
        told.append(f"{row.method} {done}/{total}")

    rows = compare(task, three, [0], tmp_path, tell)
    assert told == ["base 1/4", "lora 2/4", "houlsby 3/4", "full 4/4"]
    base, lora, houlsby, full = rows
    alone = lf.evaluate(tiny_model_dir("llama"), ROWS[:4], max_length=64, storage="fp32")
    assert (base.loss, base.loss_interval) == (alone.loss, alone.loss_interval)
    assert base.row_losses == alone.losses
    assert base.peak_bytes is base.mergeable is None
    assert (lora.mergeable, houlsby.mergeable, full.mergeable) == (True, False, True)
    assert (lora.modifies_architecture, houlsby.modifies_architecture) == (False, True)
    assert houlsby.latency_merged is None
    assert full.trainable_share == 1.0
    assert lora.forgetting_kl >= 0
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()}
    assert len(stamps) == 4

    def never(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(run, "in_own_process", never)
        assert compare(task, three, [0], tmp_path, tell) == rows
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "lr", 1e-9)
        other = run.key(task, "lora")  # other defaults, another row
        assert other not in {p.stem.rpartition("-")[2] for p in stamps}
    assert markdown(rows).count("\n") == 8
    page(rows, "Methods <on> rows", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 5
    assert "Methods &lt;on&gt; rows" in text
    two = [replace(lora, loss=3.0), replace(lora, seed=1, loss=4.0)]
    assert "| 3.5000 (3.0000 to 4.0000) |" in markdown(two)
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


@pytest.mark.slow
def test_a_quantized_base_whose_files_are_whole_is_recognized(tiny_model_dir) -> None:
    """The embedding that the fingerprint has is that of the files, not the dtype of the run."""
    recipe = Recipe(steps=1, batch=2, storage="nf4", max_length=64)
    rows = [{"prompt": f"Book a table for {i}", "completion": f" {i}"} for i in range(6)]
    task = ComparisonTask(Base(tiny_model_dir("llama-wide")), rows[:4], rows[4:], "rows", recipe)
    found = measure(task, "lora", 0)
    assert found.forgetting_kl is not None
    assert found.forgetting_kl >= 0
