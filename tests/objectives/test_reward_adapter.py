"""A reward adapter of the policy's own base as a reward: its scores are those of `lf.score`, its
base is the policy's tensors, and what can't score is refused before anything runs.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import lorafold as lf
from conftest import lorafold, refused
from lorafold.errors import LorafoldError
from lorafold.evaluation.reward_adapter import RewardAdapter
from lorafold.opening import Base
from lorafold.rewards import Judged, Rewards
from lorafold.training import loop

pytestmark = pytest.mark.usefixtures("unestimated")
WORDS = ("red", "blue", "green", "gold")
PAIRS = [
    {"prompt": f"Say {word}", "chosen": f"{word} it is", "rejected": "no, " * n + "not that"}
    for n, word in enumerate(WORDS, 1)
]
TEXTS = ["red it is", "", "no", "<|im_end|> is a text here", "table " * 30, "no, no"]
ROWS = [{"prompt": f"Say {word}"} for word in WORDS]


def recipe(**changes: Any) -> lf.Recipe:
    given = {"steps": 2, "batch": 2, "max_length": 96, "storage": "fp32"}
    return lf.Recipe(**{**given, **changes})


def policy(model: Path, out: Path, *rewards: Any, **changes: Any) -> Any:
    options = {"group": 3, "max_new_tokens": 5}
    asked = recipe(objective="grpo", objective_options=options, **changes.pop("recipe", {}))
    return lf.train(asked, model=model, data=ROWS, out=out, rewards=[*rewards], **changes)


def reward_model(model: Path, out: Path, **changes: Any) -> Path:
    asked = recipe(objective="reward", lr=3e-2, **changes.pop("recipe", {}))
    lf.train(asked, model=model, data=PAIRS, out=out, **changes)
    return out


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model, and a reward adapter of it."""
    model = tiny_model_dir("llama")
    return model, reward_model(model, tmp_path_factory.mktemp("reward") / "adapter")


@contextmanager
def scoring(model: Any, text: str, base: Base, packing: bool = True) -> Iterator[Any]:
    with RewardAdapter.of(text, base).over(model, packing, Console(quiet=True)) as found:
        yield found


def judged(prompt: Any, texts: list[str], **row: Any) -> list[Judged]:
    return [Judged(prompt, text, row, f"completion {n}") for n, text in enumerate(texts, 1)]


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_those_of_score_and_the_base_is_the_policy_s(
    storage: str, packing: bool, tiny_model_dir, tmp_path: Path
) -> None:
    directory = tiny_model_dir("llama-wide")
    out = reward_model(directory, tmp_path / "reward", recipe={"storage": storage})
    base = Base(directory, storage, device="cpu")
    model = base.load()
    before = {p.data_ptr() for p in model.parameters()}
    policy = lf.attach(model, lf.LoRA(rank=2, dropout=0.0), name="policy").requires_grad_()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.train()
    rows = [{"prompt": "Say red", "completion": text} for text in TEXTS if text]
    expected = lf.score(str(directory), rows, adapters=out, storage=storage, device="cpu").rows
    with scoring(model, f"adapter:{out}", base, packing) as found:
        scores = found(judged("Say red", TEXTS))
        own = {n: p for n, p in found.shell.named_parameters() if p.data_ptr() not in before}
        assert all(".deltas.reward1." in n or n == "score.weight" for n in own), own.keys()
        assert not any(p.requires_grad for p in found.shell.parameters())
        assert not any("policy" in n for n, _ in found.shell.named_parameters())
    assert len({round(score, 6) for score in scores}) == len(TEXTS)
    near = 1e-4 if storage == "fp32" else 2e-2
    of_score = [row.scores["score"] for row in expected]
    assert [s for s, text in zip(scores, TEXTS, strict=True) if text] == pytest.approx(
        of_score, rel=near, abs=near
    )
    # the policy is what it was
    assert model.training
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "gpt2"])
def test_every_kind_of_decoder_has_a_shell(kind: str, tiny_model_dir, tmp_path: Path) -> None:
    directory = tiny_model_dir(kind)
    out = reward_model(directory, tmp_path / "reward")
    base = Base(directory, "fp32", device="cpu")
    rows = [{"prompt": "Say red", "completion": text} for text in TEXTS[2:]]
    expected = lf.score(str(directory), rows, adapters=out, device="cpu").rows
    with scoring(base.load(), f"adapter:{out}", base) as found:
        scores = found(judged("Say red", TEXTS[2:]))
    assert scores == pytest.approx([row.scores["score"] for row in expected], rel=1e-4, abs=1e-5)


def test_a_policy_trains_with_it_and_resumes_exactly(
    reward: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    directory, out = reward
    seen: list[float] = []

    def short(prompt: Any, completion: str, where: str = "") -> float:
        seen.append(-float(len(completion)))
        return seen[-1]

    mine = shutil.copytree(out, tmp_path / "mine")
    names = f"0.5*adapter:{mine}", short
    whole = policy(directory, tmp_path / "whole", *names, recipe={"steps": 4, "save_every": 2})
    figures = whole.figures
    assert whole.steps == 4
    own = loop.train_step

    def killed(*given: Any, **how: Any) -> Any:
        killed.steps += 1
        if killed.steps == 4:
            raise KeyboardInterrupt
        return own(*given, **how)

    killed.steps = 0
    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        policy(directory, tmp_path / "cut", *names, recipe={"steps": 4, "save_every": 2})
    monkeypatch.setattr(loop, "train_step", own)
    (mine / "README.md").write_text("Told otherwise.")
    changed = load_file(mine / "adapter_model.safetensors")
    resumed = policy(
        directory, tmp_path / "cut", *names, recipe={"steps": 4, "save_every": 2}, resume=True
    )
    assert resumed.losses == whole.losses
    assert figures == resumed.figures
    first, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert changed
