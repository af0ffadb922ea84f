"""Attaching a new adapter to a model, and loading a saved one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from lorafold.adapter.building import BuiltAdapter, build, read
from lorafold.adapter.handle import Adapter
from lorafold.advice import advised
from lorafold.core.attach import Origin, adapted_modules, freeze, lay, selection_of
from lorafold.core.combine import Stack
from lorafold.core.matrices import module_at
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError
from lorafold.identity import of_model
from lorafold.kernels.table import TRAINING, use
from lorafold.layers import layer_class
from lorafold.methods.parts.extras import Bias
from lorafold.methods.parts.trainable_tokens import TrainableTokens
from lorafold.models.sources import known
from lorafold.models.weights import Weights
from lorafold.peft.saved import Saved

log = logging.getLogger(__name__)


@advised
def attach(
    model: nn.Module,
    spec: Spec,
    targets: str | Sequence[str] | Matches | None = None,
    name: str = "default",
    *,
    bias: Bias = "none",
    modules_to_save: Sequence[str] | Matches = (),
    tokens: Sequence[int] | Mapping[str, Sequence[int]] | TrainableTokens = (),
    base: Weights | None = None,
) -> Adapter:
    """Attach an adapter to a model, above those that are active, freeze the base and make the
    adapter active.

    Raises LorafoldError, and leaves the model as it is, for a pattern that matches no module, a
    module that can't be adapted, or a name that is in use.

    Args:
        spec: the method with its hyperparameters.
        targets: the modules to adapt: a preset (`lorafold.core.targets`), names or path ends, a
            regular expression over whole paths, or matches (None: the method's own targets).
        name: the adapter's name on this model.
        bias: train the biases of the adapted modules too ("lora_only"), or those of all ("all").
        modules_to_save: modules to train whole, such as a new head, by names or matches; they are
            taken out of the targets.
        tokens: the ids whose rows train, in the embedding and the head, or ids by module name. Ids
            beyond the vocabulary are new tokens: the logits get a column for each while the adapter
            is active. `config.vocab_size` stays the base's, so leave the loss to lorafold.
        base: the base's own weights, if the model does not have them (see `load`); loftq needs
            them.
    """
    _check_name(model, name)
    beside = {"bias": bias, "modules_to_save": modules_to_save, "tokens": tokens, "base": base}
    built = build(model, spec, targets, **beside)  # type: ignore[arg-type]
    return _place(model, built, name, True)


def load(
    model: nn.Module, path: str | Path | Saved, name: str = "default",
    *, allow_other_base: bool = False, trainable: bool = False, base: Weights | None = None,
) -> Adapter:  # fmt: skip
    """Attach a saved adapter to a model. Every key must be used and every shape right.

    Otherwise LorafoldError is raised and the model is left as it is. The error lists everything
    that is wrong: unknown or missing keys, shapes, values that are not finite, options that are not
    supported, a base with another fingerprint. An adapter that was trained over others is loaded
    over exactly these, which must be the active ones, in their order.

    Args:
        path: the adapter's directory, or what was read of it already.
        name: the adapter's name on this model.
        allow_other_base: accept a base with another fingerprint, and other adapters below; the log
            says so.
        trainable: make the adapter's parameters trainable; one that lay over nothing lies over the
            active adapters from then on.
        base: the base's own weights, if the model does not have them, because it is quantized or on
            the meta device.
    """
    _check_name(model, name)
    built = read(model, path, allow_other_base=allow_other_base, base=base)
    if not allow_other_base and (told := _other_files(model, built)):
        log.warning(told)
    if trainable and not built.over:
        built = replace(built, over=selection_of(model).active)
    return _place(model, built, name, trainable).requires_grad_(trainable)


def _other_files(model: nn.Module, built: BuiltAdapter) -> str | None:
    """A line that says that the base, which has the fingerprint of the one that the adapter was
    trained on, was read from other files; None if it was not, or if that is not known.
    """
    read_from = known(model)
    if read_from is None or built.base_identity in ("", of_model(read_from)):
        return None
    return (
        f"{built.files[0]}: the base {read_from.name} has other files than the one that it was"
        " trained on: the same weights stored otherwise, or changed ones"
    )


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name or any(name in m.deltas for _, m in adapted_modules(model)):
        raise LorafoldError(
            f"adapter name: found {name!r}, expected a name without a dot that is not in use on"
            " this model; choose another"
        )


def _place(model: nn.Module, built: BuiltAdapter, name: str, trainable: bool) -> Adapter:
    if trainable and any(p.is_cpu for p in model.parameters()):
        use(TRAINING)  # before the first step, so that compiling is no part of it
    selection = selection_of(model)
    for path, parts in built.parts.items():
        module, delta = module_at(model, path), parts[0] if len(parts) == 1 else Stack(parts)
        lay(module, layer_class(module), name, delta, selection, path)
    freeze(model, selection)
    selection.add(name)
    selection.origins[name] = Origin(name, *built.files)
    return Adapter(model, name, built.chosen, built.over, built.other_base)
