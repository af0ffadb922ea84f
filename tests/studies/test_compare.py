"""Methods and settings compared on a tiny model: real rows, kept as they finish, and a page."""

import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import lorafold as lf
from command_cases import rows_file, words
from conftest import lorafold
from lorafold.api.arguments import as_rows
from lorafold.cli.commands import parse_vary
from lorafold.comparing import run
from lorafold.comparing.measure import ComparisonTask, Measurement, Variant, measure, variants
from lorafold.comparing.paired_tests import indistinct_methods, verdict, with_validation
from lorafold.comparing.report import markdown, page, short_report
from lorafold.comparing.run import cell_digest, compare, measure_in_process
from lorafold.data.row_store import Rows, SourcePart
from lorafold.errors import LorafoldError
from lorafold.evaluation.intervals import loss_interval, ratio_interval
from lorafold.files.html_page import markdown_table
from lorafold.methods.lora import LoRA
from lorafold.recipe.recipe import Recipe
from lorafold.recipe.resolve_settings import ignored_note, spec_of, with_method
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
        keys.add(cell_digest(task, "lora"))
        pickle.dumps(task)  # methods are measured in processes of their own
    assert len(keys) == 3


def test_rows_reach_the_process_that_measures() -> None:
    """Also once their shapes are known, as those of held-out rows from a file are."""
    rows = as_rows(ROWS)
    assert rows.formats
    again = pickle.loads(pickle.dumps(rows))
    assert (again, again.formats, again.sha256) == (rows, rows.formats, rows.sha256)


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
    with pytest.raises(LorafoldError, match="lora: the process of this method ended unex"):
        measure_in_process(ends, "lora", 0)


def test_the_recipe_says_how_much_is_held_out_once(tiny_model_dir, tmp_path, monkeypatch) -> None:
    model, seen = tiny_model_dir("llama"), list[ComparisonTask]()

    def none(task: ComparisonTask, *_: Any) -> list[Any]:
        seen.append(task)
        raise LorafoldError("seen")

    monkeypatch.setattr("lorafold.comparing.run.compare", none)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS[:10])))
    for data, fraction, expected in ((ROWS[:10], 0.5, 5), (file, 0.5, 5), (file, 0.0, 1)):
        recipe = Recipe(steps=1, eval_fraction=fraction)
        with pytest.raises(LorafoldError, match="seen"):
            lf.compare(tmp_path, model=model, data=data, methods=["lora"], recipe=recipe)
        task = seen.pop()
        pickle.dumps(task)  # methods are measured in processes of their own
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
    assert with_method(recipe, "lora") == recipe
    dora = with_method(recipe, "dora")
    assert (dora.rank, dora.options) == (4, {"init": "gaussian"})
    assert with_method(recipe, "bitfit") == Recipe(steps=7, method="bitfit")


@pytest.mark.parametrize(("over", "dropout"), [("loha", None), ("lora", 0.1), (None, 0.1)])
def test_dora_takes_a_recipes_dropout_over_any_method(over: str | None, dropout: Any) -> None:
    recipe = Recipe(method="dora", dropout=0.1, options={} if over is None else {"over": over})
    assert getattr(spec_of(recipe).over, "dropout", None) == dropout
    assert with_method(recipe, "dora").dropout == dropout
    said = None if dropout else "dropout ignored: dora over loha has no such option"
    assert ignored_note(recipe) == said


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
        patch.setattr(run, "measure_in_process", never)
        assert compare(task, three, [0], tmp_path, tell) == rows
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "lr", 1e-9)
        other = run.cell_digest(task, "lora")  # other defaults, another row
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


PLAIN = Recipe(steps=2, batch=4, storage="fp32", max_length=64)


def named(methods: list[str], vary: dict[str, Any], recipe: Recipe = PLAIN) -> list[str]:
    return [str(one) for one in variants(recipe, methods, vary)]


def test_each_method_has_every_combination_of_the_settings_that_it_has() -> None:
    vary = {"rank": [8, 16], "lr": [1e-4, 2e-4]}
    assert named(["ia3", "lora"], vary) == [
        "ia3 lr=0.0001", "ia3 lr=0.0002", "lora rank=8 lr=0.0001", "lora rank=8 lr=0.0002",
        "lora rank=16 lr=0.0001", "lora rank=16 lr=0.0002",
    ]  # fmt: skip
    assert named(["lora", "dora"], {}) == ["lora", "dora"]


