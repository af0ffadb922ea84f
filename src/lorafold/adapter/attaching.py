"""Attaches new and saved adapters to a model. `build_adapter` and `read_adapter` only create the
deltas and leave the model unchanged, because the engine reads adapters while the model runs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lorafold.adapter.handle import Adapter
from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import (
    Adapted,
    Origin,
    adapted_modules,
    attach_delta,
    freeze,
    selection_of,
)
from lorafold.core.combine import Stack
from lorafold.core.contexts import prepare_model
from lorafold.core.delta import Delta
from lorafold.core.expert_matrices import expert_parameters, module_at, parameter_path
from lorafold.core.shared_tensors import skip_init
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches, match
from lorafold.errors import LorafoldError, NoTarget, join_problems, listed, truncate_middle
from lorafold.files.contents import Contents
from lorafold.foreign_options import with_suggestions
from lorafold.identity import of_model
from lorafold.kernels.registry import TRAINING, enable
from lorafold.layers import is_linear, layer_class, layer_of
from lorafold.methods.common.biases_and_modules import (
    Bias,
    ReplaceDelta,
    add_biases,
    add_token_rows,
    param_paths,
)
from lorafold.methods.common.trainable_tokens import TrainableTokens
from lorafold.models.classifier import new_heads
from lorafold.models.sources import name_of_base, source_of
from lorafold.models.weights import InMemory, Weights
from lorafold.peft import provenance
from lorafold.peft.adapter_directory import AdapterConfig, SavedAdapter
from lorafold.peft.config import read_new
from lorafold.peft.tokens import resolve

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger(__name__)


@with_suggestions
def attach(
    model: nn.Module,
    spec: Spec | LoraConfig,
    targets: str | Sequence[str] | Matches | None = None,
    name: str = "default",
    *,
    bias: Bias = "none",
    modules_to_save: Sequence[str] | Matches = (),
    tokens: Sequence[int] | Mapping[str, Sequence[int]] | TrainableTokens = (),
    base: Weights | None = None,
) -> Adapter:
    """Attaches an adapter to a model, on top of the active adapters, freezes the base and activates
    the adapter.

    Raises LorafoldError, and leaves the model unchanged, for a pattern that matches no module, a
    module that can't be adapted, or a name that is in use.

    Args:
        spec: the method with its hyperparameters, or a `peft.LoraConfig`, which also selects the
            modules and tokens, so the other arguments must not.
        targets: the modules to adapt: a preset (`lorafold.core.targets`), names or path ends, a
            regular expression over whole paths, or matches (None: the method's default).
        name: the adapter's name on this model.
        bias: also train the biases of the adapted modules ("lora_only"), or all biases ("all").
        modules_to_save: modules to train in full, such as a new head, by names or matches; they are
            excluded from the targets.
        tokens: token ids whose embedding and head rows are trained, or ids by module name. Ids
            beyond the vocabulary are new tokens: the logits get a column for each while the adapter
            is active. `config.vocab_size` does not change, so the loss that transformers computes
            from `labels` does not fit; compute the loss with lorafold.
        base: the base's original weights, if the model does not have them (see `load`); loftq needs
            them.
    """
    options = {"bias": bias, "modules_to_save": modules_to_save, "tokens": tokens, "base": base}
    built = build_adapter(model, spec, targets, **options)  # type: ignore[arg-type]
    return _attach_built(model, built, name, True)


def load(
    model: nn.Module, path: str | Path | SavedAdapter, name: str = "default",
    *, allow_other_base: bool = False, trainable: bool = False, base: Weights | None = None,
) -> Adapter:  # fmt: skip
    """Attaches a saved adapter (see `lf.load`). If it does not fit the model, raises a
    LorafoldError that lists every problem, and leaves the model unchanged.
    """
    built = read_adapter(model, path, allow_other_base=allow_other_base, base=base)
    source = None if allow_other_base else source_of(model)
    if source and built.base_identity and built.base_identity != of_model(source):
        log.warning(
            f"{built.files[0]}: the files of the base {source.name} differ from those in training;"
            " its weights may have changed, or only their format"
        )
    if trainable and not built.over:
        built = replace(built, over=selection_of(model).active)
    return _attach_built(model, built, name, trainable).requires_grad_(trainable)


def load_all(
    model: nn.Module,
    adapters: Sequence[SavedAdapter],
    name: str,
    *,
    allow_other_base: bool = False,
    base: Weights | None = None,
) -> list[Adapter]:
    """Attaches saved adapters, the lowest first, with the names `name` + "1", `name` + "2", ..."""
    return [
        load(model, saved, f"{name}{number}", allow_other_base=allow_other_base, base=base)
        for number, saved in enumerate(adapters, 1)
    ]


def _attach_built(model: nn.Module, built: BuiltAdapter, name: str, trainable: bool) -> Adapter:
    if not name or "." in name or any(name in m.deltas for _, m in adapted_modules(model)):
        raise LorafoldError(
            f"adapter name: found {name!r}, expected a nonempty name that has no dot and is not in"
            " use on this model"
        )
    if trainable and any(p.is_cpu for p in model.parameters()):
        enable(TRAINING)  # compiles kernels now, before the first step
    selection = selection_of(model)
    for path, parts in built.parts.items():
        module, delta = module_at(model, path), parts[0] if len(parts) == 1 else Stack(parts)
        attach_delta(module, layer_class(module), name, delta, selection, path)
    freeze(model, selection)
    selection.add(name)
    selection.origins[name] = Origin(name, *built.files)
    return Adapter(model, name, built.chosen, built.over, built.other_base)


MAX_VALUES = 1 << 26  # an adapter may have this many values, even on a smaller model


@dataclass(frozen=True)
class BuiltAdapter:
    """An adapter built for one model. `parts` are the parts of its deltas by module path, lowest
    first; `over` are the adapters below it; `files` are the directory that it was read from and its
    digest; `base_identity` identifies the files of the base that it was trained on; `other_base` is
    a note if the model is another base.
    """

    chosen: AdapterConfig
    parts: Mapping[str, list[Delta]]
    over: tuple[Origin, ...]
    files: tuple[str, str] = ("", "")
    base_identity: str = ""
    other_base: str = ""


def build_adapter(
    model: nn.Module,
    spec: Spec | LoraConfig,
    targets: str | Sequence[str] | Matches | None = None,
    *,
    bias: Bias = "none",
    modules_to_save: Sequence[str] | Matches = (),
    tokens: Sequence[int] | Mapping[str, Sequence[int]] | TrainableTokens = (),
    base: Weights | None = None,
) -> BuiltAdapter:
    """Builds a new adapter without attaching it. The arguments are those of `attach`."""
    prepare_model(model)
    if not isinstance(spec, Spec):
        if targets is not None or bias != "none" or modules_to_save or tokens:
            names = "targets, bias, modules_to_save, tokens"
            raise LorafoldError(f"{names}: found one beside a LoraConfig; set it in the config")
        config = getattr(model, "config", None)
        spec, selected, bias = read_new(spec, getattr(config, "model_type", ""))
        spec, targets = selected.spec_in(model, spec), selected.targets(model)
        tokens = resolve(model, selected.tokens) if selected.tokens else ()
        modules_to_save = selected.saved(model)
    selection = selection_of(model)
    saved = match(model, modules_to_save, is_linear)
    whole = dict.fromkeys(leaf for p in saved.paths for leaf in param_paths(module_at(model, p), p))
    matches = match(model, spec.targets if targets is None else targets, is_linear)
    matches = matches.without(whole) if whole else matches
    if not matches.paths:
        raise LorafoldError(
            f"modules_to_save includes every target ({listed(matches.by_pattern)}); leave some"
            " target modules out of modules_to_save"
        )
    deltas = {}
    for path in matches.paths:
        module = module_at(model, path)
        if isinstance(module, Adapted):
            layer = module.layer(*selection.names)
        else:
            stored_as = base.find(parameter_path(module, path, "weight")) if base else None
            layer = layer_of(module, partial(base.get, stored_as) if base and stored_as else None)
        try:
            deltas[path] = [spec.at(path).build(layer)]
        except LorafoldError as e:
            reason, anatomy = str(e), Anatomy.of(model)
            if path in anatomy.routers:
                experts = ((p, expert_parameters(m)) for p, m in anatomy.modules)
                owner, parameter = next((p, names[0]) for p, names in experts if names)
                reason = (
                    "a router selects the experts of each token; to train the router,"
                    " add it to --modules-to-save (modules_to_save); for the experts, use targets"
                    f" such as {owner.rpartition('.')[2]}.{parameter}"
                )
            raise NoTarget(f"{path}: unsupported by {type(spec).__name__}: {reason}") from None
    if bias != "none":
        add_biases(model, matches, bias, deltas)
    deltas |= {path: [ReplaceDelta(module_at(model, path), path)] for path in whole}
    rows = tokens if isinstance(tokens, TrainableTokens) else TrainableTokens(tokens)
    if rows.ids or any(adapted_modules(model)):
        add_token_rows(model, spec, rows, selection.names, deltas)
    spec.join({path: deltas[path][0] for path in matches.paths})
    return BuiltAdapter(
        AdapterConfig(spec, matches, bias, tuple(saved.by_pattern)), deltas, selection.active
    )


def read_adapter(
    model: nn.Module,
    path: str | Path | Contents | SavedAdapter,
    *,
    allow_other_base: bool = False,
    base: Weights | None = None,
    below: Sequence[Origin] | None = None,
) -> BuiltAdapter:
    """Reads a saved adapter without attaching it. The arguments are those of `load`; `below` are
    the adapters below it (None: the model's active adapters).
    """
    prepare_model(model)
    saved = (path if isinstance(path, SavedAdapter) else SavedAdapter.open(path)).for_model(model)
    if saved.over:  # one of these adapters replaces the model's randomly initialized head
        saved = replace(saved, own_base=saved.own_base.without(new_heads(model)))
    base, problems = base or InMemory.of_model(model), []
    below = selection_of(model).active if below is None else tuple(below)
    fits, other_base = provenance.same_adapters(saved.over, below), ""
    if allow_other_base:
        if other_base := saved.own_base.other_base_warning(base):
            log.warning(other_base)
        if not fits:
            reason, option = provenance.mismatch_message(saved.over, below), provenance.ALLOW_OPTION
            log.warning("adapter %s: %s; loaded anyway (%s)", saved, reason, option)
    else:
        if not fits:
            advice = provenance.loading_advice(saved.path, saved.over)
            problems.append(f"{provenance.mismatch_message(saved.over, below)}; {advice}")
        problems += saved.own_base.problems(base, name_of_base(model))
    try:
        tokens: Mapping[str, Sequence[int]] = {}
        if saved.selection.tokens:
            tokens, saved = saved.token_rows(model, base)
        spec = saved.selection.spec_in(model, saved.spec)
        # some methods sample as many values as the base has, or random projections of its ranks
        in_file = sum(math.prod(saved.weights.shape(name)) for name in saved.weights.names)
        with skip_init(4 * in_file + max(MAX_VALUES, sum(p.numel() for p in model.parameters()))):
            built = build_adapter(model, spec, tokens=tokens, **saved.attach_options(model))
    except LorafoldError as e:
        raise _load_error(saved, model, join_problems([*problems, e])) from None
    try:
        saved.load_into(model, built.parts, built.chosen.matches.paths, base, problems)
    except LorafoldError as e:
        raise _load_error(saved, model, str(e)) from None
    over = below if saved.over and fits else saved.over
    files, trained_on = (str(saved), saved.sha256), saved.own_base.identity
    return replace(built, over=over, files=files, base_identity=trained_on, other_base=other_base)


def _load_error(saved: SavedAdapter, model: nn.Module, reason: str) -> LorafoldError:
    """The error for an adapter that does not fit a model; its path is shortened if the base
    differs.
    """
    path, hint = str(saved), saved.own_base.hint(name_of_base(model))
    if reason.startswith(provenance.OTHER_BASE_MESSAGE):
        path = truncate_middle(path, max(40, provenance.MAX_MESSAGE - len(reason)))
    return LorafoldError(f"{path}: {reason}{hint}")
