"""The optimizers: 8-bit state, resumption, and the choice of `auto`."""

import gc
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

import lorafold as lf
import training_cases
from lorafold.errors import LorafoldError
from lorafold.layers import layer_of
from lorafold.methods import METHODS
from lorafold.methods.ia3 import IA3Delta
from lorafold.methods.lora import LoRA
from lorafold.recipe.recipe import Recipe
from lorafold.training.finish import Trained
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train
from lorafold.training_step import optimizers
from lorafold.training_step.optimizers import (
    PAGED,
    OptimizerChoice,
    choose_adamw,
    make_optimizer,
    state_bytes,
)
from lorafold.training_step.param_groups import (
    optimizer_tensors,
    param_groups,
    rates,
    restore_optimizer,
)
from process_cases import same_bytes
from training_cases import quiet, stopping, weights

pytestmark = pytest.mark.usefixtures("unestimated")

NAMES = [name for name in get_args(Recipe.model_fields["optimizer"].annotation) if name != "auto"]
GB, MB = 10**9, 10**6

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def llama(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


def request(model: Path, out: Path, **fields: Any) -> RunRequest:
    """At rank 64 some factors have the 4,096 elements from which state is 8-bit, some fewer."""
    own = {"steps": 12, "rank": 64, "lr": 1e-3, "lr_b": 5e-3, "save_every": 4}
    return training_cases.request(model, out, **own | fields)


def trained(model: Path, out: Path, **fields: Any) -> Trained:
    return train(request(model, out, **fields), quiet())


def made(
    name: str, sizes: tuple[int, ...] = (5000, 4096, 40, 5000), device: str = "cpu"
) -> tuple[Optimizer, list[nn.Parameter]]:
    """An optimizer over two groups of parameters of these sizes."""
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in sizes]
    groups = [
        {"params": tensors[:1], "lr": 1e-2, "peak": 1e-2},
        {"params": tensors[1:], "lr": 3e-2, "peak": 3e-2},
    ]
    return make_optimizer(name, groups, Recipe(weight_decay=0.1)), tensors


def step(optimizer: Optimizer, tensors: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in tensors:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
    tensors[2].grad = None  # one that is not on the way to the loss has no state
    optimizer.step()


@pytest.mark.parametrize(
    ("parameters", "device", "free", "name", "why"),
    [
        (5 * MB, "cpu", 0, "adamw", "the CPU does not support paging"),
        (5000 * MB, "mps", 0, "adamw", "MPS does not support paging"),
        (40 * MB, "cuda", 70 * GB, "adamw", "within a third of the free 70.0 GB"),
        (1000 * MB, "cuda", 24 * GB, "adamw", "within a third of the free 24.0 GB"),
        (1001 * MB, "cuda", 24 * GB, PAGED, "8.0 GB, more than a third of the free 24.0 GB"),
        (7000 * MB, "cuda", 52 * GB, PAGED, "56.0 GB, more than a third of the free 52.0 GB"),
        (40 * MB, "cuda", 500 * MB, PAGED, "320.0 MB, more than a third of the free 500.0 MB"),
    ],
)
def test_auto_is_fp32_unless_memory_is_short_on_cuda(parameters, device, free, name, why) -> None:
    if name == PAGED:
        why = f"fp32 state would take {why}"
    assert choose_adamw(parameters, device, free) == (name, why)


def test_the_line_says_so_where_all_state_stays_fp32_or_updates_are_rounded() -> None:
    def line(name: str, dtype: torch.dtype) -> str:
        parameters = [nn.Parameter(torch.zeros(1000, dtype=dtype))]
        choice = OptimizerChoice(name, "why")
        return optimizers.optimizer_line(choice, [{"params": parameters}], 7)

    found = [line("adamw8bit", torch.float32), line("adamw", torch.bfloat16)]
    assert found == [
        "optimizer: adamw8bit with fp32 state, 8.0 kB (why; all tensors have fewer than 4,096"
        " elements)",
        "optimizer: adamw with fp32 state, 8.0 kB (why); updates rounded stochastically, seed 7",
    ]


def test_the_learning_rates_are_told_and_up_factors_where_theirs_is_another() -> None:
    delta = LoRA(rank=2).build(layer_of(nn.Linear(4, 4)))
    both = rates(param_groups([("", delta)], 2e-4, 3e-3), 2e-4)
    assert both == "learning rate: 2e-4; up factors (LoRA+) 3e-3"
    assert rates(param_groups([("", delta)], 1.5e-2, 1.5e-2), 1.5e-2) == "learning rate: 1.5e-2"
    delta.A.requires_grad_(False)
    only = "learning rate: up factors (LoRA+) 3e-3"
    assert rates(param_groups([("", delta)], 2e-4, 3e-3), 2e-4) == only


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("auto", "adamw with fp32 state, 524.3 kB (the CPU does not support paging)"),
        ("adamw", "adamw with fp32 state, 524.3 kB"),
        ("adamw8bit", "adamw8bit with 8-bit state, 377.6 kB"),
        (PAGED, f"{PAGED} with 8-bit state, 377.6 kB (not paged: not supported on the CPU)"),
    ],
)
@pytest.mark.filterwarnings("error:.*[Pp]aged")  # what bitsandbytes would warn of is in the line
def test_each_trains_and_says_what_it_is(name: str, line: str, llama, tmp_path, capsys) -> None:
    asked = request(llama, tmp_path / "a", optimizer=name)
    result = train(asked, Console(file=sys.stdout, width=200))
    told = f"optimizer: {line}\nlearning rate: 1e-3; up factors (LoRA+) 5e-3\n"
    assert told in capsys.readouterr().out
    assert result.losses[-1] < result.losses[0] - 0.3


