"""Files of earlier versions, which `golden/make.py` wrote, give the same output.

Numbers are compared to 1e-4, in fp32: other processors round otherwise.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

import lorafold as lf
from golden.make import COMPARE, EVALUATED, IDS, NEW_IDS, RUNS, SEARCH, evaluation
from lorafold.cli import app
from lorafold.files.record import named_as_now

pytestmark = pytest.mark.usefixtures("unestimated")

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(path.name for path in (GOLDEN / "adapters").iterdir())
MODELS = ["full", "merged"]
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy of the golden set: its records have names that are relative to it."""
    monkeypatch.chdir(shutil.copytree(GOLDEN, tmp_path / "golden"))


def lorafold(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)


def found(done: Result) -> dict[str, Any]:
    """The object that a command printed."""
    return json.loads(done.stdout.splitlines()[-1])


def read(*path: str) -> dict[str, Any]:
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def base_of(adapter: str) -> Any:
    classes = read("adapters", adapter, "lorafold.json").get("classes")
    if classes is None:
        return AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    return AutoModelForSequenceClassification.from_pretrained(
        "base", dtype=torch.float32, num_labels=len(classes)
    ).eval()


@torch.no_grad()
def logits(model: Any, ids: list[list[int]] = IDS) -> torch.Tensor:
    return model(torch.tensor(ids), use_cache=False).logits


def test_every_golden_file_is_expected_of_something() -> None:
    assert sorted(EXPECTED) == sorted([*ADAPTERS, *MODELS])
    assert sorted(read("expected.json")) == sorted(EVALUATED)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_logits_that_it_gave_and_is_written_as_it_was(name: str) -> None:
    model, path = base_of(name), Path("adapters", name)
    adapter = lf.load(model, path)
    ids = NEW_IDS if adapter.tokens else IDS
    assert_close(logits(model, ids), EXPECTED[name], **CLOSE)
    again = adapter.save("again")
    config, written = read("again", "adapter_config.json"), read(str(path), "adapter_config.json")
    written.pop("prompt_tuning_init", None)  # what it was at start, which is past
    assert {k: config[k] for k in written} == written
    tensors, stored = (load_file(at / "adapter_model.safetensors") for at in (again, path))
    assert_close(tensors, stored, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_logits_that_it_gave(name: str) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    assert_close(logits(model.eval()), EXPECTED[name], **CLOSE)


@pytest.mark.parametrize("name", EVALUATED)
def test_the_command_finds_the_loss_that_it_found(name: str) -> None:
    data, of = EVALUATED[name]
    loss = found(lorafold(*evaluation(data, of)))["loss"]
    assert loss == pytest.approx(read("expected.json")[name], rel=1e-4)


@pytest.mark.slow
def test_rows_of_a_comparison_whose_names_knew_less_are_measured_anew() -> None:
    kept, files = read("comparison", "rows.json")["rows"], set(Path("comparison").rglob("*"))
    rows = found(lorafold(*COMPARE))["rows"]
    same = ("method", "seed", "trainable_parameters", "mergeable")
    assert [[row[k] for k in same] for row in rows] == [[row[k] for k in same] for row in kept]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in kept], rel=1e-4)
    assert len(set(Path("comparison").rglob("*")) - files) == len(rows)


def test_a_search_that_does_not_know_its_model_is_refused() -> None:
    done = CliRunner().invoke(app, [*SEARCH, "--json"])
    assert "search: found a search of an earlier lorafold" in str(done.exception)


def test_a_recipe_has_the_values_that_were_written() -> None:
    written = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))
    lorafold("train", *RUNS["lora"], "--set", "steps=1", "--out", "fresh")
    recipe = read("fresh", "lorafold.json")["recipe"]
    now = named_as_now(written)
    assert {k: recipe[k] for k in now} == now | {"steps": 1}
