"""The command's frame: quick help, one line for what the user can put right, and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorafold as lf
from conftest import lorafold, refused
from lorafold.cli import COMMANDS, GROUPS
from lorafold.cli.cluster import without_cluster_options, worker_resources
from lorafold.cli.commands import emit

HEAVY = {
    "torch", "transformers", "datasets", "accelerate", "bitsandbytes", "safetensors",
    "huggingface_hub",
}  # fmt: skip


def test_help_lists_every_command_and_loads_nothing_that_takes_long():
    script = """
import sys
from lorafold.cli import main
sys.argv = ["lorafold", "--help"]
try:
    main()
except SystemExit as end:
    heavy = {"torch", "transformers", "datasets", "pydantic", "matplotlib"} & set(sys.modules)
    print(end.code, sorted(heavy), file=sys.stderr)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stderr == "0 []\n"
    lab = lorafold("lab").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in (lab if name in GROUPS["Lab"] else told.stdout)
    for asked in ([], ["--help"], ["-h"]):
        assert lorafold(*asked) == (0, told.stdout, "")


def test_windows_is_refused_in_one_line(monkeypatch):
    lorafold("--version")  # which imports for the real platform
    monkeypatch.setattr(sys, "platform", "win32")
    line = "lorafold runs on Linux and macOS; on Windows, install it in WSL 2"
    assert lorafold("--version") == (2, "", f"error: {line}\n")
    with pytest.raises(lf.LorafoldError, match=line):
        lf.train  # noqa: B018


def test_neither_help_nor_what_is_wrong_with_rows_imports_anything_heavy():
    code = f"""
import sys
from lorafold.cli import COMMANDS, main
wrong = "train --data none.csv --out none".split()
asked = [*([name, "--help"] for name in COMMANDS), wrong, [*wrong, "--chat-template", "none.jinja"]]
for name, *options in asked:
    sys.argv = ["lorafold", name, *options]
    try:
        main()
    except SystemExit as done:
        print(name, sorted({HEAVY!r} & set(sys.modules)), done.code, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: lorafold") == len(COMMANDS)
    helped, wrong = [f"{name} [] 0" for name in COMMANDS], "error: none.csv: there is no such file"
    first = f"lorafold {lf.__version__}: reading none.csv; the adapter will be in none"
    found = done.stderr.splitlines()
    assert found[: len(helped) + 3] == [*helped, first, wrong, "train [] 2"]
    assert found[-2].startswith("error: chat template none.jinja: can't be read: ")
    assert found[-1] == "train [] 2"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_what_each_option_means(name):
    import typer

    from lorafold.cli import load_command

    command = load_command(name)
    assert command.help
    assert isinstance(command, typer.core.TyperCommand | typer.core.TyperGroup)
    assert [parameter.name for parameter in command.params if not parameter.help] == []


def test_the_version_is_the_package_s():
    from importlib.metadata import version

    assert lorafold("--version").stdout == f"lorafold {version('lorafold')}\n"


def test_what_the_system_refuses_is_one_line(tmp_path):
    locked = tmp_path / "rows.jsonl"
    locked.mkdir()
    assert "rows.jsonl" in refused("train", "--data", str(locked), "--out", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_finds_no_room_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lorafold", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr.splitlines()[0] == "error: No space left on device"
    assert done.returncode == 2


def open_once_read(fifo: Path, reader: subprocess.Popen) -> int:
    """A descriptor that keeps `reader` waiting for lines, once it reads the pipe."""
    while reader.poll() is None:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.05)
    pytest.fail(f"ended before it read: {reader.communicate()}")


def started(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lorafold", *map(str, words)], stderr=subprocess.PIPE, text=True,
        # where the tests run in the background it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
    )  # fmt: skip


STOPPED = {130, -signal.SIGINT}  # the second where it comes while Python runs generated code


@pytest.mark.few(1)
@pytest.mark.parametrize("imported", ["lorafold/methods", "typer/main", "torch/nn", "transformers"])
def test_ctrl_c_is_one_line_during_imports(imported: str, tmp_path: Path) -> None:
    """The signal comes while a module is imported, of all processes the first that imports it."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, signal, sys

