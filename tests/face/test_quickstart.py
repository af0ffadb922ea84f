"""The quickstart: its base in the faster of bf16 and fp32, and its task, which is strict JSON and
has a test split of words that training never shows.
"""

import io
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from shlex import quote

import pytest
import torch
from rich.console import Console

from lorafold.cli.cli_only import this_command
from lorafold.models.quantizations import Storage
from lorafold.ops.arithmetic import override_widening
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.quickstart import run as module
from lorafold.quickstart.run import RECIPE, QuickstartResult, describe_hardware, fastest, quickstart
from lorafold.quickstart.task import INTENTS, NUMBERS, SYSTEM, Row, Split, rows
from lorafold.runtime.processor import processor_name

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "widened", "dtype", "why"),
    [
        (True, True, False, torch.bfloat16, "bf16: this CPU has AMX"),
        (False, True, False, torch.bfloat16, "bf16: this CPU has avx512_bf16"),
        (False, True, True, torch.float32, "fp32: this CPU has avx512_bf16, but fp32 is faster"),
        (False, False, True, torch.float32, "fp32: this CPU has neither AMX nor avx512_bf16"),
        (False, False, False, torch.float32, "fp32: this CPU has neither AMX nor avx512_bf16"),
    ],
    ids=["amx", "amd", "intel", "avx2", "neither"],
)
def test_the_faster_one_is_taken_and_said(
    amx: bool, avx512: bool, widened: bool, dtype: torch.dtype, why: str, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    with override_widening(widened=widened):
        assert fastest(CPU) == (dtype, None, why)


def test_what_other_commands_measure_with_its_recipe_is_the_same_everywhere() -> None:
    assert RECIPE.storage == "fp32"


@pytest.mark.slow
def test_the_whole_story_is_told_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(module, "RECIPE", RECIPE.model_copy(update={"steps": 1, "batch": 1}))
    monkeypatch.setattr(module, "TEST_ROWS", 1)
    console = Console(file=io.StringIO(), width=400)
    with override_widening(widened=False):
        found = quickstart(tmp_path / "out", console, device="cpu")
    assert found.base == "bf16"
    assert SavedAdapter.open(found.adapter).record["recipe"]["storage"] == "bf16"
    text = console.file.getvalue()  # type: ignore[attr-defined]
    first, second, third, *_ = text.splitlines()
    assert first.startswith(f"processor: {processor_name()}, ")
    assert first.endswith(", matmuls in bf16")
    assert second == "base: bf16: this CPU has AMX"
    assert third.startswith("C++ operations: ")


def test_a_processor_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "enable", lambda _: "found no C++ compiler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    told = [*describe_hardware(CPU, Storage(torch.float32, None, "fp32: as requested"))]
    assert ", 1 thread on " in told[0]
    assert told[0].endswith("matmuls in fp32")
    assert told[1:] == [
        "base: fp32: as requested", f"C++ operations: found no C++ compiler; {module.UNCOMPILED}"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("after", "kl", "told", "others"),
    [
        (0.99, 1e-6, ("99.0% after: the share of", "exactly the right JSON; good",
                      "good: only rounding error", "0.01% lost in llama.cpp"), ()),
        (0.7, 1e-6, ("middling",), ()),
        (0.1, 1e-2, ("poor", "more than rounding error"), ()),
        (0.1, None, ("only 1.0% of the model's size",), ("KL", "llama.cpp")),
    ],
)  # fmt: skip
def test_each_figure_is_said_and_judged(after: float, kl: float | None, told, others) -> None:
    lost = None if kl is None else 1e-4
    story = QuickstartResult(0.0, after, 60, 90, "a", "m", 10**6, 10**8, kl, "g", lost, "fp32")
    text = "\n".join(story.meaning())
    assert all(part in text for part in told)
    assert not any(part in text for part in others)


@pytest.mark.parametrize("there", ["on the path", "elsewhere", "as a module"])
def test_its_commands_run_from_where_it_ran(there: str, tmp_path, monkeypatch) -> None:
    bin_ = tmp_path / "a b" / "bin"
    bin_.mkdir(parents=True)
    script = bin_ / "lorafold"
    script.write_text(f"#!{sys.executable}\nprint('ran')\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = [str(bin_)] if there == "on the path" else []
    monkeypatch.setenv("PATH", os.pathsep.join([*path, "/usr/bin", "/bin"]))
    module_run = there == "as a module"
    typed = str(tmp_path / "lorafold" / "__main__.py") if module_run else "a b/bin/lorafold"
    monkeypatch.setattr(sys, "argv", [typed])
    run = this_command()
    if there == "as a module":
        assert run == f"{quote(sys.executable)} -m lorafold"
        return
    assert run == ("lorafold" if there == "on the path" else "'a b/bin/lorafold'")
    done = subprocess.run(run, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "ran\n"


COPIED = ("place", "task", "to", "text", "title", "artist", "city")
FIXED = (  # the words of the patterns
    "the i will be have to my your no aunt uncle coach mr ms dr dj band"
    " cafe chez port lake new mount fort"
)
GLUE = set(FIXED.split())


def request(row: Row) -> str:
    return row["prompt"][1]["content"]


def record(row: Row) -> dict[str, str | int]:
    return json.loads(row["completion"][0]["content"])


@cache
def records(split: Split) -> list[dict[str, str | int]]:
    return [record(row) for row in rows(split, 3000, 0)]


def copied(split: Split) -> list[str]:
    found = [item for row in rows(split, 4000, 7) for item in record(row).items()]
    return [str(value) for key, value in found if key in COPIED]


def vocabulary(values: list[str]) -> set[str]:
    return {word for value in values for word in re.findall(r"\w+", value.lower())} - GLUE


def test_rows_are_strict_json_with_fixed_key_order() -> None:
    for row in rows("train", 400, 0):
        system, user = row["prompt"]
        assert (system["role"], system["content"], user["role"]) == ("system", SYSTEM, "user")
        (answer,) = row["completion"]
        found = json.loads(answer["content"])
        assert list(found) == ["intent", *INTENTS[found["intent"]]["slots"]]
        assert answer["content"] == json.dumps(found, separators=(",", ":"))


def test_copied_values_stand_in_the_request() -> None:
    for row in rows("train", 400, 1):
        for key, value in record(row).items():
            if key in COPIED:
                assert str(value) in request(row)
        assert not re.search(r"[<>()|]", request(row))


def test_same_arguments_same_rows_and_another_seed_others() -> None:
    assert rows("train", 50, 3) == rows("train", 50, 3)
    assert rows("train", 50, 3) != rows("train", 50, 4)


def test_test_split_has_no_value_and_no_word_of_a_value_from_training() -> None:
    train, test = copied("train"), copied("test")
    assert not set(train) & set(test)
    assert not vocabulary(train) & vocabulary(test)
    assert len(vocabulary(test)) > 100


def test_no_request_twice_and_thousands_of_them() -> None:
    train, test = ([request(row) for row in rows(split, 5000, 0)] for split in ("train", "test"))
    assert len({*train, *test}) == 10_000


def test_intents_are_balanced() -> None:
    names = [record(row)["intent"] for row in rows("test", 6 * 25, 0)]
    assert {names.count(name) for name in INTENTS} == {25}


@pytest.mark.parametrize("key", ["time", "day", "people"])
def test_every_normalised_value_of_the_test_split_is_taught(key: str) -> None:
    seen, taught = ({of[key] for of in records(s) if key in of} for s in ("test", "train"))
    assert seen <= taught


def test_numbers_and_times_agree_with_what_was_said() -> None:
    numbers = list(NUMBERS)
    checked = 0
    for row in rows("train", 2000, 5):
        text, found = request(row).lower(), record(row)
        if spoken := re.search(r"(\d+)(?::(\d+))?(am|pm)", text):
            hour, minute, half = spoken.groups()
            assert found["time"] == f"{hour}:{minute or '00'} {half}"
        elif spoken := re.search(r"(half past )?(\w+) in the (morning|evening)", text):
            half, hour, period = spoken.groups()
            minutes, when = "30" if half else "00", "pm" if period == "evening" else "am"
            assert found["time"] == f"{numbers.index(hour) + 1}:{minutes} {when}"
        else:
            assert "time" not in found
            continue
        checked += 1
    assert checked > 500