@pytest.mark.parametrize(
    ("method", "vary", "names"),
    [
        ("lora", {"options.init": ["kaiming", "gaussian"]},
         ["lora init=kaiming", "lora init=gaussian"]),
        ("lora", {"targets": ["all-linear", ["q_proj", "v_proj"]]},
         ["lora targets=all-linear", "lora targets=q_proj,v_proj"]),
        ("lora", {"rank_pattern.0.q_proj": [2], "alpha_pattern.0.q_proj": [4]},
         ["lora rank_pattern.0.q_proj=2 alpha_pattern.0.q_proj=4"]),
        ("lora", {"lr": [None, 1e-3]}, ["lora lr=None", "lora lr=0.001"]),
        ("lora", {"rank": [8, 8]}, ["lora rank=8"]),
        ("lora", {"lr": [0.0010000001, 0.0010000002]},
         ["lora lr=0.0010000001", "lora lr=0.0010000002"]),
        ("lora", {"lr": np.logspace(-4, -3, 2)}, ["lora lr=0.0001", "lora lr=0.001"]),
        ("lora", {"targets": ["😀"]}, ["lora targets=😀"]),
    ],
)  # fmt: skip
def test_names_say_what_varies(method: str, vary: dict[str, Any], names: list[str]) -> None:
    assert named([method], vary) == names


def test_epochs_vary_where_no_steps_are_set() -> None:
    recipe = PLAIN.model_copy(update={"steps": None})
    assert named(["lora"], {"epochs": ["auto", 2]}, recipe) == ["lora epochs=auto", "lora epochs=2"]
    with pytest.raises(LorafoldError, match="found epochs and steps"):
        variants(recipe, ["lora"], {"epochs": [1, 2], "steps": [3, 4]})


def test_what_a_method_has_one_choice_of_does_not_vary() -> None:
    assert named(["full", "lora"], {"storage": ["nf4", "fp32"]}) == [
        "full", "lora storage=nf4", "lora storage=fp32"
    ]  # fmt: skip
    bf16 = PLAIN.model_copy(update={"storage": "bf16"})
    assert named(["full"], {"storage": ["nf4", "fp32"]}, bf16) == ["full", "full storage=fp32"]
    assert named(["ia3", "lora"], {"rank": [None, 8]}) == ["ia3", "lora rank=None", "lora rank=8"]
    values = iter([4, 8])
    assert named(["lora", "dora"], {"rank": values}) == [
        "lora rank=4", "lora rank=8", "dora rank=4", "dora rank=8"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ({"seed": [1, 2]}, "vary: found seed, expected a field that changes training and not the"
         " evaluation: .*; use seeds"),
        ({"method": ["lora"]}, "; use methods"),
        ({"max_length": [64, 128]}, "vary: found max_length, expected a field that changes"),
        ({"objective_options.group": [2]}, "vary: found objective_options.group, expected"),
        ({"ranks": [2]}, "vary: found ranks, expected a field"),
        ({"rank": []}, r"vary: rank: found \[\], expected a list of values"),
        ({"targets": "q_proj"}, "vary: targets: found 'q_proj', expected a list of values"),
        ({"rank": 8}, "vary: rank: found 8, expected a list of values"),
        ({"epochs": [1, 2]}, "vary: found epochs and steps, .*use only one of them"),
        ({"rank": [4, 0]}, "vary: rank: found 0, expected greater"),
        ({"batch.size": [4]}, "vary: batch.size=4: found a dotted key"),
        ({"rank": [{1}]}, "vary: Object of type set .*, expected numbers, texts or lists"),
        ({"options.nosuch": [1]}, "vary: found options.nosuch, expected settings of the methods"),
        ({"rank": [4, 8]}, "vary: found rank, expected settings of the methods ia3"),
    ],
)  # fmt: skip
def test_what_can_not_vary_is_refused(vary: dict[str, Any], said: str) -> None:
    with pytest.raises(LorafoldError, match=said):
        variants(PLAIN, ["ia3"], vary)