class Presses:
    def find_spec(self, name, *_):
        if name.startswith({imported.replace("/", ".")!r}):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Presses())
""")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        child = started("train", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    _, told = child.communicate(timeout=100)
    assert child.returncode in STOPPED
    first, last = ([], *told.splitlines())[-2:]
    assert last == "interrupted by Ctrl-C"
    assert not first or first.startswith("lorafold ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 4, 8, 16, 24])
def test_ctrl_c_at_any_time_is_one_line(seconds: float, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    child = started(
        "train", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--steps", 10_000
    )
    time.sleep(seconds)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does, to all processes
    _, told = child.communicate(timeout=100)
    assert child.returncode in STOPPED
    assert "Traceback" not in told
    assert "Exception" not in told
    last = told.splitlines()[-1]
    assert last == "interrupted by Ctrl-C" or last.startswith("stopped after step ")


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    """It is flushed at once: a reader has it while torch's import waits."""
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(1000)\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        child = started("train", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    line = child.stderr.readline()
    child.kill()
    child.communicate()
    version = lf.__version__
    named = f"reading {tmp_path / 'rows.jsonl'}; the adapter will be in {tmp_path / 'out'}"
    assert line == f"lorafold {version}: {named}\n"


def test_ctrl_c_ends_with_130(tmp_path):
    rows = tmp_path / "rows.jsonl"
    os.mkfifo(rows)
    child = started("train", "--data", rows, "--out", tmp_path / "out")
    waiting = open_once_read(rows, child)
    # a signal that comes just before the read begins is noticed only when the next one comes
    for _ in range(6):
        child.send_signal(signal.SIGINT)
        try:
            child.wait(timeout=10)
            break
        except subprocess.TimeoutExpired:
            continue
    _, told = child.communicate(timeout=60)
    os.close(waiting)
    assert child.returncode == 130
    assert told.splitlines()[1:] == ["interrupted by Ctrl-C"]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_results_are_a_line_for_people_or_one_json_object(capsys):
    result = {"loss": 1.5, "perplexity": float("inf"), "out": Path("a/b")}
    emit(False, result, "loss 1.5")
    assert capsys.readouterr().out == "loss 1.5\n"
    emit(True, result, "loss 1.5")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"loss": 1.5, "perplexity": None, "out": "a/b"}


@pytest.mark.parametrize("verb", ["compare", "intrinsic"])
def test_other_clusters_are_refused(verb: str, tmp_path: Path) -> None:
    told = refused(verb, "--out", str(tmp_path / "out"), "--on", "slurm")
    assert told == "error: --on: found slurm, expected ray\n"
    assert not (tmp_path / "out").exists()


def test_workers_need_a_directory() -> None:
    told = refused("fragility", "--refuse", "r", "--controls", "c", "--on", "ray")
    assert "--on: found no --out" in told


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    told = refused("compare", "--out", str(tmp_path / "out"), "--on", "ray")
    assert told == "error: --on ray: ray is not installed; install lorafold[ray]\n"
    assert not (tmp_path / "out").exists()


def test_a_worker_gets_the_command_without_where_it_runs() -> None:
    asked = ["compare", "--on", "ray", "--out", "o", "--workers=3", "--workers", "2", "--json"]
    assert without_cluster_options(asked) == ["compare", "--out", "o", "--json"]
    asked = ["compare", "--on=ray", "--seeds", "2"]
    assert without_cluster_options(asked) == ["compare", "--seeds", "2"]


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], 2, {"num_cpus": 4, "num_gpus": 0}),
        ([{"CPU": 8.0, "GPU": 4.0}], 4, {"num_cpus": 2, "num_gpus": 1}),
        ([{"CPU": 2.0}], 4, {"num_cpus": 1, "num_gpus": 0}),
    ],
)
def test_a_worker_asks_for_what_every_node_has(nodes, workers: int, expected) -> None:
    gone = {"Alive": False, "Resources": {"CPU": 1.0}}
    alive = [{"Alive": True, "Resources": n} for n in nodes]
    assert worker_resources([gone, *alive], workers) == expected
