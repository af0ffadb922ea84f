"""AdamW in three forms, which differ in how they store its two moments, and the choice among them.

    adamw             moments in fp32, 8 bytes a parameter: torch's AdamW, or `rounded_adamw` if
                      16-bit parameters are trained (its seed is the recipe's)
    adamw8bit         bitsandbytes' AdamW: moments in 8 bits with an fp32 scale for every 256 of
                      them, 2.03 bytes a parameter (tensors under 4,096 elements: fp32)
    paged-adamw8bit   the same in paged memory, which CUDA moves to the host when other tensors need
                      the room (tensors from 100,000 elements)

Dettmers et al. 2022, arXiv 2110.02861 (8 bits); Dettmers et al. 2023, arXiv 2305.14314, sec. 3
(paging: a peak of activations waits for a transfer and does not end the run). `auto` takes fp32 as
long as there is room for it. The 8-bit forms round every update to the nearest, so they are refused
if 16-bit parameters are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lorafold.bases.bitsandbytes import bitsandbytes
from lorafold.errors import LorafoldError
from lorafold.machine.memory import free_bytes
from lorafold.machine.processes import Processes
from lorafold.step.rounded_adamw import RoundedAdamW, narrow

PAGED = "paged-adamw8bit"
SMALL = 4096  # bitsandbytes stores the moments of smaller tensors in fp32
# fp32 moments may take a third of the free memory: gradients take half as much, which leaves half
# for the activations
SHARE = 3
DEVICES = {"cpu": "the CPU", "mps": "MPS"}


class Choice(NamedTuple):
    """The name of an optimizer and why it was chosen (empty: the recipe asks for it)."""

    name: str
    why: str


def choose(parameters: int, device: str, free: int) -> Choice:
    """Choose the optimizer for `auto`.

    Args:
        device: The type of the device: cpu, cuda or mps.
        free: The device's free memory in bytes.
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


def pick(
    asked: str,
    before: str,
    groups: list[dict],
    where: torch.device,
    processes: Processes,
    parts: int = 1,
) -> Choice:
    """Choose the optimizer of a run.

    Args:
        asked: The recipe's optimizer, possibly auto.
        before: The optimizer that a resumed run had before it stopped, which auto keeps; empty for
            a new run.
        where: The device of the run.
        processes: Those of the run, which must all choose the same.
        parts: Among how many of them the state is divided.
    """
    device = where.type
    if asked != "auto":
        choice = Choice(asked, "")
    elif before:
        choice = Choice(before, "as before the stop")
    elif any(map(narrow, trained(groups))):
        choice = Choice("adamw", "16-bit weights are trained")
    else:
        count = sum(p.numel() for p in trained(groups)) // parts
        choice = choose(count, device, free_everywhere(where, processes))
    if choice.name == PAGED and device != "cuda":
        return Choice(PAGED, f"not paged: {DEVICES.get(device, device)} has no paging")
    return choice


def free_everywhere(where: torch.device, processes: Processes) -> int:
    """Return the free bytes of the process that has the fewest, so that all choose the same."""
    return min(processes.gather(free_bytes(where)))


class Constants(Protocol):
    """What AdamW takes besides learning rates; a `Recipe` has it."""

    @property
    def betas(self) -> tuple[float, float]:
        """The decay rates of the two moments."""

    @property
    def eps(self) -> float:
        """What keeps the update finite."""

    @property
    def weight_decay(self) -> float:
        """The decoupled weight decay of matrices."""

    @property
    def seed(self) -> int:
        """The seed of stochastic rounding."""


