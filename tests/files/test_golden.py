"""Files of an earlier version (`golden/README.md`) give the same output.

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
from lorafold.cli import app
from lorafold.files.record import current_names

pytestmark = pytest.mark.usefixtures("unestimated")

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(path.name for path in (GOLDEN / "adapters").iterdir())
MODELS = ["full", "merged"]
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IDS = [[1, 77, 42, 260, 298, 133]]
NEW_IDS = [[300, 77, 42, 301, 298, 301]]  # of an adapter with tokens of its own
# the commands of then
ON_BASE = ("--model", "base", "--device", "cpu")
COMPARE = (
    *("compare", *ON_BASE, "--data", "rows.jsonl", "--eval-data", "held.jsonl"),
    *("--methods", "lora,ia3", "--seeds", "2", "--out", "comparison"),
    *("--set", "base=fp32", "--set", "steps=4", "--set", "batch=4", "--set", "max_length=64"),
)
SEARCH = (
    *("intrinsic", *ON_BASE, "--data", "rows.jsonl", "--eval-data", "held.jsonl"),
    *("--smallest", "8", "--largest", "64", "--share", "0.004", "--out", "search"),
    *("--set", "steps=6", "--set", "batch=4", "--set", "max_length=64", "--set", "lr=3e-2"),
)
EVALUATED = {  # the data, the model and the adapter
    "tokens": ("chats", "base", "tokens"), "classifier": ("labels", "base", "classifier"),
    "linear-probe": ("labels", "base", "linear-probe"), "full": ("rows", "full", None),
    "merged": ("rows", "merged", None),
}  # fmt: skip


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
    data, model, adapter = EVALUATED[name]
    of = ("--adapter", f"adapters/{adapter}") if adapter else ()
    how = ("--storage", "fp32", "--device", "cpu", "--no-completions")
    done = lorafold("eval", "--model", model, *of, "--data", f"{data}.jsonl", *how)
    loss = found(done)["loss"]
    assert loss == pytest.approx(read("expected.json")[name], rel=1e-4)


@pytest.mark.slow
def test_rows_of_a_comparison_whose_names_knew_less_are_measured_anew() -> None:
    kept, files = read("comparison", "rows.json")["rows"], set(Path("comparison").rglob("*"))
    base, *rows = found(lorafold(*COMPARE))["rows"]
    assert base["method"] == "base"
    same = ("method", "seed", "trainable_parameters", "mergeable")
    assert [[row[k] for k in same] for row in rows] == [[row[k] for k in same] for row in kept]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in kept], rel=1e-4)
    assert len(set(Path("comparison").rglob("*")) - files) == len(rows) + 1  # the base


def test_a_search_that_does_not_know_its_model_is_refused() -> None:
    done = CliRunner().invoke(app, [*SEARCH, "--json"])
    assert "search: found a search of an earlier lorafold" in str(done.exception)


def test_a_recipe_has_the_values_that_were_written() -> None:
    written = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))
    run = ("--data", "rows.jsonl", "--config", "recipe.yaml", "--set", "steps=1")
    lorafold("train", *ON_BASE, *run, "--out", "fresh")
    recipe = read("fresh", "lorafold.json")["recipe"]
    now = current_names(written)
    assert {k: recipe[k] for k in now} == now | {"steps": 1}
