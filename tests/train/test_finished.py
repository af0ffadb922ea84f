"""A run that is resumed after it was finished, and what a run would write where, told before it."""

import json
from pathlib import Path

import pytest

from conftest import lorafold, refused
from typed_commands import write_rows

ROWS = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a in range(4) for b in (1, 2)]


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that resumes a run, which is finished."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    named = {"model": tiny_model_dir("llama"), "data": rows, "out": folder / "adapter", "steps": 2}
    command = ["train", *(part for k, v in named.items() for part in (f"--{k}", str(v)))]
    command += ["--batch", "2", "--storage", "fp32", "--resume", "--json"]
    assert lorafold(*command).returncode == 0
    return command


def files_of(run: list[str]) -> dict[str, bytes]:
    """The bytes of the adapter that the command wrote."""
    out = Path(run[run.index("--out") + 1])
    return {path.name: path.read_bytes() for path in out.iterdir()}


def with_other(run: list[str], option: str, value: str | Path) -> list[str]:
    """The command with another value of an option that it has."""
    at = run.index(option) + 1
    return [*run[:at], str(value), *run[at + 1 :]]


def test_a_finished_run_is_not_trained_again(run: list[str]) -> None:
    before = files_of(run)
    done = lorafold(*run)
    assert done.returncode == 0
    assert "\nnothing to resume: " in done.stderr
    assert done.stderr.count("\n") == 2
    record, found = json.loads(before["lorafold.json"]), json.loads(done.stdout)
    assert found["losses"] == record["losses"]
    assert found["steps"] == 2
    assert found["peak_bytes"] is found["seconds"] is found["trainable_parameters"] is None
    assert files_of(run) == before
    # what decides nothing that is learned
    assert lorafold(*run, "--save-every", "1").returncode == 0


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (["--rank", "3", "--seed", "5"], "rank: was None, now 3; seed: was 0, now 5; choose"),
        (["--data", "other"], "the rows have changed"),
        (["--model", "qwen2"], "the model has changed"),
        (["--init-adapter", "same"], "the adapter of --init-adapter has changed"),
    ],
)
def test_another_run_replaces_no_finished_one(run, other, told, tiny_model_dir, tmp_path) -> None:
    if other[0] == "--data":
        run = with_other(run, "--data", write_rows(tmp_path / "rows.jsonl", ROWS[:1]))
    elif other[0] == "--model":
        run = with_other(run, "--model", tiny_model_dir(other[1]))
    elif other[0] == "--init-adapter":
        run = [*run, "--init-adapter", run[run.index("--out") + 1]]
    else:
        run = [*run, *other]
    before = files_of(run)
    line = refused(*run)
    assert line.startswith("error: nothing to resume: ")
    assert told in line
    assert len(line.replace(run[run.index("--out") + 1], "")) < 300
    assert files_of(run) == before


def test_what_no_run_wrote_is_not_resumed(run: list[str], tmp_path: Path) -> None:
    adapter = run[run.index("--out") + 1]
    smaller = str(tmp_path / "smaller")
    model = run[run.index("--model") + 1]
    lorafold("resize", adapter, "--model", model, "--out", smaller, "--rank", "1")
    line = refused(*with_other(run, "--out", smaller))
    assert "found an adapter that was not written by a training run" in line


@pytest.mark.parametrize(
    ("name", "told"),
    [("tensorbord", "expected tensorboard"), ("aim", "aim is not installed; run pip install aim")],
)
@pytest.mark.parametrize("command", ["train", "compare", "intrinsic"])
def test_a_tracker_that_is_not_there_is_told_first(command, name: str, told: str, tmp_path) -> None:
    out = ["--out", str(tmp_path / "new"), "--data", "not-read.jsonl", "--trackers", name]
    assert f"error: trackers: {told}" in refused(command, *out).replace(f"found '{name}', ", "")


COMMANDS = {
    "train": ["--data", "ROWS"],
    "merge": ["--adapter", "ADAPTER"],
    "compose": ["ADAPTER", "ADAPTER"],
    "resize": ["ADAPTER", "--rank", "1"],
    "extract": ["--tuned", "TUNED", "--rank", "1"],
    "compare": ["--data", "ROWS"],
    "intrinsic": ["--data", "ROWS"],
    "fragility": ["ADAPTER", "--data", "ROWS", "--refuse", "ROWS", "--controls", "ROWS"],
    "quickstart": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_told_before_a_load(command, run, tmp_path) -> None:
    given = {"ADAPTER": run[run.index("--out") + 1], "ROWS": run[run.index("--data") + 1]}
    # no weights in it, so that a command that opened it would say so
    model = tmp_path / "model"
    model.mkdir()
    source = Path(run[run.index("--model") + 1])
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    (model / "model.safetensors").write_bytes(b"no weights")
    given["TUNED"] = str(model)
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    options = [given.get(one, one) for one in COMMANDS[command]]
    options += [] if command == "quickstart" else ["--model", str(model)]
    done = lorafold(command, *options, "--out", str(out))
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    place = out / "adapter" if command == "quickstart" else out
    assert line.startswith(f"error: {place} can't be written: {tmp_path / 'file'}: ")


@pytest.mark.parametrize("command", ["compare", "estimate", "inspect", "history", "fragility"])
def test_a_page_that_cannot_be_written_is_told_first(command: str, tmp_path: Path) -> None:
    needed = {"compare": ["--out", "x"], "fragility": ["x", "--refuse", "x", "--controls", "x"]}
    adapter = [] if command in ("estimate", *needed) else ["x"]
    page = str(tmp_path / "absent" / "page.html")
    line = refused(command, *adapter, *needed.get(command, []), "--html", page)
    assert f"{page} can't be written: " in line
    assert "absent is not a directory" in line
