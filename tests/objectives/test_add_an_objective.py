"""A new objective is one file and one row of OBJECTIVES: one whose examples depend on the weights,
and an algorithm over pairs, which no other file names.
"""

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lorafold as lf
from conftest import make_tokenizer
from interrupted_runs import interrupted
from lorafold.cli import app
from lorafold.data.batches import StoredFeed
from lorafold.data.formats import CONVERSATIONS, PAIRS
from lorafold.data.row_store import SourcePart
from lorafold.errors import LorafoldError
from lorafold.memory.preflight import largest_batch
from lorafold.memory.trace import MemorySetting, trace
from lorafold.models.quantizations import Storage
from lorafold.models.sources import read_configuration
from lorafold.objectives import OBJECTIVES, Declared
from lorafold.objectives.objective import examples_of
from lorafold.resolve import Base
from lorafold.training import loop
from lorafold.training.inputs import RunRequest
from lorafold.training.preview import show
from lorafold.training.run import train
from process_cases import same_bytes

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(12)]
CHOICES = [
    {"prompt": f"Book a table for {n}", "chosen": f"yes {n}", "rejected": f"no {n} {n}"}
    for n in range(8)
]
TEXTS = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]

HARDEST = '''"""Hardest: of the rows of a step, those that the model finds hardest as it is then."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from statistics import fmean

import torch

from lorafold.core.contexts import evaluating
from lorafold.data.examples import CompletionEncoder
from lorafold.data.examples import WHOLE, encoded, preview
from lorafold.errors import LorafoldError
from lorafold.evaluation import Measured
from lorafold.objectives.objective import Objective, given_options
from lorafold.training_step.packed_attention import packed
from lorafold.training_step.losses import CompletionLoss


@dataclass(frozen=True)
class Hardest(Objective):
    """The share of rows with the greatest mean loss."""

    share: float = 0.5

    @classmethod
    def of(cls, asked):
        given = given_options(asked.beta, asked.options)
        if strange := ", ".join(given.keys() - {"share"}):
            raise LorafoldError(f"{strange}: the objective {asked.name} has no such option")
        return cls(**given)

    @classmethod
    def options(cls, declared):
        return {"share": cls.share}

    def encoder(self, tokenizer, rendering=WHOLE):
        return CompletionEncoder(tokenizer, rendering)

    def data(self, table, rows, max_length):
        return encoded(table, rows, max_length)

    def preview(self, example, tokenizer):
        return preview(example, tokenizer)

    @contextmanager
    def loss(self, model, tokenizer, packing, console):
        with packed(model) as apart:
            yield CompletionLoss(model, packing and apart, tokenizer.pad_token_id or 0)

    def means(self, examples, loss):
        alone = CompletionLoss(loss.model, False, loss.pad_id)
        with evaluating(alone):
            found = alone.by_row(examples).tolist()
        return [x / alone.count(e) for x, e in zip(found, examples, strict=True)]

    def examples(self, step, planned, loss):
        means = self.means(planned, loss)
        kept = sorted(range(len(planned)), key=lambda i: -means[i])
        return [planned[i] for i in sorted(kept[: ceil(self.share * len(planned))])]

    def traced(self, model, inputs, labelled):
        once = super().traced(model, inputs, labelled)
        return once + super().traced(model, inputs, labelled)  # as if both passes were kept

    def record(self):
        return {"hardest": self.share}

    def measure(self, loss, held_out):
        means = self.means(list(held_out.examples), loss)
        return Measured(fmean(means), {"hardest": max(means)}, f", hardest {max(means):.2f}")
'''

SQUARED = '''"""Squared: the truncated quadratic of Tang et al. 2024 (arXiv 2402.05749).

    loss = max(0, 1 - beta d)^2,      d = r(w) - r(l)
"""

from pydantic.dataclasses import dataclass

from lorafold.training_step.preference_algorithms import STRICT, Law, Positive


@dataclass(frozen=True, config=STRICT)
class Squared(Law):
    """The square of the hinge."""

    beta: Positive = 0.2

    def loss(self, scored):
        return (1 - self.beta * (scored.ratios[:, 0] - scored.ratios[:, 1])).relu().square()

    def rewards(self, scored):
        return self.beta * scored.ratios
'''


def written(name: str, text: str, at: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = at / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hardest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = written("hardest_objective", HARDEST, tmp_path, monkeypatch)
    row = Declared(module.Hardest, "learn the hardest completions", CONVERSATIONS, keys=("id",))
    monkeypatch.setitem(OBJECTIVES, "hardest", row)
    return module.Hardest


@pytest.fixture
def squared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = written("squared_objective", SQUARED, tmp_path, monkeypatch)
    row = Declared("preference.Preference", "prefer", PAIRS, law=module.Squared)
    monkeypatch.setitem(OBJECTIVES, "squared", row)
    return module.Squared


def request(model: Path, out: Path, objective: str, rows: list[dict], **fields: Any) -> RunRequest:
    given = {"batch": 4, "steps": 4, "rank": 2, "lr": 1e-2, "storage": "fp32", "save_every": 2}
    recipe = lf.Recipe(**(given | {"objective": objective} | fields))
    return RunRequest(Base(model, device="cpu"), out, recipe, rows, "rows", eval_rows=rows)


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "lorafold.json").read_text())


