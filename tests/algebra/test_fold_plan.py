"""The plan of a fold, made from shapes alone, is what folding then does, in memory and in files."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorafold as lf
from lorafold.core.attach import base_state
from lorafold.errors import NotMergeable
from lorafold.fold.plan import plan_fold
from lorafold.merging.plan import plan_merge
from lorafold.methods import METHODS
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base
from noise import moved


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter, tied ones under each of theirs."""
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.few(13)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "linear-probe")])
def test_what_is_planned_is_what_changes(method: str, kind: str, tiny_model: Callable) -> None:
    model = tiny_model(kind)
    before = weights(model)
    adapter = moved(lf.attach(model, METHODS[method](), name="a"))
    planned = plan_fold(model, ["a"])
    assert {n: p.shape for n, p in base_state(model).items()} == {
        n: p.shape for n, p in before.items()
    }
    if planned.problems:
        with pytest.raises(NotMergeable, match="can't be merged"):
            adapter.merge()
        return
    adapter.merge()
    after = weights(model)
    changed = {n for n, p in after.items() if n not in before or not torch.equal(p, before[n])}
    gained = {f"{path}.bias" for shapes in planned.switches.values() for path in shapes}
    assert changed | gained == set(planned.shapes) | gained
    assert {n: tuple(after[n].shape) for n in planned.shapes} == planned.shapes


def test_a_shared_weight_changed_on_both_sides_stays_shared_and_else_parts(tiny_model) -> None:
    model = tiny_model("gpt2")
    lf.attach(model, lf.LoRA(rank=2), targets=["c_attn"], tokens=[3, 300], name="rows")
    planned = plan_fold(model, ["rows"])
    assert set(planned.tied) == {"transformer.wte.weight", "lm_head.weight"}
    assert (planned.untied, planned.vocabulary) == ({}, 301)
    alone = lf.attach(tiny_model("gpt2"), lf.LoRA(rank=2), targets=["lm_head"], name="head")
    planned = plan_fold(alone.model, ["head"])
    assert planned.untied == {"lm_head.weight": ("transformer.wte.weight",)}
    with pytest.raises(NotMergeable, match=r"lm_head: the weight is tied to transformer\.wte, "):
        alone.merge()


def test_files_are_planned_as_the_model_is(tiny_model, tiny_model_dir, tmp_path) -> None:
    adapter = moved(lf.attach(tiny_model("gpt2"), lf.BitFit(), name="a"))
    expected = plan_fold(adapter.model, ["a"]).shapes
    adapter.save(tmp_path / "a")
    planned = plan_merge(Base(tiny_model_dir("gpt2")), [SavedAdapter.open(tmp_path / "a")])
    assert {planned.changed[name]: shape for name, shape in planned.shapes.items()} == expected
