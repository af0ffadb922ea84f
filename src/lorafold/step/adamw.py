"""AdamW in three forms, which differ in how they hold its two moments, and the choice among them.

    adamw             fp32, 8 bytes a parameter: torch's, or where parameters in 16 bits are
                      trained `rounded_adamw`, whose seed is the recipe's
    adamw8bit         bitsandbytes'; 8 bits and an fp32 scale for every 256, 2.03 bytes a parameter
                      (tensors under 4,096 elements: fp32)
    paged-adamw8bit   the same, in memory that CUDA moves to the host while something else needs the
                      room (tensors from 100,000 elements)

Dettmers et al. 2022, arXiv 2110.02861 (8 bits); Dettmers et al. 2023, arXiv 2305.14314, sec. 3
(paging: a spike of activations then waits for a transfer instead of ending the run). `auto` takes
fp32 as long as there is room for it. The 8-bit ones round every update to the nearest, so they are
refused where parameters in 16 bits are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lorafold.bases.bitsandbytes import bitsandbytes
from lorafold.errors import LorafoldError
from lorafold.machine.room import free_bytes
from lorafold.step.recipe import Recipe
from lorafold.step.rounded_adamw import RoundedAdamW, narrow

PAGED = "paged-adamw8bit"
SMALL = 4096  # elements from which bitsandbytes holds state in 8 bits
# fp32 state may take a third of the free memory: gradients take half as much, which leaves half to
# activations
SHARE = 3
DEVICES = {"cpu": "the CPU", "mps": "MPS"}


class Choice(NamedTuple):
    """An optimizer's word, and why it is that one (empty: because it was asked for)."""

    name: str
    why: str


def choose(parameters: int, device: str, free: int) -> Choice:
    """What `auto` stands for with so many trained parameters, on a device of this kind with so many
    free bytes.
    """
    if device != "cuda":
        return Choice("adamw", f"{DEVICES.get(device, device)} has no paging")
    state = 8 * parameters
    if SHARE * state <= free:
        return Choice("adamw", f"within a third of the {in_words(free)} free")
    return Choice(
        PAGED,
        f"fp32 state, {in_words(state)}, would be more than a third of the {in_words(free)} free",
    )


def pick(asked: str, before: str, groups: list[dict], accelerator: Accelerator) -> Choice:
    """The optimizer of a run.

    Where it is left to us, it is the one that the run had `before` it was stopped (empty: a fresh
    run).
    """
    device = accelerator.device.type
    if asked != "auto":
        choice = Choice(asked, "")
    elif before:
        choice = Choice(before, "as before the stop")
    elif any(map(narrow, trained(groups))):
        choice = Choice("adamw", "16-bit weights are trained")
    else:
        choice = choose(
            sum(p.numel() for p in trained(groups)), device, free_everywhere(accelerator)
        )
    if choice.name == PAGED and device != "cuda":
        return Choice(PAGED, f"not paged: {DEVICES.get(device, device)} has no paging")
    return choice


def free_everywhere(accelerator: Accelerator) -> int:
    """The least free bytes that any process has, so that all of them choose alike."""
    return int(
        accelerator.gather(
            torch.tensor([free_bytes(accelerator.device)], device=accelerator.device)
        ).min()
    )


def make_optimizer(name: str, groups: list[dict], recipe: Recipe) -> Optimizer:
    """LorafoldError where bitsandbytes, which has the 8-bit ones, is not installed, and for these
    over parameters in 16 bits.
    """
    check_rounding(name, (p.dtype for p in trained(groups)))
    options: dict[str, Any] = {
        "betas": recipe.betas,
        "eps": recipe.eps,
        "weight_decay": recipe.weight_decay,
    }
    if name == "adamw":
        options["fused"] = all(p.device.type in ("cpu", "cuda") for p in trained(groups))
        if any(map(narrow, trained(groups))):
            return RoundedAdamW(groups, seed=recipe.seed, **options)
        return AdamW(groups, **options)
    kinds = bitsandbytes_optimizers(name)
    # elsewhere bitsandbytes would warn, and not page either
    paged = name == PAGED and all(p.is_cuda for p in trained(groups))
    return (kinds.PagedAdamW8bit if paged else kinds.AdamW8bit)(groups, **options)


def check_available(asked: str) -> None:
    """LorafoldError for an optimizer that can't be made here, before anything else is done."""
    if asked not in ("auto", "adamw"):
        bitsandbytes_optimizers(asked)


def check_rounding(asked: str, dtypes: Iterable[torch.dtype]) -> None:
    """LorafoldError for an 8-bit optimizer over parameters of these dtypes if any has 16 bits."""
    found = sorted({str(t).removeprefix("torch.") for t in dtypes if t.itemsize == 2})
    if asked not in ("auto", "adamw") and found:
        raise LorafoldError(
            f"optimizer {asked} rounds updates to the nearest, and weights in {' and '.join(found)}"
            " would lose those under half a unit; expected optimizer adamw, or base fp32"
        )


def bitsandbytes_optimizers(name: str) -> Any:
    """bitsandbytes.optim; `name` is who needs it."""
    try:
        return bitsandbytes().optim
    except ImportError as error:
        hint = "pip install bitsandbytes, or take the optimizer adamw"
        raise LorafoldError(
            f"optimizer {name} needs bitsandbytes, which can't be imported ({error}): {hint}"
        ) from None


def described(choice: Choice, groups: list[dict], seed: int) -> str:
    """One line for people: which, how its state is held, how large it is, why, and how updates are
    rounded.
    """
    parameters = trained(groups)
    eight, small = choice.name != "adamw", all(p.numel() < SMALL for p in parameters)
    kind = "8-bit" if eight and not small else "fp32"
    rounds = f"; updates rounded stochastically, seed {seed}" * any(map(narrow, parameters))
    why = [choice.why] * bool(choice.why) + [f"no tensor has {SMALL:,} elements"] * (
        eight and small
    )
    size = in_words(state_bytes(choice.name, parameters))
    return (
        f"optimizer: {choice.name} with {kind} state, {size}"
        + (f" ({'; '.join(why)})" if why else "")
        + rounds
    )


def state_bytes(name: str, parameters: Sequence[Tensor]) -> int:
    """Bytes of the two moments of these parameters."""
    if name == "adamw":
        return sum(8 * p.numel() for p in parameters)
    return sum(
        8 * n if n < SMALL else 2 * n + 8 * ceil(n / 256) for n in (p.numel() for p in parameters)
    )


def trained(groups: list[dict]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def in_words(n: int) -> str:
    """Bytes for people: 39.1 MB."""
    size, unit = next(
        ((n / 10**power, unit) for power, unit in ((9, "GB"), (6, "MB")) if n >= 10**power),
        (n / 1e3, "kB"),
    )
    return f"{size:.1f} {unit}"
