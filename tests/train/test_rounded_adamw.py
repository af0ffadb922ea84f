"""AdamW on 16-bit parameters: fp32's steps in expectation."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import refused
from lorafold.adapter import attach
from lorafold.core.rounding import generator_of, turn_rounded
from lorafold.errors import LorafoldError
from lorafold.memory.estimate import changes_of, estimate
from lorafold.memory.presets import memory_setting
from lorafold.memory.trace import Ledger, distinct_bytes
from lorafold.methods import make_spec
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.ops import arithmetic
from lorafold.recipe.recipe import Recipe
from lorafold.training_step import optimizers
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.lm_head_loss import labelled_loss
from lorafold.training_step.optimizers import RoundedAdamW, make_optimizer, state_bytes
from lorafold.training_step.param_groups import optimizer_tensors, restore_optimizer, sum_in_fp32
from memory_cases import COMMON, CONFIGS, LORA, close
from rounding_cases import DTYPES
from training_cases import trained
from typed_commands import write_rows

pytestmark = pytest.mark.usefixtures("unestimated")

OPTIONS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}
SHAPES = ((40, 50), (7,), (), (3, 1001))
FULL_IN_BF16 = replace(LORA, base=Storage(torch.bfloat16), spec=make_spec("full"))


def random(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def made(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(random(shape, i).to(dtype)) for i, shape in enumerate(shapes)]


def step(optimizer: Optimizer, tensors: list[nn.Parameter], seed: int) -> None:
    for i, p in enumerate(tensors):
        p.grad = random(p.shape, 100 * seed + i).to(p.dtype)
    optimizer.step()


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_turned_keeps_the_sign_of_zero_and_what_is_no_number(dtype: torch.dtype) -> None:
    zero = turn_rounded(torch.tensor([-0.0, 0.0]), dtype, generator_of(0, "x"), 1)
    assert zero.signbit().tolist() == [True, False]
    # 0x7FFFFFFF is the NaN of CUDA's arithmetic
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert turn_rounded(odd.repeat(50), dtype, generator_of(0, "x"), 1).isnan().all()


def test_equal_updates_add_up_to_less_than_a_unit_of_error() -> None:
    """Independent numbers would be off by sqrt(T p (1 - p)) units, 4 here."""
    steps, share = 200, 0.09  # updates of 0.09 units
    w, unit = torch.ones(2000).bfloat16(), torch.finfo(torch.bfloat16).eps
    start = w.clone()
    for t in range(steps):
        w = turn_rounded(w.float() + share * unit, torch.bfloat16, generator_of(0, "w"), t)
    error = (w - start).double() / unit - steps * share
    assert error.square().mean().sqrt() < 0.8


@pytest.mark.parametrize("fused", [False, True])
def test_fp32_parameters_are_updated_as_by_torch(fused: bool) -> None:
    """Beside 16-bit ones too."""
    ours, theirs, beside = made(torch.float32), made(torch.float32), made(torch.bfloat16)
    options = OPTIONS | {"fused": fused}
    one, other = RoundedAdamW([*ours, *beside], **options), AdamW(theirs, **options)
    for seed in range(4):
        step(one, [*ours, *beside], seed)
        step(other, theirs, seed)
    assert same(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert one.state[p].keys() == other.state[q].keys()
        assert same([*one.state[p].values()], [*other.state[q].values()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_over_the_seeds_the_mean_is_fp32s_update(dtype: torch.dtype) -> None:
    """At the third step; to the nearest, nothing of the update would be left."""
    n, draws = 4000, 400
    grads = [random((n,), 1 + i).to(dtype) for i in range(3)]
    start = random((n,), 0).to(dtype)

    def after(optimizer: type[Optimizer], p: nn.Parameter, **more: Any) -> Tensor:
        """Of the third step, the first two with a rate of 0."""
        made = optimizer([p], **OPTIONS, **more)
        for i, g in enumerate(grads):
            made.param_groups[0]["lr"] = OPTIONS["lr"] * (i == 2)
            p.grad = g.to(p.dtype)
            made.step()
        return p.detach().double()

    update = after(AdamW, nn.Parameter(start.float())) - start.double()
    unit = torch.finfo(dtype).eps * start.double().abs().log2().floor().exp2()
    assert (update.abs() < unit / 2).double().mean() > 0.95
    found = [after(RoundedAdamW, nn.Parameter(start.clone()), seed=s) for s in range(draws)]
    moved = torch.stack(found).mean(0) - start.double()
    # a draw is one of two values a unit apart: the mean of n is off by unit / (2 sqrt n) at most,
    # and six times that leaves 2e-9 to chance for each weight
    assert ((moved - update).abs() <= 6 * unit / (2 * draws**0.5)).all()
    # and the projection on the update, in units, by |update| / (2 sqrt n) of |update|^2
    u = update / unit
    along = (moved / unit * u).sum() / u.square().sum()
    assert along == pytest.approx(1, abs=6 / (2 * draws**0.5 * u.norm().item()))


@pytest.mark.parametrize("transposed", [False, True])
def test_chunks_change_no_byte(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (64, 1000, 1 << 16):
        monkeypatch.setattr(optimizers, "CHUNKS", {"cpu": chunk})
        tensors = made(torch.bfloat16, ((640, 8), (130, 24), (5000,), (6, 9)))
        if transposed:
            tensors[1] = nn.Parameter(tensors[1].detach().t())
        optimizer = RoundedAdamW(tensors, **OPTIONS | {"lr": 1e-2})
        for seed in range(3):
            step(optimizer, tensors, seed)
        found.append([p.detach().clone() for p in tensors])
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert not same(found[0], made(torch.bfloat16, [tuple(p.shape) for p in found[0]]))


def test_the_seed_decides_and_no_other_generator_is_touched() -> None:
    def trained(seed: int) -> list[nn.Parameter]:
        tensors = made(torch.bfloat16)
        step(RoundedAdamW(tensors, seed=seed, **OPTIONS | {"lr": 1e-3}), tensors, 0)
        return tensors

    before = torch.get_rng_state()
    assert same(trained(1), trained(1))
    assert not same(trained(1), trained(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("way", ["checkpoint", "state dict"])
def test_it_goes_on_from_its_state_as_if_it_had_not_stopped(way: str) -> None:
    def optimizer(tensors: list[nn.Parameter]) -> Optimizer:
        groups = [{"params": part, "lr": 1e-3} for part in (tensors[:2], tensors[2:])]
        return make_optimizer("adamw", groups, Recipe(seed=5))

    ours = [*made(torch.bfloat16), *made(torch.float32)]
    one = optimizer(ours)
    assert type(one) is RoundedAdamW
    assert {group["seed"] for group in one.param_groups} == {5}
    for seed in range(3):
        step(one, ours, seed)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    other = optimizer(theirs)
    if way == "checkpoint":
        restore_optimizer(other, {k: v.clone() for k, v in optimizer_tensors(one).items()})
        for group in other.param_groups:
            group["lr"] = 1e-3
    else:
        other.load_state_dict(one.state_dict())
    stored, again = optimizer_tensors(one), optimizer_tensors(other)
    keys = {f"{i}.{name}" for i in range(8) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert stored.keys() == again.keys() == keys
    assert {t.dtype for t in again.values()} == {torch.float32}
    assert same([*stored.values()], [*again.values()])
    for seed in (7, 8):
        step(one, ours, seed)
        step(other, theirs, seed)
    assert same(ours, theirs)


@pytest.mark.slow
def test_at_its_own_rate_it_learns_what_fp32_learns(tiny_model_dir, tmp_path: Path) -> None:
    """Updates of 2e-5 are under half a unit of nearly every weight of the tiny model."""
    fall = {}
    for base in ("fp32", "bf16"):
        fields = {"method": "full", "storage": base, "lr": 2e-5, "schedule": "constant"}
        fields |= {"steps": 60}
        losses = trained(tiny_model_dir("llama"), tmp_path / base, **fields).losses
        fall[base] = sum(losses[:6]) - sum(losses[-6:])
    assert fall["bf16"] == pytest.approx(fall["fp32"], rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_an_embedding_is_summed_in_fp32(tied: bool) -> None:
    """Of tokens that come often, in one micro-batch and in sixteen, beside a model in fp32."""
    size = {"vocab_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    wide = tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON | size)).to(torch.bfloat16).float()
    ids = torch.multinomial(1 / torch.arange(1.0, 65.0), 16 * 128, replacement=True).view(16, 128)
    found = {}
    for dtype, parts in ((torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 16)):
        model = deepcopy(wide).to(dtype)
        attach(model, make_spec("full"))
        sum_in_fp32(model)
        for part in ids.chunk(parts):
            loss, _ = labelled_loss(model, part.roll(-1, 1), {"input_ids": part})
            (loss / ids.numel()).backward()
        found[dtype, parts] = model.get_input_embeddings()._parameters["weight"].grad.float()
    exact, *narrow = found.values()
    assert max((one - exact).norm() / exact.norm() for one in narrow) < 5e-3


class Products(TorchDispatchMode):
    """The dtypes in which matrices, not vectors, are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
        if func in products and 1 not in args[-2].shape:
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2", "gpt2"])
def test_weights_are_multiplied_in_the_faster_numbers(kind, tiny_model_dir, monkeypatch) -> None:
    """The head too, which gemma and gpt2 tie to their embedding."""
    ids = torch.randint(3, 250, (1, 100), generator=torch.Generator().manual_seed(4))
    found = {}
    for pays in (False, True):
        monkeypatch.setattr(arithmetic, "is_fp32_faster", lambda dtype, pays=pays: pays)
        model = load_model(tiny_model_dir(kind), torch.bfloat16)
        attach(model, make_spec("full"))
        with fused(model), Products() as products:
            labelled_loss(model, ids.roll(-1, 1), {"input_ids": ids})[0].backward()
        assert set(products.dtypes) == {torch.float32 if pays else torch.bfloat16}
        found[pays] = torch.cat([p.grad.flatten().float() for p in model.parameters()])  # type: ignore[union-attr]
    assert (found[True] - found[False]).norm() < 0.02 * found[False].norm()


