"""Gradient checkpointing changes memory alone, for every method, bit for bit."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import lorafold as lf
import training_cases
from lorafold.data.batches import StoredFeed
from lorafold.data.examples import encode
from lorafold.errors import LorafoldError
from lorafold.methods import METHODS, known_options, make_spec
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives.sft import Sft
from lorafold.ops import attention
from lorafold.ops.checkpoint_segments import save_outputs, saved_for_replay
from lorafold.recipe.recipe import Recipe
from lorafold.training.run import sample_losses
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from noise import moved
from training_cases import quiet
from typed_commands import write_rows

ROWS = [
    {"prompt": f"Book a table for {n} " * (1 + n % 3), "completion": f'{{"people": {n}}}'}
    for n in range(6)
]
OPTIONS: dict[str, dict[str, Any]] = {
    "lt-sft": {"dense_steps": 2, "density": 0.05},
    "fish": {"samples": 3, "density": 0.05},
}
SEED = 3
BLOCKS = 2  # of the tiny models


def options_of(method: str) -> dict[str, Any]:
    return OPTIONS.get(method, {}) | (
        {"dropout": 0.3} if "dropout" in known_options(method) else {}
    )


class Step:
    """A step; `runs`: how often the first block ran; `random`: the random state after it."""

    def __init__(
        self, model: Any, tokenizer: Any, method: str, packing: bool, checkpointed: bool,
        seed: int = SEED, targets: Any = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(SEED)
        data = encode(ROWS, tokenizer, 64)
        feed = StoredFeed(data.examples, data.parts, 3, 2, 0)
        adapter = lf.attach(model, make_spec(method, **options_of(method)), targets)
        if checkpointed:
            enable_gradient_checkpointing(model)
        with Sft().loss(model, tokenizer, packing, quiet()) as loss:
            assert loss.packed is packing
            losses = partial(sample_losses, loss, feed, Recipe(batch=3))
            adapter.spec.prepare(adapter.own_deltas, losses)
            moved(adapter, 0.05, 1)
            loss.train()
            self.runs = 0
            first_linear(model).register_forward_pre_hook(self.count)
            torch.manual_seed(seed)
            total = loss(**loss.collate(data.examples, torch.device("cpu"))) / 10
            added = adapter.spec.penalty(adapter.own_deltas)
            total = total if added is None else total + added
            total.backward()
        self.loss, self.random = total.detach(), torch.get_rng_state()
        named = list(adapter.named_parameters())
        self.grads: dict[str, Tensor] = {n: p.grad for n, p in named if p.grad is not None}
        self.missing = [name for name, p in named if p.numel() and p.grad is None]

    def count(self, *_: object) -> None:
        self.runs += 1


def first_linear(model: nn.Module) -> nn.Module:
    """The first one of the first block: a replay stops before a block's last ones."""
    return next(m for name, m in model.named_modules() if name.endswith(("q_proj", "c_attn")))


def assert_same(plain: Step, checkpointed: Step) -> None:
    assert torch.isfinite(plain.loss)
    assert torch.equal(checkpointed.loss, plain.loss)
    assert plain.missing == checkpointed.missing == []
    assert any(g.any() for g in plain.grads.values())
    grads = checkpointed.grads
    assert [name for name, g in plain.grads.items() if not torch.equal(grads[name], g)] == []
    # the next step draws what it would have drawn
    assert torch.equal(checkpointed.random, plain.random)


@pytest.mark.few(4)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_gradients(method, packing, tiny_model, tiny_model_dir) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    plain, checkpointed = (
        Step(tiny_model("llama"), tokenizer, method, packing, on) for on in (False, True)
    )
    assert_same(plain, checkpointed)
    if "dropout" in known_options(method):
        other = Step(tiny_model("llama"), tokenizer, method, packing, False, seed=SEED + 1)
        assert not torch.equal(other.loss, plain.loss)  # dropout is really on
    # a probe trains nothing beneath the head, so there is nothing to recompute
    assert checkpointed.runs == (plain.runs if method == "linear-probe" else 2 * plain.runs)


@pytest.mark.few(5)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("method", METHODS)
def test_so_it_is_over_a_bf16_base(method: str, tiny_model, tiny_model_dir) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    assert_same(
        *(Step(tiny_model("llama").bfloat16(), tokenizer, method, True, on) for on in (False, True))
    )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma", "qwen2"])
