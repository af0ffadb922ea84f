"""The table of methods x layers on the page of methods agrees with attaching and folding.

merges: it runs, and merging then calling equals calling; runs: it runs, and has no form in weight
space; model: it is beside the layers of a model; no: it is refused
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafold as lf
from laws import BASES, move, to
from laws import METHODS as SPECS
from lorafold.errors import LorafoldError
from lorafold.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
COLUMNS = {
    "linear": "linear", "GPT-2's": "conv1d", "embedding": "embedding",
    "convolution": "convolution-2d", "grouped": "grouped", "NF4": "nf4", "int8": "int8",
    "FP8": "fp8", "int4": "int4",
}  # fmt: skip
OF_MODELS = {"houlsby", "pfeiffer", "prompt", "prefix", "linear-probe"}


def cell(method: str, base: str) -> str:
    if method in OF_MODELS:
        return "model"
    torch.manual_seed(0)
    make, inputs = BASES[base]
    root, x = to(nn.Sequential(make()), torch.float32), inputs(torch.Generator().manual_seed(1))
    try:
        adapter = lf.attach(root, SPECS.get(method) or METHODS[method](), ["0"])
    except LorafoldError:
        return "no"
    move(adapter, 0.02)
    y = root(x)
    try:
        adapter.merge()
    except lf.NotMergeable:
        return "runs"
    return "merges" if (root(x) - y).norm() <= 1e-5 * y.norm() else "differs"


def shown() -> list[list[str]]:
    """The rows of the page's table, of which one may be of several methods."""
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(r"^\| method (?:\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    lines = [line.strip("|").split("|") for line in table[0].splitlines()]
    return [[one.strip().replace("`", "") for one in line] for line in lines]


def test_the_table_has_every_method_over_every_layer() -> None:
    head, _, *rows = shown()
    assert head == ["method", *COLUMNS]
    assert sorted(name for row in rows for name in row[0].split(", ")) == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_where_the_page_says(method: str) -> None:
    rows = {name: row[1:] for row in shown() for name in row[0].split(", ")}
    assert [cell(method, base) for base in COLUMNS.values()] == rows[method]
