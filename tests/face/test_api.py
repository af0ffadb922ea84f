"""One import: every verb from `lf`, on names, paths, rows and loaded models, quiet unless asked."""

import inspect
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lorafold as lf
from command_cases import rows_file
from lorafold.api.compose import rows_by_task
from lorafold.data.row_sources import AS_IS

pytestmark = pytest.mark.usefixtures("unestimated")

ROWS = [{"prompt": f"Book a table for {i}", "completion": f' {{"people": {i}}}'} for i in range(12)]
RECIPE = lf.Recipe(steps=2, batch=2, storage="fp32", max_length=64)
SIGNATURES = Path(__file__).with_name("signatures.toml")


def shown(function: object) -> str:
    """The names of the parameters, the first one that is keyword-only after a star."""
    names, starred = [], False
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        star = parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL) and not starred
        starred = starred or star
        names.append("*" * star + parameter.name)
    return " ".join(names)


def test_signatures_are_pinned() -> None:
    verbs = {name for name in lf.__all__ if name.islower()}
    pinned = tomllib.loads(SIGNATURES.read_text(encoding="utf-8"))
    assert {name: shown(getattr(lf, name)) for name in sorted(verbs)} == pinned


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("api") / "adapter"
    result = lf.train(RECIPE, data=ROWS, out=out, model=model, eval_data=ROWS[:4])
    assert result.steps == 2
    assert result.eval_loss is not None
    assert Path(result.adapter) == out
    record = json.loads((out / "lorafold.json").read_text())
    assert record["data"]["source"] == "rows given in Python"
    return out


def test_a_run_from_rows_is_that_from_their_file(model: str, adapter: Path, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "rows.jsonl", ROWS)
    lf.train(RECIPE, data=file, out=tmp_path / "a", model=model, eval_data=ROWS[:4])
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (adapter / name).read_bytes()


def test_names_and_loaded_models_measure_alike(model: str, adapter: Path) -> None:
    named = lf.evaluate(model, ROWS, adapters=adapter, storage="fp32", completions=False)
    loaded = lf.load_model(model, "fp32", "cpu")
    bare = lf.evaluate(loaded, ROWS, completions=False)
    lf.load(loaded, adapter)
    assert lf.evaluate(loaded, ROWS, completions=False) == named
    assert bare.loss != named.loss
    with pytest.raises(lf.LorafoldError, match=r"adapters: not supported for a model"):
        lf.evaluate(loaded, ROWS, adapters=[adapter])


def test_what_a_loaded_model_leaves_without_effect_is_refused(model: str, adapter: Path) -> None:
    loaded = lf.load_model(model, "fp32", "cpu")
    for given in (
        {"storage": "fp32"}, {"device": "cpu"}, {"revision": "main"}, {"allow_other_base": True},
        {"adapters": adapter, "storage": "nf4", "device": "cpu"},
    ):  # fmt: skip
        told = f"^{', '.join(given)}: not supported for a model"
        with pytest.raises(lf.LorafoldError, match=told):
            lf.evaluate(loaded, ROWS, **given)
        with pytest.raises(lf.LorafoldError, match=told):
            lf.generate(loaded, "Hello", **given)


