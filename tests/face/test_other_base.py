"""An adapter of another base is refused, and taken where `allow_other_base` is on: where a run
trains over it or starts from it, and where it is served.
"""

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


def test_a_server_takes_one_where_it_is_told_to(
    other: Path, tiny_model_dir, tmp_path: Path
) -> None:
    folder = saved(other, {"theirs": lf.LoRA(rank=2)}, tmp_path / "adapters")
    base = tiny_model_dir("llama")
    with running(base, folder) as server:
        assert server.complete("theirs", "Hello").status in (404, 409, 503)
        assert REFUSED in server.parts.registry.wrong["theirs"]
    # what was found out before holds for that answer alone
    with running(base, folder, allow_other_base=True) as server:
        assert server.text("theirs", "Hello")
