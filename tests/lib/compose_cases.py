"""Compositions, and the updates of weights that they are held against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

import lorafold as lf
from fresh_models import fresh_model
from lorafold.composing.request import ComposeRequest
from lorafold.composing.run import compose
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base

ROUNDING = 1e-5
Q = ["q_proj", "v_proj"]


def run(
    model: Path, adapters: Sequence[Path], out: Path, word: str = "linear", **options: Any
) -> Any:
    def unopened() -> Any:
        raise AssertionError("arithmetic asked for the model")

    request = ComposeRequest(Base(model), open_all(adapters), (word,), out, **options)
    return compose(request, unopened, Console(quiet=True)).composed[word]


def updates(model: Path, adapter: Path) -> dict[str, Tensor]:
    """dW by module path, from the folded weights of a model of its own."""
    before, after = fresh_model(model), fresh_model(model)
    for m in (before, after):  # the adapter may change one of them only
        m.config.tie_word_embeddings = False
    lf.load(after, adapter).merge(untie_weights=True)
    base = dict(before.named_parameters())
    changed = {name: p.detach() - base[name] for name, p in after.named_parameters()}
    return {name: change for name, change in changed.items() if change.any()}


def weighted(model: Path, adapters: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path, weight in zip(adapters, weights, strict=True):
        for name, change in updates(model, path).items():
            total[name] = total.get(name, 0) + weight * change
    return total


def same(found: dict[str, Tensor], expected: dict[str, Tensor], size: float = ROUNDING) -> None:
    """The same updates, as far as fp32 weights of about 0.02 to 1 tell."""
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert (found[name] - change).norm() <= size * change.norm(), name