def test_a_prompt_gives_a_text_and_a_list_a_list(model: str, adapter: Path) -> None:
    loaded, tokenizer = lf.load_model(model, "fp32", "cpu"), lf.load_tokenizer(model)
    one = lf.generate(loaded, "Book a table", tokenizer=tokenizer, max_new_tokens=4)
    assert isinstance(one, str)
    assert lf.generate(loaded, ["Book a table", "Hello"], max_new_tokens=4)[0] == one
    drawn = [
        lf.generate(loaded, ["Book a table"], max_new_tokens=8, temperature=5.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    adapted = lf.generate(model, "Book a table", adapters=adapter, storage="fp32", max_new_tokens=4)
    lf.load(loaded, adapter)
    assert adapted == lf.generate(loaded, "Book a table", max_new_tokens=4)


def test_merged_inspected_composed(model: str, adapter: Path, tmp_path: Path) -> None:
    merged = lf.merge(model, adapter, tmp_path / "merged", certificate=False)
    assert merged.adapters == (str(adapter),)
    found = lf.inspect(adapter, model, data=ROWS, rows=4, storage="fp32")
    assert set(found.as_json()) >= {"sites", "whole", "advice", "paths"}
    assert str(found) == "\n".join(found.advice)
    both = lf.compose([adapter, adapter], tmp_path / "both", model=model)
    assert both.composed["linear"].weights == (0.5, 0.5)
    same = lf.evaluate(model, ROWS, adapters=tmp_path / "both", storage="fp32", completions=False)
    alone = lf.evaluate(model, ROWS, adapters=adapter, storage="fp32", completions=False)
    assert same.loss == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.slow
def test_an_estimate_is_the_command_s(model: str) -> None:
    found = lf.estimate(model, "lora", max_length=64, device_memory="1GB")
    assert sum(found.terms.values()) == found.total
    assert found.advice is not None
    assert found.advice.fits
    assert "fits, with" in str(found)
    wider = lf.estimate(model, "lora", max_length=64, recipe=lf.Recipe(rank=64))
    assert wider.terms["adapter"] == 4 * found.terms["adapter"]
    with pytest.raises(lf.LorafoldError, match=r"found --params 7b and --model .*expected only"):
        lf.estimate(model, params="7b")


@pytest.mark.slow
def test_a_comparison_of_two(model: str, tmp_path: Path) -> None:
    given = {"recipe": RECIPE.model_copy(update={"steps": 1}), "methods": ["lora", "bitfit"]}
    found = lf.compare(tmp_path / "c", model=model, data=ROWS, **given)
    assert [row.method for row in found.rows] == ["base", "lora", "bitfit"]
    assert (tmp_path / "c" / "table.md").read_text() == str(found)


@pytest.mark.estimated
def test_quiet_unless_given_a_console(model: str, tmp_path: Path, capfd) -> None:
    lf.train(RECIPE, data=ROWS, out=tmp_path / "quiet", model=model)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    told = io.StringIO()
    lf.train(RECIPE, data=ROWS, out=tmp_path / "loud", model=model, console=Console(file=told))
    assert "data: 12 rows" in told.getvalue()


def test_compose_names_the_keys_that_it_ignores() -> None:
    told = io.StringIO()
    rows = [{"text": "a", "id": 1}]
    assert rows_by_task({"task": rows}, AS_IS, Console(file=told, width=200)) == {"task": rows}
    assert told.getvalue() == "rows given in Python: ignored keys: id (rows of {text})\n"


def test_bad_rows_are_told_by_number() -> None:
    with pytest.raises(lf.LorafoldError, match=r"rows given in Python: row 2: keys found: 'x'"):
        lf.evaluate("smollm2", [{"text": "a"}, {"x": 1}])


WRONG = {
    "model": [3, ["smollm2"]],
    "adapters": [3, None, [3], b"adapter"],
    "out": [3, b"out", ["out"]],
    "to": [3, ["peft"]],
    "prompts": [3, [{"prompt": "Hello"}]],
    "engine_python": [3, ["python"]],
    "engine_url": [3, ["http://localhost:8000"]],
    "device": [3],
    "console": [3, "x", True],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_type_is_one_line(name: str, model: str, tmp_path: Path) -> None:
    for value in WRONG[name]:
        given = {"model": model, "adapters": [], "out": tmp_path / "out", "to": "gguf-model"}
        wrong = {**given, "prove": False, name: value}
        with pytest.raises(lf.LorafoldError, match=rf"{name}: found .*, expected ") as refused:
            lf.export(**wrong)
        assert len(str(refused.value)) < 300
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: lf.resize("a", out, rank=0), "rank: found 0, expected 1 or more"),
        (lambda out: lf.merge(None, "a", out=out, rounding="up"), "rounding: found 'up', expected"),
        (lambda out: lf.compare(out, seeds=0), "seeds: found 0, expected 1 or more"),
        (lambda out: lf.intrinsic(out, share=1.5), "share: found 1.5, expected 0 to 1"),
        (lambda out: lf.train(data="x", out=out, learning_rate=3), "lf.train has no option learn"),
        (lambda out: lf.train(data={"prompt": ["a"]}, out=out), "data: found a dict, expected"),
        (lambda out: lf.estimate("m", device_memory="24"), "found 24, expected a size as in 24GB"),
        (lambda out: lf.generate("m", "x", adapter="a"), "did you mean adapters?"),
        (lambda out: lf.load_model("m", quantize="nf4"), "lf.load_model has no option quantize"),
        (lambda out: lf.compose("a", out, learning=lf.Learning(evaluations=0)),
         "evaluations: found 0, expected 1 or more"),
    ],
)  # fmt: skip
def test_python_refuses_what_the_command_refuses(call: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(lf.LorafoldError, match=re.escape(message)):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_run_will_see_is_shown_in_python_too(model: str, tmp_path: Path) -> None:
    said, page = io.StringIO(), tmp_path / "rows.html"
    recipe = RECIPE.model_copy(update={"method": "ia3", "rank": 4})
    found = lf.preview(recipe, data=ROWS, model=model, html=page, console=Console(file=said))
    assert found.rows == len(ROWS)
    assert "rank ignored: ia3 has no such option\n" in said.getvalue()
    assert "Book a table for 0" in said.getvalue()
    assert "Book a table for 0" in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.html"]
