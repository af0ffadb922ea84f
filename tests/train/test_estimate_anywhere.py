"""An estimate is about a device, whatever machine makes it."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from rich.console import Console
from typer.testing import CliRunner

from lorafold.cli import app
from lorafold.data.batches import StoredFeed
from lorafold.data.examples import Example
from lorafold.data.row_store import SourcePart
from lorafold.memory.estimate import Estimate, estimate
from lorafold.memory.measure import measure
from lorafold.memory.preflight import choose_checkpointing, largest_batch
from lorafold.memory.trace import Setting
from lorafold.methods import make_spec
from lorafold.models.fake import fake_model
from lorafold.models.quantizations import Storage
from lorafold.objectives.sft import Sft
from lorafold.ops.arithmetic import multiplying
from lorafold.recipe.recipe import Recipe
from memory_cases import BF16, COMMON

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 200}
CONFIG = tf.LlamaConfig(**COMMON | SMALL)
LORA = make_spec("lora")
SETTINGS = {
    "lora": Setting(BF16, LORA, rows=(96,)),
    "checkpointing": Setting(BF16, LORA, rows=(96,), checkpointing=True),
    "nf4": Setting(Storage(torch.bfloat16, "nf4"), LORA, rows=(96,)),
    "inference": Setting(BF16, rows=(96,)),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_machine_that_asks_has_no_say(name: str) -> None:
    def found(asked: bool, machine: bool) -> Estimate:
        with multiplying(widened=machine):
            return estimate(CONFIG, replace(SETTINGS[name], widened=asked))

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
    measured = measure(lambda: fake_model(CONFIG, setting.base, 2), setting, torch.device("cpu"))
    assert estimate(CONFIG, setting).total == pytest.approx(measured, rel=0.02)


def test_tensors_that_die_meanwhile_do_not_count() -> None:
    others = [torch.zeros(2**20)]

    def load() -> tf.PreTrainedModel:
        others.clear()
        return fake_model(CONFIG, BF16, 2)

    setting = SETTINGS["inference"]
    found = measure(load, setting, torch.device("cpu"))
    assert estimate(CONFIG, setting).total == pytest.approx(found, rel=0.02)


def test_a_run_is_planned_for_its_own_device(each_arithmetic: bool) -> None:
    def plan(device: str, base: Storage = BF16) -> Setting:
        examples = [Example(tuple(range(96)), tuple(range(96)))]
        feed = StoredFeed(examples, [SourcePart(1)], 8, 1, 0)
        setting = Setting(base, LORA)
        return largest_batch(Recipe(), feed, Sft(), setting, device=torch.device(device))

    assert plan("cpu").widened is each_arithmetic
    assert not plan("cuda").widened
    assert not plan("cpu", Storage(torch.float32)).widened
    console = Console(file=io.StringIO(), width=400)
    choose_checkpointing(CONFIG, plan("cpu"), False, 10**9, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("16-bit products in fp32" in text) is each_arithmetic


@pytest.mark.slow
def test_the_command_asks_this_machine_only_where_it_is_told_to(tiny_model_dir: Any) -> None:
    def said(widened: bool, *arguments: str) -> str:
        given = ["estimate", "--model", str(tiny_model_dir("llama")), "--mode", "lora"]
        with multiplying(widened=widened):
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