def test_8_bit_state_is_8_bits_in_a_quarter_of_the_bytes() -> None:
    optimizer, tensors = made("adamw8bit", (1 << 20, 4096, 4095, 5000))
    for p in tensors:
        p.grad = torch.ones_like(p)
    optimizer.step()
    measured = []
    for p in tensors:
        state, dtype = optimizer.state[p], torch.uint8 if p.numel() >= 4096 else torch.float32
        assert state["state1"].dtype == state["state2"].dtype == dtype
        kept = [v.nbytes for k, v in state.items() if k.startswith(("state", "absmax"))]
        measured.append(sum(kept))
    assert measured == [state_bytes("adamw8bit", [p]) for p in tensors]
    assert measured[0] / state_bytes("adamw", tensors[:1]) == pytest.approx(1 / 4, rel=0.02)


@pytest.mark.slow
def test_8_bits_follow_the_fp32_trajectory(llama, tmp_path: Path) -> None:
    """A tenth of the way after 20 steps is a lot: codes are a few percent apart."""
    losses, found = {}, {}
    for name in ("adamw", "adamw8bit"):
        fields = {"optimizer": name, "rank": 128, "steps": 20, "dropout": 0.0}
        losses[name] = trained(llama, tmp_path / name, **fields).losses
        factors = weights(tmp_path / name)
        ups = {k.replace("lora_B", "lora_A"): b for k, b in factors.items() if "lora_B" in k}
        found[name] = torch.cat([(b @ factors[k]).flatten() for k, b in ups.items()])
    fall = losses["adamw"][0] - min(losses["adamw"])
    assert fall > 0.4
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < 0.02 * fall
    assert 0 < (found["adamw8bit"] - found["adamw"]).norm() < 0.1 * found["adamw"].norm()


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_a_checkpoint_unchanged(name: str) -> None:
    one, ours = made(name)
    for seed in range(3):
        step(one, ours, seed)
    stored = {k: v.clone() for k, v in optimizer_tensors(one).items()}
    assert {key.partition(".")[0] for key in stored} == {"0", "1", "3"}
    pointers = [t.data_ptr() for t in optimizer_tensors(one).values()]
    assert len(set(pointers)) == len(pointers)  # safetensors refuses what shares memory

    other, theirs = made(name)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    restore_optimizer(other, stored)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert all(q.grad is None for q in theirs)
    again = optimizer_tensors(other)
    assert again.keys() == stored.keys()
    assert all(v.dtype == stored[k].dtype and torch.equal(v, stored[k]) for k, v in again.items())
    for group, mine in zip(other.param_groups, one.param_groups, strict=True):
        group["lr"] = mine["lr"]  # as every step of a run sets it
    for optimizer, tensors in ((one, ours), (other, theirs)):
        step(optimizer, tensors, 7)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_the_state_of_another_optimizer_is_refused() -> None:
    one, ours = made("adamw")
    step(one, ours, 0)
    other, _ = made("adamw8bit")
    told = r"not fit this run: 0.absmax1: expected \(20,\), found none; .*0.exp_avg: expected none"
    with pytest.raises(LorafoldError, match=told):
        restore_optimizer(other, optimizer_tensors(one))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_gives_the_bytes_of_one_unstopped(name, llama, tmp_path, monkeypatch) -> None:
    straight = trained(llama, tmp_path / "straight", optimizer=name)
    with stopping(6), pytest.raises(KeyboardInterrupt):
        trained(llama, tmp_path / "stopped", optimizer=name)
    kept = load_file(tmp_path / "stopped.run" / "step-000004" / "optimizer.safetensors")
    state = [t.dtype for key, t in kept.items() if not key.startswith("rng")]
    assert (torch.uint8 in state) == (name != "adamw")
    resumed = trained(llama, tmp_path / "stopped", resume=True, optimizer=name)
    assert resumed.losses == straight.losses
    assert same_bytes(tmp_path / "stopped", tmp_path / "straight")


