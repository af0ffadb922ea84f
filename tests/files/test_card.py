"""The model card of an adapter: what it says of PEFT is what PEFT does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

import lorafold as lf
from lorafold.methods import METHODS, make_spec

ADAPTERS = [name for name in METHODS if not make_spec(name).trains_base]


@pytest.mark.few(7)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_card_says_whether_peft_reads_it(name: str, tiny_model: Any, tmp_path: Path) -> None:
    lf.attach(tiny_model("llama"), make_spec(name)).save(tmp_path / "a")
    try:
        peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a")
    except (KeyError, ValueError):
        reads = False
    else:
        reads = True
    _, front, text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert ("from peft import PeftModel" in text) is reads
    assert ("PEFT does not support this type of adapter" in text) is not reads
    assert ("in PEFT's format" in text) is reads
    assert yaml.safe_load(front)["library_name"] == ("peft" if reads else "lorafold")


ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
CODE = re.compile(r"```python\n(.*?)```", re.S)


def snippet(out: Path) -> str:
    """The code of a card, which reads the adapter where it is."""
    text = (out / "README.md").read_text(encoding="utf-8")
    return "\n".join(CODE.findall(text)).replace("path/to/this/directory", str(out))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unestimated")
def test_the_card_of_a_base_of_the_hub_runs_as_it_is_written(tiny_model_dir, tmp_path, monkeypatch):
    cached, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    shutil.copytree(tiny_model_dir("llama"), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    lf.train(recipe, model="someone/tiny", data=ROWS, out=tmp_path / "a", device="cpu")
    code, found = snippet(tmp_path / "a"), dict[str, Any]()
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny")' in code
    lorafold_s, peft_s = code.split("from peft")
    exec(lorafold_s, found)
    assert isinstance(found["adapter"], lf.Adapter)
    found["adapter"].detach()
    exec(f"from peft{peft_s}", found)
    assert isinstance(found["model"], peft.PeftModel)


def test_the_embedded_model_is_opened_by_the_library_that_knows_it(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    model.config._name_or_path = "smollm2"
    lf.attach(model, lf.LoRA()).save(tmp_path / "a")
    assert 'model = lf.load_model("smollm2")\n' in snippet(tmp_path / "a")
    assert 'from_pretrained("smollm2' not in snippet(tmp_path / "a")


@pytest.mark.usefixtures("unestimated")
def test_the_card_has_what_the_run_took_where_the_recipe_says_nothing(tiny_model_dir, tmp_path):
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    base = tiny_model_dir("llama")
    lf.train(recipe, model=base, data=ROWS, out=tmp_path / "a", device="cpu")
    text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    spec = lf.LoRA()
    shown = {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": "all-linear"}
    for name, value in (shown | {"lr": spec.lr, "lr b": spec.lr_b}).items():
        assert f"| {name} | {value} |" in text
    assert f'from_pretrained("path/to/{base.name}")' in text
