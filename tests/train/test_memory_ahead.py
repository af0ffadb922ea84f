"""Memory before a run: what it prints and does, and that an estimate is about a device."""

import io
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from rich.console import Console
from transformers import PreTrainedModel
from typer.testing import CliRunner

import lorafold as lf
from lorafold.cli import app
from lorafold.data.batches import StoredFeed
from lorafold.data.examples import Example
from lorafold.data.row_store import SourcePart
from lorafold.memory.estimate import Estimate, estimate
from lorafold.memory.measure import measure
from lorafold.memory.preflight import choose_checkpointing, largest_batch
from lorafold.memory.trace import MemorySetting
from lorafold.methods import make_spec
from lorafold.models.fake import fake_model
from lorafold.models.quantizations import Storage
from lorafold.objectives.sft import Sft
from lorafold.ops.arithmetic import override_widening
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.runtime.memory import KEEP_FREED, RETURN_FREED, free_bytes, malloc_policy
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train
from memory_cases import BF16, COMMON, CONFIGS, CPU, LORA

CONFIG = CONFIGS["llama"]
SETTING = replace(LORA, rows=(128,) * 4)


def said(free: int, asked: Any) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=400)
    return choose_checkpointing(CONFIG, SETTING, asked, free, console)[0], console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_checkpointing_is_left_off_where_a_step_fits_and_on_where_it_would_not() -> None:
    held = estimate(CONFIG, SETTING).total
    on, text = said(2 * held, "auto")
    assert not on
    assert text.startswith("memory: ")
    assert "gradient checkpointing" not in text
    on, text = said(held, "auto")
    assert on
    assert "gradient checkpointing is on, because a step without it would take" in text
    assert "warning" not in text


@pytest.mark.slow
def test_what_is_asked_is_done_and_a_step_that_does_not_fit_is_warned_of() -> None:
    held = estimate(CONFIG, SETTING).total
    on, text = said(held, False)
    assert not on
    assert "warning: a step may not fit in memory; it would fit with gradient check" in text
    assert said(2 * held, True)[0]
    on, text = said(1000, "auto")
    assert on
    assert "try a smaller batch, max_length or model" in text


def test_an_architecture_that_can_not_be_estimated_stops_nothing() -> None:
    console = Console(file=io.StringIO(), width=400)
    found = choose_checkpointing(tf.ViTConfig(num_hidden_layers=2), SETTING, "auto", 10**9, console)
    assert not found[0]
    assert found[1].startswith("memory: no estimate: ")


def test_the_heaviest_part_of_a_run_is_planned_for() -> None:
    examples = [Example(tuple(range(n)), (-100,) * (n - 2) + (1, 2)) for n in (10, 40, 30, 20)]

    def plan(**fields: Any) -> MemorySetting:
        recipe = Recipe(epochs=1, **fields)
        steps = recipe.total_steps(4)
        feed = StoredFeed(examples, [SourcePart(4)], recipe.batch, steps, recipe.seed)
        return largest_batch(recipe, feed, Sft(), SETTING, shares=True)

    whole = plan(batch=4, packing=True)
    assert (sorted(whole.rows), whole.labelled, whole.accumulating) == ([10, 20, 30, 40], 8, False)
    packed = plan(batch=4, max_length=60, packing=True)
    assert (sum(packed.rows), packed.accumulating) == (60, True)
    padded = plan(batch=4, accumulate=2, packing=False)
    assert (len(padded.rows), max(padded.rows)) == (2, 40)
    assert (padded.packed, padded.accumulating) == (False, True)
    # the ids of each begin as those of the longest, and all train on the same two after their own
    alike = plan(batch=4, packing="auto")
    assert (sum(alike.rows), alike.accumulating) == (40, False)
    assert alike.labelled == 8


