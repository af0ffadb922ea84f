"""Masks that transformers derives from positions, found on the host, which sent the positions.

    with masks_by_host():
        model(input_ids, position_ids=sent(positions, device))

To find packed documents transformers asks the device once for each mask, and `documents` would ask
three times more. The values that a mask's function reads are given to it in two forms: for indices
on the host and for those on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from lorafold.ops.host import on_host

HOST = torch.device("cpu")


class _Both:
    """Values (B, T) that are known on the host, for indices there and on a device."""

    def __init__(self, here: Tensor, device: torch.device) -> None:
        self.here, self.device = here, device

    def __getitem__(self, at: tuple[Tensor, ...]) -> Tensor:
        there = any(i.device.type != "cpu" for i in at)
        return (self.here.to(self.device) if there else self.here)[at]


class _Functions:
    """transformers' functions that find documents, and how many `with` blocks have ours in their
    place. The positions are those of the mask that is being made.
    """

    NAMES = "find_packed_sequence_indices", "remap_positions_for_packed_sequence"

    def __init__(self) -> None:
        self.users, self.known = 0, _Both(torch.empty(0), HOST)
        self.theirs: list[Any] = []

    def enter(self) -> None:
        if not self.users:
            self.theirs = [vars(masking_utils).get(name) for name in self.NAMES]
            self._set([self._found, self._remapped])
        self.users += 1

    def leave(self) -> None:
        self.users -= 1
        if not self.users:
            self._set(self.theirs)

    def _set(self, functions: list[Any]) -> None:
        if None not in self.theirs:  # a version that has others goes on as it does
            for name, function in zip(self.NAMES, functions, strict=True):
                setattr(masking_utils, name, function)

    def _found(self, position_ids: Tensor) -> Any:
        self.known = _Both(on_host(position_ids), position_ids.device)
        numbers = self.theirs[0](self.known.here)
        return None if numbers is None else _Both(numbers, position_ids.device)

    def _remapped(self, mask: Callable[..., Any], position_ids: Tensor) -> Any:
        return self.theirs[1](mask, self.known)


_functions = _Functions()


@contextmanager
def masks_by_host() -> Iterator[None]:
    """Have transformers find documents on the host until the `with` block ends."""
    _functions.enter()
    try:
        yield
    finally:
        _functions.leave()


def indices(
    mask: Callable[..., Any], rows: int, tokens: int, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (B, 1), and each token (1, T - 1) and the next (1, T - 1), that a mask is asked for:
    on the host where it can say, else on the device.
    """
    for where in dict.fromkeys((HOST, torch.device(device or HOST))):
        row = torch.arange(rows, device=where)[:, None]
        earlier = torch.arange(tokens - 1, device=where)[None]
        try:
            mask(row, torch.zeros_like(row), earlier, earlier + 1)
        except RuntimeError:  # it reads tensors of the device, as that of chunks does
            continue
        break
    return row, earlier, earlier + 1
