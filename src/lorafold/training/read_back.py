"""Before a run says that it succeeded: what it trained is finite and not zero, and what it wrote is
what it trained, read as whoever loads it will.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from lorafold.adapter import Adapter
from lorafold.core.attach import base_state
from lorafold.errors import LorafoldError, listed
from lorafold.models.weights import FileWeights, InMemory, Weights, check_finite, model_files
from lorafold.peft.saved import Saved
from lorafold.peft.tensors import saved_tensors, sites_of

MOMENTS = ("exp_avg", "absmax1", "state1")  # of a gradient, as optimizers call it


def check_trained(adapter: Adapter, optimizer: Optimizer) -> None:
    """Raise LorafoldError if a tensor of the adapter is not finite, or an up factor that had
    gradients is zero: its update would be too.
    """
    for name, t in adapter.state_dict().items():
        check_finite(name, t)
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
    model = adapter.model
    if adapter.spec.trains_base:  # a plain model: files may name some of its tensors otherwise
        whole, state = FileWeights(model_files(path)), base_state(model)
        shared = state.keys() & {*whole.names}
        wrong = [key for key in shared if not whole.get(key).equal(state[key].cpu())]
    else:
        base = base or InMemory.of_model(model)
        _, saved = Saved.open(path).within(model).token_rows(model, base)
        parts = {site: [*delta.parts()] for site, delta in adapter.deltas.items()}
        targets, names = adapter.matches.paths, set(saved.weights.names)
        wrong = [*set(targets).symmetric_difference(saved.targets(model).paths)]
        for key, own in saved_tensors(sites_of(model, parts, targets, base)).items():
            if key not in names or not saved.weights.get(key).equal(own.encoded().cpu()):
                wrong.append(key)
    if wrong:
        raise LorafoldError(
            f"{path}: read back, found other values than were trained in {listed(wrong, room=120)};"
            " expected the same: the checkpoints of the run are kept"
        )


def _learned(optimizer: Optimizer, p: Tensor) -> bool:
    state = optimizer.state.get(p, {})
    moment = next((state[name] for name in MOMENTS if name in state), None)
    return moment is not None and bool(moment.any())