def test_no_copy_of_the_weights_is_held_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 1 << 12
    monkeypatch.setattr(optimizers, "CHUNKS", {"cpu": chunk})
    tensors = made(torch.bfloat16, ((512, 512), (100_000,), (300, 70)))
    n = sum(p.numel() for p in tensors)
    optimizer = make_optimizer("adamw", [{"params": tensors, "lr": 1e-3}], Recipe())
    with Ledger() as ledger:
        step(optimizer, tensors, 0)
        before = ledger.now
        ledger.peak = 0
        optimizer.step()
    assert ledger.now == before
    assert ledger.peak - before < 32 * chunk
    held = [*tensors, *optimizer_tensors(optimizer).values()]
    assert state_bytes("adamw", tensors) == 8 * n
    assert distinct_bytes(held) == 2 * n + 8 * n + 4 * len(tensors)


@pytest.mark.slow
def test_the_estimate_of_full_fine_tuning_on_bf16_is_what_a_step_holds() -> None:
    close(CONFIGS["llama"], FULL_IN_BF16)
    close(CONFIGS["llama"], replace(FULL_IN_BF16, accumulating=True))
    found = estimate(CONFIGS["llama"], FULL_IN_BF16).terms
    # 8 bytes a parameter over 2, and a few buffers
    assert found["optimizer"] == pytest.approx(4 * found["weights"], rel=1e-3)