def test_a_variant_is_the_recipe_with_its_settings() -> None:
    recipe = Recipe(options={"init": "gaussian"}, steps=7)
    one = Variant("lora", {"options.use_rslora": True, "targets": ("q_proj",)})
    assert one.of(recipe) == Recipe(
        options={"init": "gaussian", "use_rslora": True}, targets=("q_proj",), steps=7
    )
    assert Variant("lora").of(recipe) == recipe
    assert Variant("lora").of(recipe).model_fields_set == recipe.model_fields_set


def test_the_option_has_values_in_yaml() -> None:
    assert parse_vary(["rank=8,32", "lr=1e-4", "targets=all-linear,[q_proj, v_proj]"]) == {
        "rank": [8, 32], "lr": [1e-4], "targets": ["all-linear", ["q_proj", "v_proj"]]
    }  # fmt: skip
    for wrong in (["rank"], ["=3"], ["rank=4", "rank=8"]):
        with pytest.raises(LorafoldError, match="expected FIELD=VALUE,VALUE, each field once"):
            parse_vary(wrong)
    with pytest.raises(LorafoldError, match=r"--vary targets=\[q_proj: not YAML"):
        parse_vary(["targets=[q_proj"])


def test_a_bad_value_is_one_line_and_leaves_nothing(tiny_model_dir, tmp_path: Path) -> None:
    data = rows_file(tmp_path / "rows.jsonl", ROWS)
    asked = words(model=tiny_model_dir("llama"), data=data, methods="lora")
    done = lorafold("compare", *asked, "--vary", "rank=4,0", "--out", str(tmp_path / "out"))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "vary: rank: found 0" in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_settings_of_one_name_are_refused() -> None:
    both = {"targets": ["q_proj,v_proj", ["q_proj", "v_proj"]]}
    with pytest.raises(LorafoldError, match="found lora targets=q_proj,v_proj more than once"):
        variants(PLAIN, ["lora"], both)


def test_lines_that_differ_in_what_does_nothing_are_named() -> None:
    def line(method: str, loss: float, **settings: Any) -> Measurement:
        return Measurement(
            method, 0, loss=loss, row_losses=((loss, 2), (1.0, 3)), settings=settings
        )

    idle = [line("ia3", 2.0, lr_b=1e-3), line("ia3", 2.0, lr_b=1e-1)]
    found = [line("base", 3.0), *idle, line("lora", 1.0)]
    assert indistinct_methods(found) == [["ia3 lr_b=0.001", "ia3 lr_b=0.1"]]
    assert indistinct_methods([line("base", 3.0), line("lora", 1.0)]) == []
    rewarded = [Measurement(n, 0, reward=1.0, prompt_rewards=(1.0,)) for n in ("base", "lora")]
    assert indistinct_methods(rewarded) == []


def sweep(rows: int, seeds: int = 3, **figures: Any) -> list[Measurement]:
    """Two rates, of which 0.001 has the lower loss."""
    chance, found = np.random.default_rng(1), []
    for method, rate, loss in (("base", None, 3.0), ("lora", 1e-3, 1.0), ("lora", 2e-3, 1.1)):
        for seed in range(seeds):
            sums = tuple((loss * 4 + value, 4) for value in chance.normal(0, 0.01, rows).tolist())
            mean = sum(s for s, _ in sums) / (4 * rows)
            settings = {} if rate is None else {"lr": rate}
            found.append(Measurement(method, seed, loss=mean, row_losses=sums, settings=settings))
    return found


def test_the_best_setting_is_chosen_on_rows_that_it_is_not_reported_on(tmp_path: Path) -> None:
    whole = sweep(50)
    found = with_validation(whole)
    for one, before in zip(found, whole, strict=True):
        assert (len(one.row_losses), one.validation_rows) == (25, 25)
        left = [row for row in before.row_losses if row not in one.row_losses]
        assert one.validation == pytest.approx(sum(s for s, _ in left) / 100)
        assert one.loss == pytest.approx(sum(s for s, _ in one.row_losses) / 100)
        assert one.loss_interval == loss_interval(one.row_losses)
    # other validation rows choose another line, whatever the test rows say
    lucky = [
        replace(one, validation=0.5) if one.settings == {"lr": 2e-3} else one for one in found
    ]
    said = "; settings chosen on 25 validation rows: {}; the figures are for the 25 test rows"
    assert verdict(found).startswith("lowest held-out loss: lora lr=0.001, -2 (95%: ")
    assert verdict(found).endswith(said.format("lora lr=0.001"))
    assert verdict(lucky).startswith("no best method: lora lr=0.002 ")
    assert verdict(lucky).endswith(said.format("lora lr=0.002"))
    page(found, "Rates", tmp_path / "page.html")
    for text in (short_report(found), markdown(found), (tmp_path / "page.html").read_text()):
        assert said.format("lora lr=0.001") in " ".join(text.split())
    assert "| validation |" in markdown(found)
    one_seed = [one for one in found if one.seed == 0]
    assert verdict(one_seed).startswith("1 seed: no verdict (3 needed)")
    assert verdict(one_seed).endswith(said.format("lora lr=0.001"))


