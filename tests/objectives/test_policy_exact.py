"""exact=true: the sampler's log-probabilities are the trainer's, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafold as lf
from conftest import SIZE
from lorafold.engine import Engine, Request
from lorafold.engine.operations import unsteady
from lorafold.errors import LorafoldError
from lorafold.training_step.lm_head_loss import token_losses

pytestmark = pytest.mark.usefixtures("unestimated")
ROWS = [{"prompt": word} for word in ("r", "Say blue", "Say green, and then say gold", "Say red")]


def length(completion: str) -> float:
    return len(set(completion))


def mismatch(model: Any, out: Path, exact: bool = True, **changes: Any) -> list[float]:
    """The largest difference of each step."""
    options = {"group": 3, "max_new_tokens": 9, "exact": exact, **changes.pop("options", {})}
    given = {"objective": "grpo", "steps": 3, "batch": 2, "storage": "fp32", "lr": 0.05, "seed": 1}
    above = {name: changes.pop(name) for name in ("over",) if name in changes}
    recipe = lf.Recipe(**{**given, **changes}, objective_options=options)
    lf.train(recipe, model=model, data=ROWS, rewards=length, out=out, overwrite=True, **above)
    found = lf.history(out).steps["largest mismatch"]
    assert len(found) == 3
    return [float(one) for one in found if one is not None]


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "bf16"},
        {"storage": "int8", "method": "dora"},
        {"storage": "nf4", "options": {"updates": 2}},
        {"method": "vera"},
        {"method": "ia3", "beta": 0.1},
        {"method": "full", "lr": 0.01},
        {"method": "lora", "targets": ("lm_head", "q_proj")},
        {"gradient_checkpointing": True, "accumulate": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_there_is_no_difference(
    changes: dict[str, Any], tiny_model, tiny_model_dir, tmp_path: Path
) -> None:
    shapes = [tuple(p.shape) for p in tiny_model("llama").parameters() if p.dim() == 2]
    if any(unsteady(shapes, dtype) for dtype in (torch.float32, torch.bfloat16)):
        pytest.skip("products of this processor depend on the number of rows")
    assert mismatch(tiny_model_dir("llama"), tmp_path / "out", **changes) == [0.0, 0.0, 0.0]


def test_a_policy_over_an_adapter(tiny_model_dir, tmp_path: Path) -> None:
    mismatch(tiny_model_dir("llama"), tmp_path / "below", method="dora")
    above = {"over": tmp_path / "below", "storage": "fp32"}
    found = mismatch(tiny_model_dir("llama"), tmp_path / "above", **above)
    assert found == [0.0, 0.0, 0.0]


def test_without_it_there_is_rounding(tiny_model_dir, tmp_path: Path) -> None:
    found = mismatch(tiny_model_dir("llama"), tmp_path / "out", exact=False)
    assert all(0 < one < 0.2 for one in found)


@pytest.mark.parametrize("length", [6, 15])
def test_a_pass_has_as_many_tokens_as_it_needs(length: int, tiny_model) -> None:
    with Engine(tiny_model("llama"), slots=1, length=length, as_trained=True) as engine:
        stream = engine.submit(Request("1", (5, 6, 7), length - 3))
        engine.run()
        assert len(stream.result().tokens) == length - 3


def test_few_positions_have_the_bits_of_many() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {"hidden_size": 576}, vocab_size=300)).eval()
    ids = torch.randint(300, (1, 300))
    inputs = {"input_ids": ids}

    def losses(n: int) -> torch.Tensor:
        labels = ids.roll(-1).masked_fill(torch.arange(300) >= n, -100)
        return token_losses(model, labels, inputs, own=True)

    if unsteady([(300, 576)], torch.float32):
        pytest.skip("products of this processor depend on the number of rows")
    whole = losses(290)
    for n in (1, 3, 5, 257, 259):
        assert torch.equal(losses(n), whole[:n])


def test_padded_sequences_are_refused(tiny_model_dir, tmp_path: Path) -> None:
    with pytest.raises(LorafoldError, match="exact: found padded sequences, expected packed ones"):
        mismatch(tiny_model_dir("llama"), tmp_path / "out", packing=False)
    assert not (tmp_path / "out").exists()
