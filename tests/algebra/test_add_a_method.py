"""A new method is one file and one row of METHODS: all else follows from them."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import laws
import lorafold as lf
import noise
from fresh_models import fresh_model
from lorafold.cli import app
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.methods import METHODS
from lorafold.models.loading import load_model

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(12)]
IDS = torch.arange(24).reshape(3, 8)

FILE = '''"""Scaled: every output of a layer, or every group of them, times a number of its own.

    y = (1 + strength s) * (W x + b)        s (out / group,) zero at start
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafold.core.delta import Delta
from lorafold.core.layer import Layer
from lorafold.core.spec import Spec


class ScaledDelta(Delta):
    """s (out / group,) fp32, and order (out / group,) int64, which of them is whose."""

    def __init__(self, out: int, group: int, strength: float, device: torch.device) -> None:
        super().__init__()
        self.group, self.strength = group, strength
        self.s = nn.Parameter(torch.zeros(out // group, device=device))
        self.register_buffer("order", torch.arange(out // group, device=device))

    def gain(self) -> Tensor:  # (out,)
        return 1 + self.strength * self.s[self.order].repeat_interleave(self.group)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        return layer.scale(layer(x), self.gain(), onto=onto)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        g = self.gain()
        return g[:, None] * w, None if b is None else g * b


@dataclass(frozen=True)
class Scaled(Spec):
    """strength of the numbers; group: how many outputs share one (None: each has its own)."""

    strength: float = 1.0
    group: int | None = None

    def build(self, layer: Layer) -> ScaledDelta:
        return ScaledDelta(layer.shape[0], self.group or 1, self.strength, layer.device)
'''


@pytest.fixture
def scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as a module, with its row in METHODS."""
    path = tmp_path / "scaled.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("scaled_method", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaled_method", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "scaled", module.Scaled)
    return module


def moved(model: nn.Module, spec: Spec) -> lf.Adapter:
    return noise.moved(lf.attach(model, spec))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


@pytest.mark.few(20)
@pytest.mark.parametrize("base", laws.BASES)
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_the_law_holds(law, base: str, scaled: ModuleType, monkeypatch) -> None:
    monkeypatch.setitem(laws.METHODS, "scaled", scaled.Scaled(group=4))
    law("scaled", base)


def test_files_hold_what_its_code_says(scaled: ModuleType, tiny_model, tmp_path: Path) -> None:
    model, spec = tiny_model("gpt2"), scaled.Scaled(strength=0.5, group=2)
    adapter = moved(model, spec)
    adapter.save(tmp_path / "a")
    config, tensors = config_of(tmp_path / "a"), load_file(tmp_path / "a/adapter_model.safetensors")
    assert config["peft_type"] == "LORAFOLD_SCALED"
    assert {k: config[k] for k in ("strength", "group")} == {"strength": 0.5, "group": 2}
    site = "base_model.model.transformer.h.0.attn.c_attn"
    assert len(tensors) == 2 * len(adapter.sites)
    assert tensors[f"{site}.scaled_s"].shape == (48,)
    assert tensors[f"{site}.scaled_order"].dtype is torch.int64
    fresh = tiny_model("gpt2")
    loaded = lf.load(fresh, tmp_path / "a")
    assert loaded.spec == spec
    assert torch.equal(logits(fresh), logits(model))


def test_loading_is_strict(scaled: ModuleType, tiny_model, tmp_path: Path) -> None:
    moved(tiny_model("llama"), scaled.Scaled()).save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors, config = load_file(file), config_of(tmp_path / "a")
    key = "base_model.model.model.layers.0.mlp.up_proj.scaled_s"
    order = key.replace("scaled_s", "scaled_order")

    def refused(message: str, change: dict[str, torch.Tensor | None], **fields: Any) -> None:
        changed = {k: v.clone() for k, v in (tensors | change).items() if v is not None}
        save_file(changed, file)
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | fields))
        model = tiny_model("llama")
        with pytest.raises(LorafoldError, match=message):
            lf.load(model, tmp_path / "a")
        assert not any(hasattr(m, "deltas") for m in model.modules())

    refused(f"missing key {key}", {key: None})
    refused(f"unknown key {key}2", {f"{key}2": tensors[key]})
    refused(r"scaled_s: shape \[63\], expected \[64\]", {key: tensors[key][1:]})
    refused("dtype torch.float32, expected torch.int64", {order: tensors[order].float()})
    refused("dtype torch.int64, expected a floating-point dtype", {key: tensors[key].long()})
    refused("scaled_s: 1 of 64 values are not finite", {key: tensors[key].index_fill(
        0, torch.tensor([3]), torch.inf)})  # fmt: skip
    refused("strength: found 'strong'; input should be a valid number", {}, strength="strong")
    refused("group: found True; input should be a valid integer", {}, group=True)
    refused("colour=3 is not supported", {}, colour=3)


def test_a_file_of_a_method_that_is_not_there(scaled, tiny_model, tmp_path, monkeypatch) -> None:
    moved(tiny_model("llama"), scaled.Scaled()).save(tmp_path / "a")
    monkeypatch.delitem(METHODS, "scaled")
    with pytest.raises(LorafoldError, match=r"'LORAFOLD_SCALED' is not supported.*imported first"):
        lf.load(tiny_model("llama"), tmp_path / "a")
    with pytest.raises(LorafoldError, match=r"register the method in lorafold\.methods\.METHODS"):
        moved(tiny_model("llama"), scaled.Scaled()).save(tmp_path / "b")


def test_it_trains_merges_and_is_evaluated(scaled: ModuleType, tiny_model_dir, tmp_path) -> None:
    def run(words: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*words.split(), "--json"], catch_exceptions=False)
        return json.loads(done.stdout.splitlines()[-1])

    model, data = tiny_model_dir("qwen2"), tmp_path / "rows.jsonl"
    out, merged = tmp_path / "a", tmp_path / "merged"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = "--set steps=12 --set lr=0.1 --set batch=12 --set options.group=2"
    plain = f"--data {data} --storage fp32"
    losses = run(f"train --model {model} {plain} --out {out} --method scaled {options}")["losses"]
    assert losses[-1] < losses[0] - 0.05
    ours = run(f"eval --model {model} --adapter {out} {plain}")["loss"]
    assert ours < run(f"eval --model {model} {plain}")["loss"]
    run(f"merge --model {model} --adapter {out} --out {merged}")
    assert run(f"eval --model {merged} {plain}")["loss"] == pytest.approx(ours, rel=1e-5)
    adapted = fresh_model(model)
    adapter = lf.load(adapted, out)
    assert adapter.spec == scaled.Scaled(group=2)
    expected = logits(adapted)
    adapter.merge()
    for found in (adapted, load_model(merged, torch.float32)):
        assert torch.allclose(logits(found), expected, rtol=1e-4, atol=1e-5)


def test_names_in_files_are_one_a_method(scaled, tiny_model, tmp_path, monkeypatch) -> None:
    # another name of the same class changes nothing
    monkeypatch.setitem(METHODS, "scaled-twos", lambda: scaled.Scaled(group=2))
    moved(tiny_model("llama"), scaled.Scaled(group=2)).save(tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "LORAFOLD_SCALED"

    @dataclass(frozen=True)
    class Other(scaled.Scaled):
        pass

    monkeypatch.setitem(METHODS, "sca.led", Other)
    monkeypatch.setitem(METHODS, "sca led", scaled.Scaled)
    lf.load(tiny_model("llama"), tmp_path / "a")
    monkeypatch.delitem(METHODS, "scaled")
    monkeypatch.delitem(METHODS, "scaled-twos")
    with pytest.raises(LorafoldError, match=r"'sca\.led' and 'sca led' would both have the"):
        moved(tiny_model("llama"), scaled.Scaled()).save(tmp_path / "b")


@dataclass(frozen=True)
class Holder(Spec):
    """Options of every kind that a file can hold, and of one that it can't."""

    names: tuple[str, ...] = ("a", "b")
    table: dict[str, float] | None = None
    pair: tuple[int, bool] = (1, True)
    kind: object = "any"

    def build(self, layer: Any) -> Any:
        return METHODS["ia3"](feedforward=()).build(layer)


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "holder", Holder)


@pytest.mark.usefixtures("holder")
@pytest.mark.parametrize(
    "spec",
    [Holder(), Holder(("c",), {"x": 0.5, "y": 2}, (3, False)), Holder((), {}, (0, True), "other")],
    ids=["defaults", "values", "empty"],
)
def test_options_come_back_as_they_went(spec: Holder, tiny_model, tmp_path: Path) -> None:
    moved(tiny_model("llama"), spec).save(tmp_path / "a")
    loaded = lf.load(tiny_model("llama"), tmp_path / "a").spec
    assert loaded == spec
    assert [type(v) for v in vars(loaded).values()] == [type(v) for v in vars(spec).values()]
    # an option that a later version adds has its default in older files
    config = config_of(tmp_path / "a")
    del config["names"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "a" / MANIFEST).unlink()
    assert lf.load(tiny_model("llama"), tmp_path / "a").spec.names == ("a", "b")


@pytest.mark.usefixtures("holder")
@pytest.mark.parametrize("value", [Holder(), {1, 2}, float("inf"), nn.ReLU], ids=str)
def test_an_option_that_would_not_come_back_is_not_written(value, tiny_model, tmp_path) -> None:
    adapter = moved(tiny_model("llama"), Holder(kind=value))
    with pytest.raises(LorafoldError, match=r"Holder: kind=.* can't be saved as JSON and loaded"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_option_named_as_a_shared_key_is_refused(tiny_model, tmp_path, monkeypatch) -> None:
    @dataclass(frozen=True)
    class Biased(Spec):
        bias: float = 0.0

        def build(self, layer: Any) -> Any:
            return Holder().build(layer)

    monkeypatch.setitem(METHODS, "biased", Biased)
    with pytest.raises(LorafoldError, match="Biased: found options bias, whose names are reserved"):
        moved(tiny_model("llama"), Biased()).save(tmp_path / "a")


def test_a_new_additive_method_goes_under_dora(tiny_model, tmp_path, monkeypatch) -> None:
    from lorafold.core.delta import Additive

    class RowsDelta(Additive):
        def __init__(self, shape: tuple[int, int]) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.zeros(shape[1]))
            self.shape = shape

        def delta(self) -> torch.Tensor:
            return self.row.expand(self.shape)

        def forward(self, layer: Any, x: Any, onto: Any = None) -> Any:
            y = layer.op(x, self.row[None].to(x.dtype)).expand(*x.shape[:-1], self.shape[0])
            return layer(x, onto=y if onto is None else y + onto)

    @dataclass(frozen=True)
    class OneRow(Spec):
        def build(self, layer: Any) -> RowsDelta:
            return RowsDelta(layer.shape)

    monkeypatch.setitem(METHODS, "one-row", OneRow)
    model = tiny_model("llama")
    moved(model, lf.DoRA(OneRow())).save(tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "DORA_LORAFOLD_ONE_ROW"
    fresh = tiny_model("llama")
    assert lf.load(fresh, tmp_path / "a").spec == lf.DoRA(OneRow())
    assert torch.equal(logits(fresh), logits(model))