DECAYED = {
    "lora": {"A", "B"}, "dora": {"A", "B"}, "adalora": {"P", "Q"},
    "loha": {"w1_a", "w1_b", "w2_a", "w2_b"},
    "ia3": set(), "vera": set(), "bitfit": set(), "fish": {"values"}, "fastfood": {"vector"},
    "houlsby": {"down", "up"}, "full": {"weight"},
}  # fmt: skip


@pytest.mark.parametrize("method", DECAYED)
def test_weight_decay_shrinks_matrices_alone(method: str, tiny_model: Any) -> None:
    model = tiny_model("qwen2")
    saved = () if method == "full" else ["model.norm"]
    adapter = lf.attach(model, METHODS[method](), modules_to_save=saved)
    groups = param_groups(adapter.parts(), 1e-3, 1e-2, decay_vectors=False)
    shrunk = {id(p): "weight_decay" not in group for group in groups for p in group["params"]}
    assert len(shrunk) == sum(p.numel() > 0 for p in adapter.parameters())
    named = [(n, p) for _, delta in adapter.parts() for n, p in delta.named_parameters()]
    found = {name.rpartition(".")[2] for name, p in named if shrunk.get(id(p))}
    assert found == DECAYED[method]
    # gains of norms and biases, which are one-dimensional, are left
    entries = ("values", "subspace.vector")
    assert all(p.ndim > 1 or name in entries for name, p in named if shrunk.get(id(p)))
    assert not any("weight_decay" in group for group in param_groups(adapter.parts(), 1e-3, 1e-2))


def test_vectors_of_experts_are_left_too() -> None:
    delta = IA3Delta((3, 8), False, torch.device("cpu"))
    [group] = param_groups([("", delta)], 1e-3, 1e-3, decay_vectors=False)
    assert group["weight_decay"] == 0.0


def test_a_run_with_weight_decay_does_not_draw_scales_to_zero(llama, tmp_path) -> None:
    rows = [{"prompt": f"say {n}", "completion": f" {n}"} for n in range(4)]
    for decay in (0.0, 50.0):
        recipe = lf.Recipe(method="ia3", steps=3, batch=4, storage="fp32", weight_decay=decay)
        lf.train(recipe, model=llama, data=rows, out=tmp_path / f"{decay}")
    assert same_bytes(tmp_path / "0.0", tmp_path / "50.0")