def make_optimizer(name: str, groups: list[dict], constants: Constants) -> Optimizer:
    """Make the optimizer.

    Raises LorafoldError for an 8-bit optimizer if bitsandbytes is not installed, or if some
    parameters have 16 bits.

    Args:
        name: adamw, adamw8bit or paged-adamw8bit.
        groups: The parameter groups, each with its learning rate.
        constants: Betas, eps, weight decay, and the seed of stochastic rounding.
    """
    check_rounding(name, (p.dtype for p in trained(groups)))
    options: dict[str, Any] = {
        "betas": constants.betas,
        "eps": constants.eps,
        "weight_decay": constants.weight_decay,
    }
    if name == "adamw":
        options["fused"] = all(p.device.type in ("cpu", "cuda") for p in trained(groups))
        if any(map(narrow, trained(groups))):
            return RoundedAdamW(groups, seed=constants.seed, **options)
        return AdamW(groups, **options)
    optim = bitsandbytes_optimizers(name)
    # on other devices bitsandbytes would warn, and not page either
    paged = name == PAGED and all(p.is_cuda for p in trained(groups))
    return (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **options)


def check_available(asked: str) -> None:
    """Raise LorafoldError if the optimizer needs bitsandbytes and that is not installed."""
    if asked not in ("auto", "adamw"):
        bitsandbytes_optimizers(asked)


def check_rounding(asked: str, dtypes: Iterable[torch.dtype]) -> None:
    """Raise LorafoldError if an 8-bit optimizer is asked for and one of the dtypes has 16 bits."""
    found = sorted({str(t).removeprefix("torch.") for t in dtypes if t.itemsize == 2})
    if asked not in ("auto", "adamw") and found:
        raise LorafoldError(
            f"optimizer {asked} rounds updates to the nearest, and weights in {' and '.join(found)}"
            " would lose those under half a unit; expected optimizer adamw, or base fp32"
        )


def bitsandbytes_optimizers(name: str) -> Any:
    """Return bitsandbytes.optim. Raises LorafoldError, in which the optimizer is called `name`, if
    bitsandbytes can't be imported.
    """
    try:
        return bitsandbytes().optim
    except ImportError as error:
        raise LorafoldError(
            f"optimizer {name} needs bitsandbytes, which can't be imported ({error});"
            " pip install bitsandbytes, or choose optimizer adamw"
        ) from None


def described(choice: Choice, groups: list[dict], seed: int, parts: int = 1) -> str:
    """Return a line that names the optimizer, the storage and size of its state, the reason for the
    choice, and stochastic rounding if there is any.

    Args:
        seed: The seed of stochastic rounding.
        parts: Among how many processes the state is divided.
    """
    parameters = trained(groups)
    eight, small = choice.name != "adamw", all(p.numel() < SMALL for p in parameters)
    kind = "8-bit" if eight and not small else "fp32"
    rounds = f"; updates rounded stochastically, seed {seed}" * any(map(narrow, parameters))
    why = [choice.why] * bool(choice.why) + [f"no tensor has {SMALL:,} elements"] * (
        eight and small
    )
    size = in_words(state_bytes(choice.name, parameters))
    size += f" among {parts} processes" * (parts > 1)
    return (
        f"optimizer: {choice.name} with {kind} state, {size}"
        + (f" ({'; '.join(why)})" if why else "")
        + rounds
    )


def state_bytes(name: str, parameters: Sequence[Tensor]) -> int:
    """Return the bytes of AdamW's two moments, for parameters of any shapes."""
    if name == "adamw":
        return sum(8 * p.numel() for p in parameters)
    return sum(
        8 * n if n < SMALL else 2 * n + 8 * ceil(n / 256) for n in (p.numel() for p in parameters)
    )


def trained(groups: list[dict]) -> list[Tensor]:
    """Return the parameters of all groups, of any shapes."""
    return [p for group in groups for p in group["params"]]


def in_words(n: int) -> str:
    """Return a number of bytes as text, such as 39.1 MB."""
    size, unit = next(
        ((n / 10**power, unit) for power, unit in ((9, "GB"), (6, "MB")) if n >= 10**power),
        (n / 1e3, "kB"),
    )
    return f"{size:.1f} {unit}"
