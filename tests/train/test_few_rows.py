"""epochs="auto": enough steps of few rows, ended by the held-out loss."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lorafold as lf
from conftest import unestimating
from lorafold.errors import LorafoldError
from lorafold.training.progress_display import Display
from process_cases import same_bytes
from training_cases import stopping
from typed_commands import run, write_rows

pytestmark = pytest.mark.usefixtures("unestimated")
WORDS = ("red", "blue", "green", "gold", "grey", "pink")
ROWS = [{"prompt": f"Say {word}", "completion": word} for word in WORDS]
# what is held out contradicts what is learned, so that its loss rises soon
OTHER = [{"prompt": row["prompt"], "completion": row["completion"][::-1]} for row in ROWS]
DATA: dict[str, Any] = {"data": ROWS, "eval_data": OTHER}
AUTO = {"epochs": "auto", "batch": 2, "max_length": 64, "storage": "fp32", "lr": 0.02, "lr_b": 0.05}


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "lorafold.json").read_text())


@pytest.fixture(scope="module")
def ended(tiny_model_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ended") / "out"
    with unestimating():
        lf.train(lf.Recipe(**AUTO), model=tiny_model_dir("llama"), out=out, **DATA)
    return out


def test_steps() -> None:
    recipe = lf.Recipe(epochs="auto", batch=4)
    assert [recipe.total_steps(n) for n in (3, 400, 401)] == [100, 100, 101]
    assert lf.Recipe(epochs="auto", steps=7).total_steps(3) == 7


def test_training_ends_where_the_held_out_loss_no_longer_falls(ended: Path) -> None:
    found = record(ended)
    evals = {int(step): loss for step, loss in found["evals"].items()}
    best = min(evals, key=evals.__getitem__)
    assert len(found["losses"]) == max(evals) == best + 30 < 100
    assert found["step"] == best
    assert not ended.with_name("out.best").exists()


def test_the_adapter_is_that_of_the_best_step(ended: Path, tiny_model_dir) -> None:
    found = record(ended)
    measured = lf.evaluate(tiny_model_dir("llama"), OTHER, adapters=ended, storage="fp32")
    assert measured.loss == pytest.approx(found["evals"][str(found["step"])], rel=1e-5)


def test_a_run_that_is_killed_ends_at_the_same_step(ended, tiny_model_dir, tmp_path) -> None:
    recipe, out, model = lf.Recipe(**AUTO), tmp_path / "out", tiny_model_dir("llama")
    with stopping(len(record(ended)["losses"]) - 5), pytest.raises(KeyboardInterrupt):
        lf.train(recipe, model=model, out=out, **DATA)
    lf.train(recipe, model=model, out=out, resume=True, **DATA)
    assert record(out)["losses"] == record(ended)["losses"]
    assert same_bytes(out, ended)


def test_figures_are_the_adapters_and_no_older_best_one_stays(tiny_model_dir, tmp_path) -> None:
    def pairs(rows: list[dict[str, str]], swap: bool) -> list[dict[str, str]]:
        sides = ("rejected", "chosen") if swap else ("chosen", "rejected")
        return [
            {"prompt": r["prompt"], sides[0]: r["completion"], sides[1]: "no"} for r in rows
        ]

    given: dict[str, Any] = {"model": tiny_model_dir("llama"), "out": tmp_path / "out"}
    given |= {"data": pairs(ROWS, False), "eval_data": pairs(ROWS, True)}  # which contradict
    asked = {k: v for k, v in AUTO.items() if k != "epochs"} | {"objective": "dpo"}
    lf.train(lf.Recipe(**asked, steps=20, save_every=5), **given)
    best = tmp_path / "out.best"
    assert record(best)["figures"] != record(tmp_path / "out")["figures"]
    found = lf.train(lf.Recipe(**asked), overwrite=True, **given)
    assert not best.exists()
    held_out = record(tmp_path / "out")["held_out"]
    at = held_out["step"].index(record(tmp_path / "out")["step"])
    assert at < len(held_out["step"]) - 1
    assert found.figures["preference_loss"] == pytest.approx(held_out["preference_loss"][at])


def test_a_finished_run_is_kept_under_what_it_was_ended_by(ended: Path, tiny_model_dir) -> None:
    given: dict[str, Any] = {"model": tiny_model_dir("llama"), "data": ROWS, "resume": True}
    again = lf.train(lf.Recipe(**AUTO), out=ended, eval_data=OTHER, **given)
    found = record(ended)
    assert again.eval_loss == found["evals"][str(found["step"])]
    with pytest.raises(LorafoldError, match="this run differs: eval_data has changed"):
        lf.train(lf.Recipe(**AUTO), out=ended, eval_data=ROWS, **given)
    with pytest.raises(LorafoldError, match="eval_every: was None, now 7"):
        lf.train(lf.Recipe(**AUTO, eval_every=7), out=ended, eval_data=OTHER, **given)


@pytest.mark.slow
def test_few_steps_are_told(tiny_model_dir, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "rows.jsonl", ROWS), tiny_model_dir("llama")
    asked = f"train --model {model} --data {data} --max-length 64 --out {tmp_path}"
    assert "steps: 1, which may be too few; " in run(f"{asked}/few --epochs 1").stdout
    assert "may be too few" not in run(f"{asked}/asked --steps 1").stdout
    said = run(f"{asked}/all --verbose").stderr
    assert "epochs auto: 100 steps, without early stopping" in said


ODD = "id,prompt,completion\n" + "".join(f'{n},"Say {w}","{w}"\n' for n, w in enumerate(WORDS[:4]))
ODD += '4,"Say red","red"\n5,"Say pink",""\n'
PAIRS = [{"prompt": f"Say {w}", "chosen": w, "rejected": f"{w}?"} for w in WORDS]
WAYS = {  # files of rows, and options
    "plain": ("rows.jsonl", ""),
    "odd": ("odd.csv", "--eval-fraction 0.3"),
    "pairs": ("pairs.jsonl", "--objective dpo"),
    "policy": (
        "prompts.jsonl",
        "--objective grpo --reward regex:e --objective-options group=2"
        " --objective-options max_new_tokens=4",
    ),
    "stack": ("rows.jsonl", "--over {over}"),
    "checked": ("rows.jsonl", "--eval-fraction 0.3 --epochs auto"),
}


def before_the_first_step(asked: str) -> list[str]:
    done = run(asked)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("step "))
    return lines[:first]


@pytest.mark.estimated
@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_says_little_before_its_first_step(way: str, tiny_model_dir, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    (tmp_path / "odd.csv").write_text(ODD)
    file, options = WAYS[way]
    model, over = tiny_model_dir("llama"), tmp_path / "over"
    if way == "stack":
        lf.train(lf.Recipe(steps=1, storage="fp32"), data=ROWS, model=model, out=over)
    asked = f"train --model {model} --data {tmp_path / file} --max-length 64"
    asked += f" --quantization fp32 --out {tmp_path / 'out'} " + options.format(over=over)
    asked += " --steps 2" * ("--epochs" not in options)
    lines = before_the_first_step(asked)
    assert len(lines) <= 6
    assert lines[0].startswith("lorafold ")
    text = "\n".join(lines)
    assert all(part in text for part in ("\ndata: ", "\nbase: ", "; steps: ", "\nmemory: "))
    if way == "odd":
        odd = ("ignored keys: id", "have an empty answer", "are identical to an earlier row")
        assert all(part in text for part in odd)
    details = record(tmp_path / "out")["details"]
    assert [line for line in details if line in text] == []
    assert [line for line in details if line.startswith("learning rate: ")] != []
    verbose = "\n".join(before_the_first_step(f"{asked} --overwrite --verbose"))
    assert [line for line in details if line not in verbose] == []
    assert record(tmp_path / "out")["details"] == details


def test_the_log_has_the_first_step_and_the_time_left(tiny_model_dir, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    asked = f"train --model {tiny_model_dir('llama')} --data {data} --max-length 64 --steps 40"
    lines = run(f"{asked} --out {tmp_path / 'out'}").stderr.splitlines()
    found = [match for line in lines if (match := re.match(r"step (\d+)/40: .*, (\S+) left", line))]
    assert [int(match[1]) for match in found] == [1, *range(4, 41, 4)]
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", match[2]) for match in found)
    assert found[-1][2] == "0:00:00"


def test_the_bar_has_the_time_left_on_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Display(console, 1000) as display:
        for step in (500, 501):
            display.step(step, 12.345, 123_456.0, {"gradient norm": 0.0001234}, 1e-4)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    [last] = re.findall(r"(\S+) +left loss 12", re.sub(r"\x1b\[[\d;?]*\w", "", shown))[-1:]
    assert re.fullmatch(r"\d+:\d\d(:\d\d)?", last)
