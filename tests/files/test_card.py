"""The model card of an adapter: what it says of PEFT is what PEFT does."""

from __future__ import annotations

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
    assert ("PEFT has no such adapters and refuses these files" in text) is not reads
    assert ("in PEFT's format" in text) is reads
    assert yaml.safe_load(front)["library_name"] == ("peft" if reads else "lorafold")