def test_its_examples_are_those_of_the_weights(hardest, tiny_model) -> None:
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    objective = hardest(share=0.25)
    planned_ = list(examples_of(objective, ROWS[:8], tokenizer, 64).examples)
    with objective.loss(model, tokenizer, True, Console(quiet=True)) as loss:
        means = objective.means(planned_, loss)
        found = objective.examples(0, planned_, loss)
        assert found == [e for e, m in zip(planned_, means, strict=True) if m in sorted(means)[-2:]]
        with torch.no_grad():
            model.get_output_embeddings().weight.neg_()
        assert objective.examples(1, planned_, loss) != found


def test_it_trains_resumes_and_is_measured_from_python(
    hardest, tiny_model_dir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, model = io.StringIO(), tiny_model_dir("llama")
    asked = request(model, tmp_path / "a", "hardest", ROWS, objective_options={"share": 0.5})
    sizes, one = list[int](), loop.train_step

    def counted(job: Any, examples: Any, step: int) -> float:
        sizes.append(len(examples))
        return one(job, examples, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", counted)
        done = train(asked, Console(file=said, width=200))
    assert sizes == [2, 2, 2, 2]
    assert done.losses[-1] < done.losses[0]
    assert "memory: " in said.getvalue()
    assert "no estimate" not in said.getvalue()
    assert done.figures["hardest"] >= (done.eval_loss or 0)
    assert record(tmp_path / "a")["hardest"] == 0.5
    assert record(tmp_path / "a")["recipe"]["objective"] == "hardest"
    again = replace(asked, out=tmp_path / "b")
    with interrupted(3):
        train(again, Console(quiet=True))
    train(replace(again, resume=True), Console(quiet=True))
    assert same_bytes(tmp_path / "a", tmp_path / "b")


def test_what_it_does_not_take_is_refused(hardest, tiny_model_dir, tmp_path: Path) -> None:
    model, out, quiet = tiny_model_dir("llama"), tmp_path / "a", Console(quiet=True)
    with pytest.raises(LorafoldError, match="beta: the objective hardest has no such option"):
        train(request(model, out, "hardest", ROWS, beta=0.1), quiet)
    told = r"rows of \{text, label\}, which are for --objective classify; --objective hardest"
    with pytest.raises(LorafoldError, match=told):
        train(request(model, out, "hardest", TEXTS), quiet)
    with pytest.raises(LorafoldError, match="streaming: requires the objective sft"):
        lf.Recipe(objective="hardest", streaming=True, steps=1)
    with pytest.raises(LorafoldError, match="objective: found hardest, expected one that this"):
        lf.compare(out, model=model, data=ROWS, recipe=lf.Recipe(objective="hardest"))


def test_its_rows_are_shown_and_its_memory_estimated(hardest, tiny_model_dir, tmp_path) -> None:
    said, model = io.StringIO(), tiny_model_dir("llama")
    asked = request(model, tmp_path / "a", "hardest", ROWS)
    show(asked, Console(file=said, width=200), rows=1)
    assert '⟦{"people": 0}' in said.getvalue()
    example = SimpleNamespace(ids=range(32), labels=range(32))
    feed = StoredFeed([example] * 4, [SourcePart(4)], 4, 1, 0)
    setting = MemorySetting(Storage(torch.float32), lf.LoRA(rank=2))
    config = read_configuration(str(model))
    own = trace(config, largest_batch(asked.recipe, feed, hardest(), setting), 2)
    plain = trace(config, largest_batch(asked.recipe, feed, OBJECTIVES["sft"].kind(), setting), 2)
    assert own.activations > 1.5 * plain.activations  # its loss is another
    assert own.weights == plain.weights


def command(*arguments: object) -> dict[str, Any]:
    given = [*map(str, arguments), "--json"]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("objective", "rows"), [("hardest", ROWS), ("squared", CHOICES)], ids=str
)
def test_it_trains_resumes_and_is_evaluated_by_the_command(
    objective: str, rows: list[dict], hardest, squared, tiny_model_dir, tmp_path: Path
) -> None:
    data, model, out = tmp_path / "rows.jsonl", tiny_model_dir("llama"), tmp_path / "a"
    data.write_text("".join(json.dumps(row | {"id": 1}) + "\n" for row in rows))
    options = ("--base", "fp32", "--steps", 4, "--lr", 0.02, "--batch", 4, "--device", "cpu")
    asked = ("--model", model, "--data", data, "--out", out, "--objective", objective, *options)
    done = command("train", *asked, "--eval-data", data, "--resume")
    assert done["figures"] if objective == "squared" else done["figures"]["hardest"] > 0
    found = command("eval", "--model", model, "--data", data, "--adapter", out, "--base", "fp32")
    assert found["loss"] > 0
    if objective == "squared":  # rewards are those of its own law
        own = done["figures"]["preference_loss"]
        assert found["preference_loss"] == pytest.approx(own, rel=1e-3)
        assert OBJECTIVES["squared"].options() == {"beta": 0.2}
        with pytest.raises(LorafoldError, match=r"gamma: the objective squared has no such option"):
            train(request(model, tmp_path / "b", "squared", rows, objective_options={"gamma": 1}),
                  Console(quiet=True))  # fmt: skip
