"""Whole verbs, from rows to files, compute on a GPU what they compute on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import lorafold as lf
from conftest import make_tokenizer, unestimating
from device_cases import HERE, REAL, SIZE, engines_know_shadows, moved, on_device
from shadow import WHERE
from training_cases import stopping

pytestmark = HERE
ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
PAIRS = [{"prompt": f"What is {i}?", "chosen": "It is.", "rejected": "No."} for i in range(4)]
RECIPE: dict[str, Any] = {"steps": 3, "batch": 4, "max_length": 64}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Module.to` puts shadows in the place of parameters, and engines know shadows."""
    if REAL:
        return
    plain = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        given = [*args, *kwargs.values()]
        if any(a is not None and torch.device(a) == WHERE for a in given if not is_dtype(a)):
            moved(module)
        dtypes = list(filter(is_dtype, given))
        return plain(module, *dtypes) if dtypes else module

    monkeypatch.setattr(nn.Module, "to", to)
    engines_know_shadows(monkeypatch)


def is_dtype(x: Any) -> bool:
    return isinstance(x, torch.dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, tokenizer = tmp_path_factory.mktemp("model") / "llama", make_tokenizer()
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZE | {"vocab_size": len(tokenizer)})
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


class Both(NamedTuple):
    there: Any
    here: Any


def both(verb: Callable[[str, str], Any]) -> Both:
    """What a verb gives on the device and on the CPU."""
    with unestimating():
        with on_device():
            there = verb(str(WHERE), "there")
        return Both(there, verb("cpu", "here"))


def trained(model: Path, out: Path, device: str, method: str = "lora", **more: Any) -> Any:
    recipe = lf.Recipe(**RECIPE | {"storage": "fp32", "method": method} | more)
    return lf.train(recipe, model=model, data=ROWS, eval_data=ROWS, out=out, device=device)


@pytest.fixture
def adapters(model: Path, tmp_path: Path) -> list[Path]:
    """Two that were trained on the CPU."""
    with unestimating():
        for seed in (1, 2):
            trained(model, tmp_path / f"a{seed}", "cpu", seed=seed, lr=1e-2)
    return [tmp_path / "a1", tmp_path / "a2"]


@pytest.mark.few(1)
@pytest.mark.parametrize("storage", ["fp32", "nf4"] if REAL else ["fp32"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera"])
def test_a_run_from_rows_to_files(model: Path, tmp_path: Path, method: str, storage: str) -> None:
    def run(device: str, name: str) -> Any:
        return trained(model, tmp_path / name, device, method, storage=storage)

    found, expected = both(run)
    close = {"rel": 1e-5} if storage == "fp32" else {"rel": 2e-2}
    assert found.train_loss == pytest.approx(expected.train_loss, **close)
    assert found.eval_loss == pytest.approx(expected.eval_loss, **close)
    if storage == "fp32":
        ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("there", "here"))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_run_goes_on(model: Path, tmp_path: Path) -> None:
    given = {"steps": 4, "save_every": 1, "dropout": 0.1}
    with unestimating(), on_device():
        whole = trained(model, tmp_path / "whole", str(WHERE), **given)
        with stopping(2), pytest.raises(KeyboardInterrupt):
            trained(model, tmp_path / "out", str(WHERE), **given)
        recipe = lf.Recipe(**RECIPE | {"storage": "fp32"} | given)
        resumed = lf.train(
            recipe, model=model, data=ROWS, eval_data=ROWS, out=tmp_path / "out",
            device=str(WHERE), resume=True,
        )  # fmt: skip
    assert resumed.train_loss == whole.train_loss
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.few(1)
@pytest.mark.parametrize("verb", ["evaluate", "generate", "inspect", "compose", "merge",
                                  "fragility", "preferences"])  # fmt: skip
def test_verbs(verb: str, model: Path, adapters: list[Path], tmp_path: Path) -> None:
    kept = {"model": model, "storage": "fp32"}

    def run(device: str, name: str) -> Any:
        on: dict[str, Any] = {**kept, "device": device}
        if verb == "evaluate":
            found = lf.evaluate(data=ROWS, adapters=adapters[0], max_new_tokens=8, **on)
            return [found.loss, found.exact_match]
        if verb == "preferences":
            found = lf.evaluate(data=PAIRS, adapters=adapters[0], completions=False, **on)
            assert found.preference is not None
            return [found.preference.preference_loss, found.preference.preference_accuracy]
        if verb == "generate":
            return lf.generate(prompts="What is 3?", adapters=adapters[0], max_new_tokens=8, **on)
        if verb == "inspect":
            found = lf.inspect(adapters[0], model=model, device=device)
            return [site.base.norm for site in found.sites.values()]
        out = tmp_path / name
        if verb == "fragility":
            found = lf.fragility(
                out, probes=lf.Probes(ROWS[:2], ROWS[2:4], max_new_tokens=4), data=ROWS[4:],
                adapters=adapters[0], tuning=lf.Tuning([4], [2]),
                defending=lf.Defending(["none", "projected"]), **on,
            )  # fmt: skip
            return [point.kept for point in found.points]
        if verb == "compose":
            lf.compose(adapters, out, **on)
            return load_file(out / WEIGHTS)
        lf.merge(model, adapters[0], out, storage="fp32", device=device)
        return load_file(out / "model.safetensors")

    found, expected = both(run)
    if verb == "generate":
        assert found == expected
    elif isinstance(expected, list):
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