def test_no_8_bit_optimizer_is_advised_or_taken_for_16_bit_weights() -> None:
    in_fp32 = replace(FULL_IN_BF16, base=Storage(torch.float32))
    eight, sixteen = "optimizer adamw8bit", "storage bf16"
    advised = [dict(changes_of(setting)) for setting in (FULL_IN_BF16, in_fp32, LORA)]
    assert [eight in words for words in advised] == [False, True, True]
    assert [sixteen in words for words in advised] == [False, True, False]
    assert sixteen not in dict(changes_of(replace(in_fp32, optimizer="adamw8bit")))
    with pytest.raises(LorafoldError, match="optimizer adamw8bit rounds to nearest"):
        memory_setting("full", Recipe(storage="bf16", optimizer="adamw8bit"), 1, 128)
    with pytest.raises(LorafoldError, match="so weights in float16 would lose"):
        make_optimizer("adamw8bit", [{"params": made(torch.float16), "lr": 1e-3}], Recipe())


@pytest.mark.slow
def test_the_command_refuses_8_bits_in_one_line(tiny_model_dir, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    where = f"--data {rows} --model {tiny_model_dir('llama')} --out {tmp_path / 'out'}"
    how = "--method full --storage bf16 --optimizer paged-adamw8bit --max-length 64"
    assert refused("train", *where.split(), *how.split()) == (
        "error: optimizer paged-adamw8bit rounds to nearest, so weights in bfloat16 would lose"
        " updates below half a unit in the last place; use optimizer adamw or quantization fp32\n"
    )
    assert sorted(tmp_path.iterdir()) == [rows]