@pytest.mark.few(1)
@pytest.mark.parametrize(("free", "recomputed"), [(10**12, False), (1000, True)])
def test_a_run_asks_it(monkeypatch, tiny_model_dir, tmp_path, free: int, recomputed: bool) -> None:
    console = Console(file=io.StringIO(), width=400)
    for module in ("training_step.optimizers", "training.setup"):
        monkeypatch.setattr(f"lorafold.{module}.free_bytes", lambda device: free)
    seen = []
    monkeypatch.setattr(
        PreTrainedModel, "activation_checkpointing_enable", lambda model, _: seen.append(model)
    )
    recipe = Recipe(steps=1, batch=2, storage="fp32", max_length=32)
    rows = [{"prompt": "a b", "completion": " c"}] * 4
    base = Base(tiny_model_dir("llama"))
    train(RunRequest(base, tmp_path / "out", recipe, rows, "test"), console)
    real = [p for m in seen for p in m.parameters() if type(p) is torch.nn.Parameter]
    assert any(p.device.type == "cpu" for p in real) is recomputed
    assert "memory: " in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert free_bytes(cpu, tmp_path) > 1 << 20
    (tmp_path / "memory.stat").write_text("anon 300\nfile 500\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(cpu, tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu, tmp_path) > 1 << 20


PAIRS = [{"prompt": f"Say {n}", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 9)]
OF_ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], Any]] = {
    "sft": ([{"prompt": "a b", "completion": " c" * n} for n in range(1, 9)], {}, ()),
    "classify": ([{"text": f"{n} cats", "label": str(n % 2)} for n in range(8)], {}, ()),
    "dpo": (PAIRS, {}, ()),
    "reward": (PAIRS, {}, ()),
    "grpo": (PAIRS, {"group": 2, "max_new_tokens": 8}, "regex:a"),
}


@pytest.mark.estimated
@pytest.mark.parametrize("objective", OF_ROWS)
def test_an_estimate_is_what_a_run_says(objective, tiny_model_dir, monkeypatch, tmp_path) -> None:
    rows, options, rewards = OF_ROWS[objective]
    model, said = tiny_model_dir("llama"), list[int]()
    recipe = lf.Recipe(objective=objective, objective_options=options, storage="fp32")
    sizes = {"batch": 4, "max_length": 64}
    how: dict[str, Any] = {"data": rows, "rewards": rewards, "device": "cpu"}
    found = lf.estimate(model, "lora", recipe=recipe, **sizes, **how)

    def stopped(config: Any, setting: MemorySetting, *_: Any) -> bool:
        said.append(estimate(config, setting).total)
        raise lf.LorafoldError("seen")

    monkeypatch.setattr("lorafold.training.setup.choose_checkpointing", stopped)
    asked = lf.Recipe(**recipe.model_dump(exclude_unset=True), **sizes)
    with pytest.raises(lf.LorafoldError, match="seen"):
        lf.train(asked, model=model, out=tmp_path / "out", **how)
    assert [found.total] == said


@pytest.mark.slow
def test_what_an_estimate_on_rows_does_not_take(tiny_model_dir: Any) -> None:
    model = tiny_model_dir("llama")
    for given, message in (
        ({"recipe": lf.Recipe(objective="dpo")}, "found objective without --data; pass --data"),
        ({"rewards": "regex:a"}, "found rewards without --data; pass --data"),
        ({"data": PAIRS, "measure": True}, "--data: can't be combined with --measure: the"),
        ({"data": PAIRS, "mode": "inference"}, "--data: can't be combined with --mode inf"),
        ({"data": PAIRS, "recipe": lf.Recipe(lr=1.0)}, "found lr, which the estimate does not use"),
        ({"data": PAIRS, "recipe": lf.Recipe(objective="classify")}, "data: found rows of"),
    ):
        with pytest.raises(lf.LorafoldError, match=message):
            lf.estimate(model, **given)
    found = lf.estimate(model, "lora", data=PAIRS, recipe=lf.Recipe(objective="dpo"),
                        device_memory=10**5)  # fmt: skip
    assert "does not fit" in str(found)
    assert "largest batch" not in str(found)
    assert found.as_json()["largest_batch"] is None


def test_a_run_on_a_cpu_counts_its_process() -> None:
    tensors, whole = estimate(CONFIG, SETTING), estimate(CONFIG, replace(SETTING, resident=True))
    assert tensors.terms["process"] == 0
    assert whole.terms["process"] > 50e6
    assert whole.total == tensors.total + whole.terms["process"]

    def plan(device: str) -> bool:
        examples = [Example((1, 2), (-100, 2))] * 4
        feed = StoredFeed(examples, [SourcePart(4)], 2, 2, 0)
        where = torch.device(device)
        return largest_batch(Recipe(epochs=1), feed, Sft(), SETTING, device=where).resident

    assert (plan("cpu"), plan("mps")) == (True, False)