def test_the_models_own_dropout_is_replayed_too(kind, packing, tiny_model, tiny_model_dir) -> None:
    # gpt2 has dropout everywhere; in the others it is switched on in attention
    tokenizer = load_tokenizer(tiny_model_dir(kind))

    def step(on: bool) -> Step:
        model = tiny_model(kind)
        for module in model.modules():
            if hasattr(module, "attention_dropout") and not isinstance(
                module.attention_dropout, nn.Module
            ):
                module.attention_dropout = 0.2
        return Step(model, tokenizer, "lora", packing, on)

    plain = step(False)
    assert_same(plain, step(True))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_long_attention_runs_once(kind, tiny_model, tiny_model_dir, monkeypatch, each_form) -> None:
    runs = []
    attended = attention.FORWARD
    monkeypatch.setattr(attention, "FORWARD", lambda *args: runs.append(1) or attended(*args))

    def step(on: bool, long: int) -> tuple[Step, int]:
        monkeypatch.setattr(attention, "SAVE_FROM_LENGTH", long)
        runs.clear()
        tokenizer = load_tokenizer(tiny_model_dir(kind))
        return Step(tiny_model(kind), tokenizer, "lora", True, on), len(runs)

    (plain, once), (kept, still), (replayed, twice) = step(False, 1), step(True, 1), step(True, 999)
    assert still == once > 0
    assert twice == once + BLOCKS
    assert_same(plain, kept)
    assert_same(plain, replayed)


def test_a_kept_output_is_taken_in_every_replay_unless_it_was_written_to() -> None:
    made = []

    def segment(x: Tensor) -> Tensor:
        return Squared.apply(x, made) * x

    x = torch.tensor([3.0], requires_grad=True)
    y = checkpoint(segment, x, use_reentrant=False, context_fn=save_outputs)
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad == 2 * 3 * 3**2
    assert len(made) == 1
    x.grad = None
    y = checkpoint(segment, x, use_reentrant=False, context_fn=save_outputs)
    made[1].mul_(2)
    y.backward()
    assert x.grad == 3 * 3**2
    assert len(made) == 3


class Squared(Function):
    """x^2, which is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: list[Tensor]) -> Tensor:
        def make() -> Tensor:
            made.append(x.square())
            return made[-1]

        ctx.save_for_backward(x)
        return saved_for_replay(make)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 2 * x * g, None


@pytest.mark.slow
def test_a_whole_run_gives_the_same_bytes(tiny_model_dir, tmp_path: Path) -> None:
    labelled = [
        {"text": f"the cat sat {n} times", "label": "even" if n % 2 == 0 else "odd"}
        for n in range(8)
    ]
    for objective, rows in {"sft": ROWS, "classify": labelled}.items():
        found = []
        fields = {"objective": objective, "steps": 4, "lr": 1e-2, "lr_b": 5e-2, "accumulate": 2}
        for on in (False, True):
            how = fields | {"dropout": 0.3, "gradient_checkpointing": on}
            out = tmp_path / f"{objective}-{on}"
            training_cases.trained(tiny_model_dir("llama"), out, rows, **how)
            found.append((out / "adapter_model.safetensors").read_bytes())
        assert found[0] == found[1]


def test_frozen_blocks_below_the_lowest_trained_one_run_once(tiny_model, tiny_model_dir) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    upper = [r"model.layers.1.mlp.down_proj"]
    plain, checkpointed = (
        Step(tiny_model("llama"), tokenizer, "lora", True, on, targets=upper)
        for on in (False, True)
    )
    assert_same(plain, checkpointed)
    assert checkpointed.runs == plain.runs


def test_a_model_that_cant_is_one_clear_error_and_leaves_nothing(tiny_model_dir, tmp_path) -> None:
    tokenizer, model = load_tokenizer(tiny_model_dir("llama")), tmp_path / "model"
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = tf.OpenAIGPTConfig(vocab_size=len(tokenizer), **size)
    tf.OpenAIGPTLMHeadModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    told = "^gradient_checkpointing: not supported by this model: OpenAIGPTLMHeadModel "
    how = {"gradient_checkpointing": True, "targets": ["c_attn"]}
    with pytest.raises(LorafoldError, match=told):
        training_cases.trained(model, tmp_path / "a", ROWS, **how)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_command_takes_it_and_the_optimizer_as_words(tiny_model_dir, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    where = f"--model {tiny_model_dir('llama')} --data {data} --out {tmp_path / 'a'} --device cpu"
    how = "--storage fp32 --set steps=2 --set rank=64 --gradient-checkpointing on --verbose"
    words = f"-m lorafold train {where} {how} --optimizer paged-adamw8bit --json".split()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    told = ("paged", "Warning", "kernels")
    lines = [line for line in done.stderr.splitlines() if any(word in line for word in told)]
    assert lines == [
        "optimizer: paged-adamw8bit with 8-bit state, 377.6 kB (not paged: not supported on the"
        " CPU)"
    ]
    recipe = json.loads((tmp_path / "a" / "lorafold.json").read_text())["recipe"]
    assert (recipe["optimizer"], recipe["gradient_checkpointing"]) == ("paged-adamw8bit", True)
