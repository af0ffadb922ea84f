"""Before a run says that it succeeded: what it trained is not zero, and what it wrote is what it
trained, read as whoever loads it will.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from lorafold.adapter import Adapter, only
from lorafold.adapter.building import read
from lorafold.core.attach import selection_of
from lorafold.errors import LorafoldError, listed
from lorafold.models.weights import Weights
from lorafold.peft.saved import Saved

MOMENTS = ("exp_avg", "absmax1", "state1")  # of a gradient, as optimizers call it
CLOSE = 1e-3  # of a tensor's size, where files hold it in another form


def check_moved(adapter: Adapter, optimizer: Optimizer) -> None:
    """Raise LorafoldError if an up factor that had gradients is zero: its update would be too."""
    zero = [
        path
        for path, part in adapter.parts()
        for name in part.up_names
        if not (up := part.get_parameter(name)).any() and _learned(optimizer, up)
    ]
    if zero:
        raise LorafoldError(
            f"nothing was written: found only zeros in the up factors of {len(zero)} modules, which"
            f" had gradients ({listed(zero, room=80)}); expected them to have moved: try a higher"
            " learning rate (lr, lr_b)"
        )


def read_back(adapter: Adapter, path: Path, base: Weights | None) -> None:
    """Read a directory that was just written. Raises LorafoldError if it can't be loaded on the
    model of the adapter, or has other values.

    Args:
        adapter: The one that was written, the highest on its model.
        base: The base's own weights, where the model has only quantized ones.
    """
    if adapter.spec.trains_base:  # a plain model
        return
    names = selection_of(adapter.model).names
    below = names[: names.index(adapter.name)]
    with only(adapter.model, *below):
        saved = Saved.open(path)
        found = read(adapter.model, saved, allow_other_base=True, base=base, below=adapter.over)
    own = {site: [*delta.parts()] for site, delta in adapter.deltas.items()}
    wrong = [site for site in own.keys() ^ found.parts.keys()]
    for site in own.keys() & found.parts.keys():
        for ours, theirs in zip(own[site], found.parts[site], strict=True):
            read_as = dict(theirs.named_parameters())
            wrong += [
                f"{site}.{name}"
                for name, p in ours.named_parameters()
                if not _same(p.detach(), read_as[name].detach())
            ]
    if wrong:
        raise LorafoldError(
            f"{path}: read back, found other values than were trained in {listed(wrong, room=120)};"
            " expected the same: the checkpoints of the run are kept"
        )


def _same(own: Tensor, found: Tensor) -> bool:
    if own.shape != found.shape:
        return False
    a, b = own.float(), found.to(own.device).float()
    return bool((a - b).norm() <= CLOSE * a.norm())


def _learned(optimizer: Optimizer, p: Tensor) -> bool:
    state = optimizer.state.get(p, {})
    moment = next((state[name] for name in MOMENTS if name in state), None)
    return moment is not None and bool(moment.any())
