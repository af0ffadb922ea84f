"""An adapter of another base is refused, and taken where `allow_other_base` is on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lorafold as lf
from fresh_models import fresh_model
from lorafold.errors import LorafoldError
from serving_cases import running, saved

pytestmark = pytest.mark.usefixtures("unestimated")

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(8)]
REFUSED = "not the base it was trained on"


@pytest.fixture
def other(tiny_model_dir, tmp_path: Path) -> Path:
    """A base of the same form with other weights, beside the tokenizer."""
    base = tiny_model_dir("llama")
    model = fresh_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    for file in base.glob("*token*"):
        shutil.copy(file, tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("given", ["over", "init_adapter"])
def test_a_run_takes_one_where_it_is_told_to(
    given: str, other: Path, tiny_model_dir, tmp_path: Path
) -> None:
    theirs = saved(other, {"a": lf.LoRA(rank=2)}, tmp_path / "adapters") / "a"
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    asked = {"model": tiny_model_dir("llama"), "data": ROWS, "device": "cpu", given: theirs}
    with pytest.raises(LorafoldError, match=REFUSED):
        lf.train(recipe, out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    trained = lf.train(recipe, out=tmp_path / "out", allow_other_base=True, **asked)
    assert Path(trained.adapter, "adapter_model.safetensors").is_file()


def test_what_is_loaded_on_another_base_is_told_and_what_is_made_of_it_keeps_its_own(
    other: Path, tiny_model_dir, tmp_path: Path, caplog
) -> None:
    base = tiny_model_dir("llama")
    theirs = saved(other, {"a": lf.LoRA(rank=2), "d": lf.DoRA(lf.LoRA(rank=2))}, tmp_path / "two")
    lora, dora = theirs / "a", theirs / "d"
    asked = {"model": base, "allow_other_base": True}
    lf.resize(lora, tmp_path / "small", rank=1, **asked)
    assert f"adapter {lora} was trained on another base (" in caplog.text
    assert "; loaded all the same (--allow-other-base)" in caplog.text
    lf.compose([lora, lora], tmp_path / "sum", **asked)
    for made in ("small", "sum"):  # are for the base that the adapter was trained on
        lf.load(fresh_model(other), tmp_path / made)
        with pytest.raises(LorafoldError, match=REFUSED):
            lf.load(fresh_model(base), tmp_path / made)
    lf.resize(dora, tmp_path / "of-both", rank=1, **asked)
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    how = {"data": ROWS, "device": "cpu", "init_adapter": lora}
    lf.train(recipe, out=tmp_path / "further", **asked, **how)
    lf.merge(base, [lora], tmp_path / "merged", allow_other_base=True, certificate=False)
    for made in ("of-both/lorafold.json", "further/lorafold.json", "merged/merge.json"):
        record = json.loads((tmp_path / made).read_text())
        assert "was trained on another base" in str(record["other_base"])


def test_a_server_takes_one_where_it_is_told_to(other: Path, tiny_model_dir, tmp_path) -> None:
    folder = saved(other, {"theirs": lf.LoRA(rank=2)}, tmp_path / "adapters")
    base = tiny_model_dir("llama")
    with running(base, folder) as server:
        assert server.complete("theirs", "Hello").status in (404, 409, 503)
        assert REFUSED in server.parts.registry.rejected["theirs"]
    # what was found out before holds for that answer alone
    with running(base, folder, allow_other_base=True) as server:
        assert server.text("theirs", "Hello")
        note = server.parts.registry.adapters["theirs"].note
        assert "was trained on another base" in note
