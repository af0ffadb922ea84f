"""Attaching a new adapter to a model, and loading a saved one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from lorafold.adapter.handle import Adapter
from lorafold.bases import is_linear, layer_class, layer_of
from lorafold.core.attach import Adapted, adapted_modules, freeze, lay, selection_of
from lorafold.core.combine import Stack
from lorafold.core.delta import Delta
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches, match
from lorafold.errors import LorafoldError
from lorafold.methods.parts.extras import Bias, add_biases, add_token_rows
from lorafold.methods.parts.replace import ReplaceDelta, leaves
from lorafold.methods.parts.token_rows import Tokens
from lorafold.models.weights import ModelWeights, Weights
from lorafold.peft import directory as peft


def attach(
    model: nn.Module,
    spec: Spec,
    targets: str | Sequence[str] | Matches | None = None,
    name: str = "default",
    *,
    bias: Bias = "none",
    modules_to_save: Sequence[str] | Matches = (),
    tokens: Sequence[int] | Mapping[str, Sequence[int]] | Tokens = (),
    base: Weights | None = None,
) -> Adapter:
    """Attach an adapter to a model, above those that are active, freeze the base and make the
    adapter active.

    Raises LorafoldError, and leaves the model as it is, for a pattern that matches no module, a
    module that can't be adapted, or a name that is in use.

    Args:
        model: the model.
        spec: the method with its hyperparameters.
        targets: the modules to adapt: a preset (`lorafold.core.presets`), names or path ends, a
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
    selection = selection_of(model)
    if not name or "." in name or any(name in m.deltas for _, m in adapted_modules(model)):
        raise LorafoldError(
            f"adapter name: found {name!r}, expected a name without a dot that is not in use on"
            " this model; choose another"
        )
    saved = match(model, modules_to_save, is_linear)
    whole = dict.fromkeys(leaf for p in saved.paths for leaf in leaves(model.get_submodule(p), p))
    matches = match(model, spec.targets if targets is None else targets, is_linear).without(whole)
    if not matches.paths:
        raise LorafoldError(
            f"modules_to_save includes every target ({', '.join(matches.by_pattern)}); leave some"
            " modules to the method"
        )
    deltas: dict[str, list[Delta]] = {}
    for path in matches.paths:
        module = model.get_submodule(path)
        if isinstance(module, Adapted):
            layer = module.layer(*selection.names)
        else:
            layer = layer_of(module, reader(base, path))
        try:
            deltas[path] = [spec.at(path).build(layer)]
        except LorafoldError as e:
            raise LorafoldError(f"{path}: {type(spec).__name__} can't adapt it: {e}") from None
    add_biases(model, matches, bias, deltas)
    deltas |= {path: [ReplaceDelta(model.get_submodule(path), path)] for path in whole}
    rows = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
    add_token_rows(model, spec, rows, selection.names, deltas)
    spec.join({path: deltas[path][0] for path in matches.paths})
    for path, parts in deltas.items():
        module = model.get_submodule(path)
        delta = parts[0] if len(parts) == 1 else Stack(parts)
        lay(module, layer_class(module), name, delta, selection, path)
    freeze(model, selection)
    selection.names += (name,)
    return Adapter(model, name, spec, matches, bias, tuple(saved.by_pattern))


def reader(base: Weights | None, path: str) -> Callable[[], Tensor] | None:
    """A function that reads the weight (out, in) of a module from the base's own files; None if
    they do not have it.
    """
    found = None if base is None else base.find(f"{path}.weight")
    return None if base is None or found is None else partial(base.get, found)


def load(
    model: nn.Module, path: str | Path, name: str = "default",
    *, allow_other_base: bool = False, trainable: bool = False, base: Weights | None = None,
) -> Adapter:  # fmt: skip
    """Attach a saved adapter to a model. Every key must be used and every shape right.

    Otherwise LorafoldError is raised and the model is left as it is. The error lists everything
    that is wrong: unknown or missing keys, shapes, values that are not finite, options that are not
    supported, a base with another fingerprint.

    Args:
        model: the model.
        path: the adapter's directory.
        name: the adapter's name on this model.
        allow_other_base: accept a base with another fingerprint.
        trainable: make the adapter's parameters trainable.
        base: the base's own weights, if the model does not have them, because it is quantized or on
            the meta device.
    """
    stored, base = peft.read(path), base or ModelWeights(model)
    problems = [] if allow_other_base else stored.base_problems(base)
    try:
        tokens, stored = stored.token_rows(model, base)
        adapter = attach(model, stored.spec, name=name, tokens=tokens, **stored.beside(model))
    except LorafoldError as e:
        raise LorafoldError(f"{path}: {'; '.join([*problems, str(e)])}") from None
    try:
        peft.fill(
            model, dict(adapter._parts_by_path()), adapter.matches.paths, stored, base, problems
        )
    except LorafoldError:
        adapter.detach()
        raise
    return adapter.requires_grad_(trainable)