def anonymous() -> int:
    """The bytes of anonymous memory of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="of glibc on Linux"
)
def test_a_phase_begins_without_the_freed_blocks_of_the_one_before() -> None:
    with malloc_policy(KEEP_FREED):
        blocks = [torch.ones(2**16) for _ in range(400)]
        above = torch.ones(2**16)  # keeps the heap from shrinking at its end
        del blocks
        before = anonymous()
        with malloc_policy(RETURN_FREED):
            assert before - anonymous() > 60e6
    del above


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is resident")
@pytest.mark.parametrize("setting", range(12))
def test_a_whole_process_takes_what_its_run_says(setting: int) -> None:
    """From the first import to the exit: loading, steps, checkpoints, writing, reading back."""
    script = Path(__file__).parents[2] / "benchmarks" / "memory_process.py"
    command = [sys.executable, str(script), "--only", str(setting)]
    found = json.loads(subprocess.check_output(command, text=True))
    assert 0.8 < float(found["relative to the estimate"]) <= 1.05, found


SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 200}
TWO_BLOCKS = tf.LlamaConfig(**COMMON | SMALL)
METHOD = make_spec("lora")
SETTINGS = {
    "lora": MemorySetting(BF16, METHOD, rows=(96,)),
    "checkpointing": MemorySetting(BF16, METHOD, rows=(96,), checkpointing=True),
    "nf4": MemorySetting(Storage(torch.bfloat16, "nf4"), METHOD, rows=(96,)),
    "inference": MemorySetting(BF16, rows=(96,)),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_machine_that_asks_has_no_say(name: str) -> None:
    def found(asked: bool, machine: bool) -> Estimate:
        with override_widening(widened=machine):
            return estimate(TWO_BLOCKS, replace(SETTINGS[name], widened=asked))

    plain = found(False, False)
    assert plain == found(False, True)
    wider = found(True, False)
    assert wider == found(True, True)
    # what is asked about has one; inference runs the model's own products, as they are
    assert (wider.total > plain.total) is (name != "inference")


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_what_a_machine_of_that_kind_holds(name: str, each_arithmetic: bool) -> None:
    setting = replace(SETTINGS[name], widened=each_arithmetic)
    measured = measure(lambda: fake_model(TWO_BLOCKS, setting.base, 2), setting, CPU)
    assert estimate(TWO_BLOCKS, setting).total == pytest.approx(measured, rel=0.02)


def test_tensors_that_die_meanwhile_do_not_count() -> None:
    others = [torch.zeros(2**20)]

    def load() -> tf.PreTrainedModel:
        others.clear()
        return fake_model(TWO_BLOCKS, BF16, 2)

    setting = SETTINGS["inference"]
    found = measure(load, setting, torch.device("cpu"))
    assert estimate(TWO_BLOCKS, setting).total == pytest.approx(found, rel=0.02)


def test_a_run_is_planned_for_its_own_device(each_arithmetic: bool) -> None:
    def plan(device: str, base: Storage = BF16) -> MemorySetting:
        examples = [Example(tuple(range(96)), tuple(range(96)))]
        feed = StoredFeed(examples, [SourcePart(1)], 8, 1, 0)
        setting = MemorySetting(base, METHOD)
        return largest_batch(Recipe(), feed, Sft(), setting, device=torch.device(device))

    assert plan("cpu").widened is each_arithmetic
    assert not plan("cuda").widened
    assert not plan("cpu", Storage(torch.float32)).widened
    console = Console(file=io.StringIO(), width=400)
    choose_checkpointing(TWO_BLOCKS, plan("cpu"), False, 10**9, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("16-bit matmuls run in fp32" in text) is each_arithmetic


@pytest.mark.slow
def test_the_command_asks_this_machine_only_where_it_is_told_to(tiny_model_dir: Any) -> None:
    def said(widened: bool, *arguments: str) -> str:
        given = ["estimate", "--model", str(tiny_model_dir("llama")), "--mode", "lora"]
        with override_widening(widened=widened):
            return CliRunner().invoke(app, [*given, *arguments], catch_exceptions=False).stdout

    device = said(True)
    assert device == said(False)
    assert "this machine" not in device
    here = "for this machine's CPU, which multiplies 16-bit matrices "
    cpu = said(False, "--device", "cpu")
    assert cpu.endswith(f"{here}in 16 bits\n")
    assert cpu.partition(here)[0] != device  # a GPU keeps masks of dropout, a CPU their places
    older = said(False, "--compute-capability", "7.5")
    assert older != device == said(False, "--device", "cuda", "--compute-capability", "9.0")
    wider = said(True, "--device", "cpu").splitlines()
    assert wider[-1] == f"{here}in fp32"
    assert wider[-2].startswith("total")
    assert wider[-2] != device.splitlines()[-1]
