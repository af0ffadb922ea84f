"""One import: every verb from `lf`, on names, paths, rows and loaded models, quiet unless asked."""

import inspect
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

import lorafold as lf
from command_cases import rows_file
from error_cases import refusal
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


def test_a_prompt_may_be_messages(model: str) -> None:
    loaded, user = lf.load_model(model, "fp32", "cpu"), {"role": "user", "content": "Book a table"}
    short = {"max_new_tokens": 4}
    text: str = lf.generate(loaded, "Book a table", system="Be brief.", **short)
    system = {"role": "system", "content": "Be brief."}
    assert lf.generate(loaded, [user], system="Be brief.", **short) == text
    assert lf.generate(loaded, [system, user], **short) == text
    assert lf.generate(loaded, [[system, user], "Hello"], **short)[0] == text
    for prompts, part in (
        ([{"role": "usr", "content": "Hi"}], "field prompt: found the role 'usr', expected user, "),
        ([user, {"role": "assistant", "content": "Yes"}], "found the role 'assistant', expected"),
        ([{"role": "user"}], "field prompt[0].content: found null, expected text"),
        ([None], "field prompt: found null, expected text"),
        (5, "field prompt: found 5, expected text"),
        ([[]], "field prompt: found an empty list"),
    ):
        assert part in refusal(lf.generate, loaded, prompts)
    said = "field system: found another system message in the conversation"
    assert said in refusal(lf.generate, loaded, [system, user], system="Be long.")


def state_of(model: Any) -> Any:
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [(type(m), m.training, sorted(vars(m))) for m in model.modules()]
    return tensors, modes, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("method", ["lora", "pissa", "bitfit", "prefix"])
def test_a_loaded_model_is_the_base_and_stays_as_it_is(
    method: str, model: str, tmp_path: Path
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    options = {"gradient_checkpointing": True, "method": method, "steps": 2}
    recipe = lf.Recipe(batch=2, max_length=64, **options)
    (tensors, *others), given = state_of(loaded), lf.load_tokenizer(model)
    loaded.config._name_or_path = "" if method == "bitfit" else model
    tokenizer = given if method == "bitfit" else None
    lf.train(recipe, data=ROWS, out=tmp_path / "a", model=loaded, tokenizer=tokenizer)
    after, *others_after = state_of(loaded)
    assert others_after == others
    assert all(torch.equal(tensors[name], t) for name, t in after.items())
    named = recipe.model_copy(update={"storage": "fp32"})
    lf.train(named, data=ROWS, out=tmp_path / "b", model=model)
    weights = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]
    a, b = (json.loads((tmp_path / n / "lorafold.json").read_text()) for n in "ab")
    assert (a["base"], a["trained_on"]) == (b["base"], b["trained_on"])
    assert "base_identity" not in a  # which is of files
    lf.load(loaded, tmp_path / "a").detach()
    again = {"data": ROWS, "out": tmp_path / "a", "tokenizer": tokenizer, "resume": True}
    lf.train(recipe, model=loaded, **again)
    loaded.lm_head.weight.data.mul_(2)
    assert "model has changed" in refusal(lf.train, recipe, model=loaded, **again)


def test_loaded_models_that_cant_be_the_base_are_refused(model: str, tmp_path: Path) -> None:
    loaded = lf.load_model(model, "fp32", "cpu")

    def said(recipe: lf.Recipe = RECIPE, model: Any = loaded, **given: Any) -> str:
        return refusal(lf.train, recipe, data=ROWS, out=tmp_path / "a", model=model, **given)

    assert "device: not supported for a model that is already loaded" in said(device="cpu")
    for changes in (
        {"storage": "bf16"}, {"method": "full"}, {"objective": "reward"}, {"strategy": "fsdp"},
    ):  # fmt: skip
        field, value = next(iter(changes.items()))
        pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
        rows = pairs if field == "objective" else ROWS
        recipe = RECIPE.model_copy(update=changes)
        line = refusal(lf.train, recipe, data=rows, out=tmp_path / "a", model=loaded)
        assert f"a loaded model can't be trained with {field} {value}; change this" in line
    assert "with dtype float16" in said(lf.Recipe(), loaded.half())
    loaded.float()
    for wrapped in (torch.compile(loaded), nn.DataParallel(loaded)):
        assert f"{type(wrapped).__name__}, expected a loaded model" in said(model=wrapped)
    lf.attach(loaded, lf.LoRA(), name="mine")
    assert "with adapters on it (mine)" in said()
    assert not (tmp_path / "a").exists()


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
        (lambda out: lf.train(data={"prompt": "a"}, out=out), "found a single row, expected"),
        (lambda out: lf.train(data=None, out=out), "data: found None, expected rows, a path or"),
        (lambda out: lf.train(data="x", out=out, lora_alpha=32, per_device_train_batch_size=2),
         "use alpha=32.0 of lf.Recipe; lf.train has no option per_device_train_batch_size; use ba"),
        (lambda out: lf.train(data="x", out=out, rank=8), "use rank=8 of lf.Recipe"),
        (lambda out: lf.train(train_dataset=ROWS, out=out), "use data=[{'prompt': 'Book a tab"),
        (lambda out: lf.train(data="x", out=out, processing_class=3), "use tokenizer=3"),
        (lambda out: lf.train(data=ROWS, out=out, model=3), "model: found builtins.int, expected"),
        (lambda out: lf.attach(None, lf.LoRA()), "model: found builtins.NoneType, expected a"),
        (lambda out: lf.attach(nn.Linear(2, 2), lf.LoRA), "spec: found <class 'lorafold.methods"),
        (lambda out: lf.attach(nn.Linear(2, 2), None), "spec: found None, expected a spec"),
        (lambda out: lf.generate("m", None), "prompts: missing"),
        (lambda out: lf.intrinsic(out, smallest=100, largest=120), "expected a power of 2 betw"),
        (lambda out: lf.estimate("m", device_memory="24"), "found 24, expected a size as in 24GB"),
        (lambda out: lf.generate("m", "x", adapter="a"), "did you mean adapters?"),
        (lambda out: lf.generate("m", "x", max_new_tokens="a"), "found 'a', expected an integer"),
        (lambda out: lf.generate("m", "x", temperature="hot"), "found 'hot', expected a number"),
        (lambda out: lf.generate("m", "x", system=3), "system: found 3, expected text or None"),
        (lambda out: lf.export("a", "peft", out, trust_remote_code=1), "1, expected True or False"),
        (lambda out: lf.train(data=ROWS, out=out, tokenizer="x"), "'x', expected a loaded token"),
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
