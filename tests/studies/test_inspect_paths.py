"""Losses along straight lines in weight space, against models whose weights were moved by hand."""

import pytest
import torch

import lorafold as lf
from lorafold.core.attach import adapted_modules, selection_of
from lorafold.errors import LorafoldError
from lorafold.inspecting.loss_paths import (
    barrier,
    compare_losses,
    loss_between,
    loss_by_scale,
    loss_function,
    measure_paths,
)
from lorafold.layers import layer_of
from lorafold.methods import make_spec
from lorafold.models.tokenizer import load_tokenizer

TEXTS = ("Book a table for four at the Copper Lantern", "Remind me to call the plumber tomorrow")
ROWS = [{"text": text} for text in TEXTS]
METHODS = {
    "lora": ("lora", {}), "pissa": ("pissa", {}), "loha": ("loha", {}), "dora": ("dora", {}),
    "bias": ("lora", {"bias": "all"}), "saved": ("lora", {}),
}  # fmt: skip


def laid(model, method: str, name: str, seed: int, **options) -> lf.Adapter:
    torch.manual_seed(seed)
    adapter = lf.attach(model, make_spec(method, rank=4), name=name, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return adapter


def changes(adapter: lf.Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """What folding adds to weight and bias, by module path."""
    found = {}
    for path, delta in adapter.deltas.items():
        layer = layer_of(adapter.model.get_submodule(path))
        w, b = (t if t is None else t.detach() for t in layer.dense())
        new_w, new_b = (t if t is None else t.detach() for t in delta.fold(w, b))
        found[path] = (new_w - w, None if new_b is None else new_b - (0 if b is None else b))
    return found


def moved(model, *weighted: tuple[float, dict]):
    with torch.no_grad():
        for weight, by_path in weighted:
            for path, (dw, db) in by_path.items():
                module, layer = model.get_submodule(path), layer_of(model.get_submodule(path))
                whole = module.weight.shape == dw.shape and layer.dense()[0] is module.weight
                module.weight += weight * (dw if whole else dw.t())
                if db is not None:
                    module.bias += weight * db
    return model


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("case", METHODS)
def test_the_lines_are_straight_in_weight_space(case, kind, tiny_model, tiny_model_dir):
    method, options = METHODS[case]
    if case == "saved":
        options = {"modules_to_save": ["transformer.ln_f" if kind == "gpt2" else "model.norm"]}
    tokenizer, model = load_tokenizer(tiny_model_dir(kind)), tiny_model(kind)
    first = changes(laid(model, method, "a", 0, **options))
    second = changes(laid(model, "lora", "b", 1))
    loss = loss_function(model, tokenizer, ROWS, 64)
    along = loss_by_scale(model, "a", loss, (-0.5, 0.0, 1.0, 1.5))
    across = loss_between(model, "a", "b", loss, (0.0, 0.25, 1.0))
    for t, found in along:
        expected = loss_function(moved(tiny_model(kind), (t, first)), tokenizer, ROWS, 64)()
        assert found == pytest.approx(expected, rel=1e-5)
    for t, found in across:
        model = moved(tiny_model(kind), (1 - t, first), (t, second))
        expected = loss_function(model, tokenizer, ROWS, 64)()
        assert found == pytest.approx(expected, rel=1e-5)
    losses = [loss for _, loss in along]
    assert max(losses) - min(losses) > 1e-3  # the line leads somewhere


def test_the_ends_are_the_base_and_the_adapters_and_the_model_is_left_as_it_was(
    tiny_model, tiny_model_dir
):
    tokenizer, model = load_tokenizer(tiny_model_dir("llama")), tiny_model("llama")
    bare = loss_function(tiny_model("llama"), tokenizer, ROWS, 64)()
    laid(model, "lora", "a", 0)
    # only some of the modules, and its update is zero
    lf.attach(model, lf.LoRA(rank=2), ["q_proj"], name="b")
    state = {path: list(m.deltas) for path, m in adapted_modules(model)}
    found = measure_paths(model, tokenizer, ROWS, 64)
    loss = loss_function(model, tokenizer, ROWS, 64)
    with lf.only(model, "a"):
        a = loss()
    assert dict(found.scaling)[0.0] == pytest.approx(bare, rel=1e-6)
    assert dict(found.scaling)[1.0] == pytest.approx(a, rel=1e-5)
    assert found.between[0][1] == pytest.approx(a, rel=1e-5)
    assert found.between[-1][1] == pytest.approx(bare, rel=1e-6)
    assert found.barrier == barrier(found.between)
    assert selection_of(model).names == ("a", "b")
    assert {path: list(m.deltas) for path, m in adapted_modules(model)} == state
    expected = {"loss_before": a, "loss_after": bare}
    assert compare_losses(model, tokenizer, ROWS, 64) == pytest.approx(expected)


def test_barrier_is_measured_from_the_line_between_the_ends():
    line = [(i / 10, 1 + i / 10) for i in range(11)]
    assert barrier(line) == pytest.approx(0)
    assert barrier([(t, loss + 4 * t * (1 - t)) for t, loss in line]) == pytest.approx(1)
    assert barrier([(t, loss - 4 * t * (1 - t)) for t, loss in line]) == pytest.approx(0)


def test_new_tokens_stay_as_they_are_along_a_line(tiny_model_dir, tmp_path):
    base, rows = tiny_model_dir("llama"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi<|user|>", "completion": "<|bot|> there"}\n' * 3)
    words = ["<|user|>", "<|bot|>"]
    recipe = lf.Recipe(new_tokens=words, steps=2, batch=2, storage="fp32", lr=0.1)
    data = {"model": base, "data": rows, "device": "cpu"}
    lf.train(recipe, out=tmp_path / "nt", **data)
    found = lf.inspect(tmp_path / "nt", storage="fp32", **data).paths
    how = {"adapters": [tmp_path / "nt"], "storage": "fp32", "device": "cpu"}
    expected = lf.evaluate(base, rows, completions=False, **how).loss
    at = dict(found.scaling)
    assert at[1.0] == pytest.approx(expected, rel=1e-5)
    assert at[0.0] != pytest.approx(expected, rel=1e-5)
    with pytest.raises(LorafoldError, match="both have new tokens"):
        lf.inspect(tmp_path / "nt", against=tmp_path / "nt", storage="fp32", **data)