@pytest.mark.slow
def test_auto_keeps_to_its_choice_in_a_resumed_run(llama, tmp_path, monkeypatch, capsys) -> None:
    straight = trained(llama, tmp_path / "straight", optimizer="adamw8bit")
    with monkeypatch.context() as patch:  # memory is short now, and is not when the run goes on
        patch.setattr(optimizers, "choose_adamw", lambda *_: OptimizerChoice("adamw8bit", "short"))
        with stopping(6), pytest.raises(KeyboardInterrupt):
            trained(llama, tmp_path / "a")
    asked = request(llama, tmp_path / "a", resume=True)
    resumed = train(asked, Console(file=sys.stdout, width=200))
    told = "optimizer: adamw8bit with 8-bit state, 377.6 kB (as before the resume)\n"
    assert told in capsys.readouterr().out
    assert resumed.losses == straight.losses


def test_without_bitsandbytes_the_8_bit_ones_are_one_error(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    told = "adamw8bit needs bitsandbytes, .*; pip install bitsandbytes, or choose .* adamw$"
    with pytest.raises(LorafoldError, match=told):
        trained(llama, tmp_path / "a", optimizer="adamw8bit")
    assert list(tmp_path.iterdir()) == []
    trained(llama, tmp_path / "a", optimizer="adamw", steps=1)


def test_a_matrix_without_trained_entries_is_left_to_no_optimizer() -> None:
    delta = LoRA(rank=2).build(layer_of(nn.Linear(8, 8)))
    delta.A = nn.Parameter(torch.zeros(0))
    groups = param_groups([("a", delta)], 1e-3, 1e-2)
    assert [p.shape for group in groups for p in group["params"]] == [delta.B.shape]


@needs_cuda
def test_paged_state_is_still_paged_after_a_resume() -> None:
    """bitsandbytes' own load_state_dict would leave it on the device for good."""
    sizes = (200_000, 4096, 40, 200_000)
    one, ours = made(PAGED, sizes, "cuda")
    step(one, ours, 0)
    other, theirs = made(PAGED, sizes, "cuda")
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    restore_optimizer(
        other, {k: v.detach().cpu().clone() for k, v in optimizer_tensors(one).items()}
    )
    for optimizer, tensors in ((one, ours), (other, theirs)):
        assert getattr(optimizer.state[tensors[0]]["state1"], "is_paged", False)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        step(optimizer, tensors, 1)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@needs_cuda
def test_paging_carries_a_run_over_a_spike_that_fits_on_average() -> None:
    """fp32 state is 512 MiB, 8-bit state 130; a spike of all but SLACK needs it paged out."""
    count, room, slack = 1 << 26, 1280 << 20, 64 << 20
    device = torch.device("cuda")

    def free() -> int:
        gc.collect()  # a run that failed is held by its traceback
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]

    def run(name: str, spikes: list[int]) -> list[float]:
        """The norm after each of three steps whose activations take so many bytes."""
        p = nn.Parameter(torch.zeros(count, device=device))
        p.grad = torch.ones_like(p)  # kept, so that each step needs the same
        optimizer = make_optimizer(
            name, [{"params": [p], "lr": 1e-3, "peak": 1e-3}], Recipe(clip=0.0)
        )
        norms = []
        ballast = torch.empty(free() - room, dtype=torch.uint8, device=device)
        for spike in spikes:
            activations = torch.ones(spike, dtype=torch.uint8, device=device)
            assert activations[-1] == 1
            del activations
            optimizer.step()
            norms.append(p.detach().norm().item())
            # what torch holds in reserve would be the spike's neighbour for good
            torch.cuda.empty_cache()
        del ballast
        return norms

    calm, spiky = [1 << 20] * 3, [1 << 20, room - slack, 1 << 20]
    for name in NAMES:  # kernels are loaded on first use, and take memory
        optimizer, tensors = made(name, (200_000, 4096, 40, 5000), "cuda")
        step(optimizer, tensors, 0)
    expected = run("adamw", calm)
    assert all(a < b for a, b in pairwise([0.0, *expected]))
    for name in ("adamw", "adamw8bit"):
        assert run(name, calm) == pytest.approx(expected, rel=0.05)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(name, spiky)
    assert run(PAGED, spiky) == pytest.approx(expected, rel=0.05)
