"""A directory appears whole or not at all: whatever fails, nothing half-written is at its path."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapter_files import json_of
from error_cases import refusal
from lorafold.errors import LorafoldError
from lorafold.files import atomic
from lorafold.files.atomic import MANIFEST, atomic_directory, check_out, verify, write_json


def write(path: Path, text: str, overwrite: bool = False) -> None:
    with atomic_directory(path, overwrite) as tmp:
        (tmp / "weights").write_text(text)
        (tmp / "nested").mkdir()
        (tmp / "nested" / "more").write_text(text * 2)


def fail_midway(path: Path, error: BaseException, overwrite: bool = False) -> None:
    with atomic_directory(path, overwrite) as tmp:
        (tmp / "weights").write_text("half")
        raise error


def fill_the_disk(path: Path) -> None:
    with atomic_directory(path) as tmp:
        (tmp / "weights").symlink_to("/dev/full")
        (tmp / "weights").write_text("too much")


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        return child.pid


def leftover(target: Path, pid: int, kind: str) -> Path:
    path = target.with_name(f".{target.name}.{atomic.HOST_ID}-{pid}-0123abcd.{kind}")
    path.mkdir()
    (path / "weights").write_text("left")
    return path


def test_a_directory_appears_whole_with_a_manifest_that_holds(tmp_path):
    with atomic_directory(tmp_path / "a" / "out") as tmp:
        (tmp / "weights").write_bytes(b"abc")
        assert tmp.parent == tmp_path / "a"  # a sibling: the same file system
        assert not (tmp_path / "a" / "out").exists()
    assert os.listdir(tmp_path / "a") == ["out"]
    entry = json_of(tmp_path / "a" / "out", MANIFEST)["files"]["weights"]
    assert entry == {"sha256": hashlib.sha256(b"abc").hexdigest(), "size": 3}
    assert verify(tmp_path / "a" / "out") == []


def test_the_directory_gets_the_permissions_of_any_new_one(tmp_path):
    (tmp_path / "plain").mkdir()
    write(tmp_path / "out", "x")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_verify_names_every_file_that_differs(tmp_path):
    out = tmp_path / "out"
    write(out, "abc")
    (out / "weights").write_text("abd")
    (out / "added").write_text("does not count")
    (out / "nested" / "more").write_text("a")
    assert verify(out) == [
        "nested/more: 1 bytes, expected 6",
        "weights: content differs from the manifest",
    ]
    (out / "weights").unlink()
    assert "weights: missing" in verify(out)
    (out / MANIFEST).write_text("[]")
    assert verify(out) == [f"{MANIFEST}: not readable as a manifest"]
    (out / MANIFEST).unlink()
    assert verify(out) == [f"{MANIFEST}: missing"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        fail_midway(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_what_exists_is_refused_before_any_work(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    said = r"out exists; choose another name, or replace it with --overwrite$"
    with pytest.raises(LorafoldError, match=said), atomic_directory(out):
        pytest.fail("the block must not run")
    assert (out / "weights").read_text() == "old"


def test_overwriting_keeps_the_old_until_the_new_is_complete(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(ValueError, match="no"):
        fail_midway(out, ValueError("no"), overwrite=True)
    assert (out / "weights").read_text() == "old"
    with atomic_directory(out, overwrite=True) as tmp:
        (tmp / "weights").write_text("new")
        assert verify(out) == []
        assert (out / "weights").read_text() == "old"
    assert (out / "weights").read_text() == "new"
    assert verify(out) == []
    assert not (out / "nested").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_files_of_others_are_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(LorafoldError, match="contains files that lorafold did not write"):
        check_out(tmp_path / "thesis", overwrite=True)
    with pytest.raises(LorafoldError, match="is not a directory"):
        check_out(tmp_path / "thesis" / "chapter.tex", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", overwrite=True)
    check_out(tmp_path / "new")


def test_a_path_taken_during_the_work_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(LorafoldError, match="exists"), atomic_directory(out):
        write(out, "of another process")
    assert (out / "weights").read_text() == "of another process"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    told = refusal(fill_the_disk, tmp_path / "out")
    assert "out was not written: No space left on device" in told
    assert os.listdir(tmp_path) == []


def test_tensors_that_find_no_room_are_one_line(tmp_path):
    code = f"""
import resource, numpy, safetensors.numpy
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with atomic_directory({str(tmp_path / "out")!r}) as tmp:
        safetensors.numpy.save_file({{"w": numpy.zeros(65536)}}, tmp / "model.safetensors")
except LorafoldError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.count("\n") == 1
    assert "out was not written: " in told
    assert "File too large" in told
    assert os.listdir(tmp_path) == []


def test_a_killed_process_leaves_nothing_at_the_path_and_its_leftover_goes_with_the_next_attempt(
    tmp_path,
):
    out = tmp_path / "out"
    code = f"""
import time
from lorafold.files.atomic import atomic_directory
with atomic_directory({str(out)!r}) as tmp:
    (tmp / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        check_out(out)  # while it lives its directory stays
        [partial] = tmp_path.iterdir()
        child.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == [partial]
    write(out, "whole")
    assert os.listdir(tmp_path) == ["out"]
    assert verify(out) == []


def test_a_process_killed_between_its_two_renames_loses_nothing(tmp_path):
    out = tmp_path / "out"
    leftover(out, dead_pid(), "old")
    with pytest.raises(LorafoldError, match="contains files"):
        check_out(out)
    assert (out / "weights").read_text() == "left"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_others_stay(tmp_path):
    out = tmp_path / "out"
    kept = {
        leftover(out, os.getpid(), "partial"),
        leftover(tmp_path / "out.run", dead_pid(), "partial"),
    }
    write(out, "x")
    assert set(tmp_path.iterdir()) == {out, *kept}


def test_json_is_replaced_in_one_step(tmp_path):
    content = {"name": "Zoë", "x": [1, 2.5]}
    write_json(tmp_path / "a.json", content)
    assert json_of(tmp_path, "a.json") == content
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(LorafoldError, match=r"b\.json was not written: No such file or directory"):
        write_json(tmp_path / "nowhere" / "b.json", {})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json_of(tmp_path, "a.json") == content


def test_a_directory_is_no_file_to_write(tmp_path: Path) -> None:
    said = f"{tmp_path}: found a directory, expected a file name"
    assert refusal(write_json, tmp_path, {}) == said
    assert not [*tmp_path.iterdir()]


def test_who_may_read_a_directory_may_read_its_files(tmp_path: Path) -> None:
    """safetensors gives its own to their owner alone."""
    with atomic_directory(tmp_path / "a") as tmp:
        save_file({"x": torch.ones(2)}, tmp / "x.safetensors")
        (tmp / "y").write_text("y")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == {(tmp_path / "a").stat().st_mode & 0o666}