def test_too_few_rows_to_split_are_told() -> None:
    found = sweep(19)
    assert with_validation(found) == found
    assert verdict(found).endswith(
        "; settings chosen on the same 19 rows that are reported, so the figures are optimistic"
        " (20 rows are needed for separate validation rows): lora lr=0.001"
    )
    methods = [replace(one, method=one.name, settings={}) for one in sweep(50)]
    assert with_validation(methods) == methods  # nothing is swept
    assert "chosen" not in verdict(methods)


def test_rewards_of_a_sweep_are_of_other_prompts_too() -> None:
    rewards = tuple(n / 20 for n in range(20))
    lines = [Measurement("base", 0, reward=0.475, prompt_rewards=rewards)]
    lines += [replace(lines[0], method="lora", settings={"lr": rate}) for rate in (1e-3, 2e-3)]
    for one in with_validation(lines):
        assert (len(one.prompt_rewards), one.validation_rows, one.loss) == (10, 10, None)
        assert one.reward == pytest.approx(sum(one.prompt_rewards) / 10)
        assert (one.reward + (one.validation or 0)) / 2 == pytest.approx(0.475)
        assert one.reward_interval == ratio_interval([(r, 1) for r in one.prompt_rewards])


@pytest.mark.slow
def test_settings_are_measured_as_their_recipes_are_alone(tiny_model_dir, tmp_path) -> None:
    """Figures are kept by what they depend on, so one is found again whichever way it is asked."""
    how: dict[str, Any] = {"model": tiny_model_dir("llama"), "data": ROWS, "device": "cpu"}
    rates = PLAIN.model_copy(update={"lr": 1e-2})
    alone = lf.compare(tmp_path, methods=["lora"], recipe=rates, **how)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "rows").iterdir()}
    grid = lf.compare(tmp_path, methods=["lora"], vary={"lr": [1e-3, 1e-2]}, recipe=PLAIN, **how)
    assert [row.name for row in grid.rows] == ["base", "lora lr=0.001", "lora lr=0.01"]
    assert replace(grid.rows[2], settings={}) == alone.rows[1]
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    assert grid.over_base["lora lr=0.01"] == alone.over_base["lora"]
    assert grid.rows[1].loss != grid.rows[2].loss
    assert "lora lr=0.001" in str(grid)


def test_the_settings_are_in_what_figures_are_kept_by(tiny_model_dir) -> None:
    base = Base(tiny_model_dir("llama"), device="cpu")
    keys = {
        cell_digest(ComparisonTask(base, ROWS, ROWS[:4], "rows", one.of(PLAIN)), "lora")
        for one in variants(PLAIN, ["lora"], {"rank": [4, 8], "lr": [1e-3, 1e-2]})
    }
    assert len(keys) == 4


@pytest.mark.slow
def test_a_regular_expression_stands_in_names_as_it_is(tiny_model_dir, tmp_path) -> None:
    said = io.StringIO()
    found = lf.compare(
        tmp_path, model=tiny_model_dir("llama"), data=ROWS, device="cpu", methods=["lora", "ia3"],
        vary={"targets": [".*([qv]_proj|o_proj)"], "rank_pattern.[qv]_proj": [2]}, recipe=PLAIN,
        console=Console(file=said, width=200),
    )  # fmt: skip
    name = "lora targets=.*([qv]_proj|o_proj) rank_pattern.[qv]_proj=2"
    assert found.rows[1].name == name
    assert f"2/3 {name}: loss" in said.getvalue()
    assert "rank_pattern.[qv]_proj not varied: ia3 has no such setting" in said.getvalue()


def test_a_bar_ends_no_cell_of_a_table() -> None:
    assert markdown_table(["a"], [["q|v"]]).splitlines()[-1] == r"| q\|v |"
