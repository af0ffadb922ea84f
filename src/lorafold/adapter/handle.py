"""The handle of an adapter on a model, to save, merge and detach the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafold.adapter.coverage import Unreached, count_modules, unreached
from lorafold.core.anatomy import joined
from lorafold.core.attach import (
    Adapted,
    Origin,
    adapted_modules,
    base_state,
    detach_delta,
    freeze,
    selection_of,
)
from lorafold.core.delta import SETTINGS, Delta, check_settings, encoded_settings, set_tensor
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, atomic_directory, read_object, write_json
from lorafold.files.contents import digest
from lorafold.files.model_card import CARD, VOCABULARY, ResultFiles, training_card
from lorafold.files.record import OTHER_BASE, RECORD, TRAINED_ON
from lorafold.files.templates import render_text
from lorafold.fold.plan import execute_fold, plan_fold
from lorafold.identity import of_model
from lorafold.layers import parameter_count
from lorafold.layers.quantization_config import record_dequantized
from lorafold.methods.common.biases_and_modules import vocabulary
from lorafold.methods.common.trainable_tokens import TokenRows
from lorafold.models.architecture import auto_class_name
from lorafold.models.loading import recorded_storage
from lorafold.models.sources import forget_source, name_of_base, source_of
from lorafold.models.weights import InMemory, Weights
from lorafold.peft.adapter_directory import AdapterConfig, write_adapter
from lorafold.peft.provenance import BASE_IDENTITY, DIGEST_FILES, describe_adapters, over_record


class Adapter:
    """A named adapter on a model. `over` are the adapters below it, lowest first. `other_base` is a
    note if the adapter was trained on another base.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        chosen: AdapterConfig,
        over: tuple[Origin, ...] = (),
        other_base: str = "",
    ) -> None:
        self.model, self.name, self.chosen, self.over = model, name, chosen, over
        self.other_base = other_base
        self.spec, self.matches = chosen.spec, chosen.matches

    @property
    def sites(self) -> dict[str, Adapted]:
        """The modules that have a delta of this adapter, by module path."""
        return {path: m for path, m in adapted_modules(self.model) if self.name in m.deltas}

    @property
    def deltas(self) -> dict[str, Delta]:
        """The adapter's deltas by module path."""
        return {path: m.deltas[self.name] for path, m in self.sites.items()}  # type: ignore[misc]

    def parts(self) -> Iterator[tuple[str, Delta]]:
        """Yields (module path, part) for every part of every delta."""
        return ((path, part) for path, delta in self.deltas.items() for part in delta.parts())

    @property
    def own_deltas(self) -> dict[str, Delta]:
        """The deltas of the adapter's method, by module path, without trained biases, modules to
        save and token rows.
        """
        deltas = self.deltas  # once, because it walks over the model
        return {path: next(iter(deltas[path].parts())) for path in self.matches.paths}

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The ids of the trained tokens by module path."""
        return {path: part.ids for path, part in self.parts() if isinstance(part, TokenRows)}

    @property
    def vocabulary(self) -> int | None:
        """The size of the vocabulary with the adapter's new tokens; None without new tokens."""
        return vocabulary(self.model, self.parts())

    @property
    def unreached(self) -> Unreached:
        """The numbers of parameters without a delta of this adapter, by kind; `str` formats them as
        one line.
        """
        return unreached(self.model, self.sites)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the name, `<module path>.<name>`, and the parameter, for each parameter of the
        adapter.
        """
        own = ((path, delta.named_parameters()) for path, delta in self.deltas.items())
        return ((joined(path, name), p) for path, named in own for name, p in named)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the adapter's parameters."""
        return (p for delta in self.deltas.values() for p in delta.parameters())

    def tensors(self) -> Iterator[Tensor]:
        """Yields every parameter and buffer of the adapter, each in its own shape."""
        return chain.from_iterable(chain(d.parameters(), d.buffers()) for d in self.deltas.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the adapter (any shapes) by `<module path>.<name>`, as in checkpoints, and
        the settings of each delta (`core.delta`).
        """
        state, settings = dict[str, Tensor](), dict[str, Tensor]()
        for path, delta in self.deltas.items():
            prefix = f"{path}." if path else ""
            delta.state_dict(destination=state, prefix=prefix)
            if (own := encoded_settings(delta)) is not None:
                settings[f"{prefix}{SETTINGS}"] = own
        return state | settings

    def load_state_dict(
        self, state: dict[str, Tensor], owns: Callable[[nn.Parameter], bool] = lambda p: True
    ) -> None:
        """Loads a `state_dict` into the adapter's buffers, and into the parameters for which `owns`
        is true.

        A tensor of any shape other than the adapter's (for example, of a pruned rank) becomes a new
        parameter, so create optimizers afterwards. Raises LorafoldError, and loads nothing, for
        missing and unknown keys or different settings (a scale, a seed).
        """
        deltas, own = self.deltas, set(self.state_dict())
        settings = {joined(path, SETTINGS): path for path in deltas}
        # states of earlier versions have no settings
        missing, unknown = own - set(state) - set(settings), set(state) - own
        if missing or unknown:
            wrong = f"missing {sorted(missing)}, unknown {sorted(unknown)}"
            raise LorafoldError(f"adapter {self.name!r}: wrong keys of the state dict: {wrong}")
        for name, path in settings.items():
            if name in state:
                check_settings(deltas[path], state[name], f"{path}: adapter {self.name!r}")
        for path, delta in deltas.items():
            for name, old in delta.state_dict(keep_vars=True).items():
                if not isinstance(old, nn.Parameter) or owns(old):
                    set_tensor(delta, name, state[joined(path, name)].to(old.device))

    def requires_grad_(self, trainable: bool = True) -> Adapter:
        """Makes the adapter's parameters trainable, or freezes them; returns the adapter.

        While the adapter is frozen, its dropout is off, even if the model is in training mode.
        """
        for p in self.parameters():
            p.requires_grad_(trainable)
        for m in self.sites.values():
            m.deltas.train(m.training)
        return self

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        card: str | None = None,
        record: dict[str, Any] | None = None,
        tokenizer: Any = None,
        base: Weights | None = None,
    ) -> Path:
        """Writes the adapter in PEFT's format, or a full model if the adapter trained the base
        weights. The directory is written atomically.

        The record contains the base's weight format, and identifies the adapters below by the files
        that they were last loaded from or saved to, so save them first. Raises LorafoldError if
        `path` exists and `overwrite` is off.

        Args:
            path: the directory to write.
            overwrite: replace a directory that lorafold wrote.
            card: the text of the model card, README.md.
            record: further contents of `lorafold.json`; a `base` replaces the base's fingerprint.
            tokenizer: a tokenizer to write to the directory, for a full model or new tokens.
            base: the base's original weights, if the model does not have them (see `load`).
        """
        path = Path(path).expanduser()
        grown = {VOCABULARY: size} if (size := self.vocabulary) else {}
        other = {OTHER_BASE: self.other_base} if self.other_base else {}
        source, stored = source_of(self.model), recorded_storage(self.model)
        trained = {TRAINED_ON: stored, BASE_IDENTITY: of_model(source) if source else None}
        below = over_record(self.over) if self.over else {}
        about = {**trained, **other, **(record or {}), **grown, **below}
        about = {name: value for name, value in about.items() if value is not None}
        beside = ResultFiles(about, card, tokenizer, overwrite)
        if self.spec.trains_base:
            return _write_model(path, self.model, self.spec, beside)
        parts = {path: list(delta.parts()) for path, delta in self.deltas.items()}
        own = base or InMemory.of_model(self.model)
        written = write_adapter(path, self.model, self.chosen, parts, own, beside)
        origin = selection_of(self.model).origins[self.name]
        files = read_object(written / MANIFEST)["files"]
        entries = ((name, files[name]["size"], files[name]["sha256"]) for name in DIGEST_FILES)
        origin.path, origin.sha256 = str(path), digest(entries)
        return written

    def merge(self, *, untie_weights: bool = False) -> None:
        """Merges the adapter into the model's weights, summed in fp32 and rounded once, and
        detaches it. New tokens grow the vocabulary. A quantized weight is dequantized to its
        compute dtype.

        Raises NotMergeable, before anything is changed, if a delta can't be expressed in the
        weight, is on top of another adapter's delta, adds a bias that the model can't store, gives
        embedding and head different vocabularies, or changes only one of two tied weights
        (`untie_weights=True` gives that module its own weight). Weights that change in the same way
        stay tied.
        """
        plan = plan_fold(self.model, [self.name])
        execute_fold(self.model, plan, [self.name], untie_weights=untie_weights)
        # adapters on top of it are now on top of the base
        selection_of(self.model).origins[self.name].sha256 = ""
        forget_source(self.model)
        self.detach()
        record_dequantized(self.model, plan.paths)

    def detach(self) -> None:
        """Detaches the adapter. Detaching the last one restores the model, except weights that were
        trained in place or merged.
        """
        selection = selection_of(self.model)
        for m in self.sites.values():
            detach_delta(m, self.name)
        selection.remove(self.name)
        if any(adapted_modules(self.model)):
            freeze(self.model, selection)
        else:
            for parameter in selection.frozen:
                parameter.requires_grad_(True)
            selection.frozen = []

    def __repr__(self) -> str:
        return render_text(
            "adapter/adapter.jinja",
            adapter=self,
            over=describe_adapters(self.over),
            targets={k: count_modules(self.model, v) for k, v in self.matches.by_pattern.items()},
            rows=[(path, part) for path, part in self.parts() if isinstance(part, TokenRows)],
            count=sum(p.numel() for p in self.parameters()),
            base=parameter_count(self.model),
        )


def _write_model(path: Path, model: Any, spec: Spec, beside: ResultFiles) -> Path:
    """Writes a model whose base weights were trained, atomically."""
    if not hasattr(model, "save_pretrained"):
        raise LorafoldError(
            f"{path} was not written: found a {type(model).__name__}, but {type(spec).__name__}"
            " saves the whole model, which must be a transformers model (with save_pretrained)"
        )
    shown = {"recipe": {"method": type(spec).__name__, **vars(spec)}}
    name, opened_by = name_of_base(model), auto_class_name(model)
    card = beside.card or training_card(name, shown, {}, whole=True, opened_by=opened_by)
    with atomic_directory(path, beside.overwrite) as directory:
        model.save_pretrained(directory, state_dict=base_state(model))  # without adapters
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(directory)
        write_json(directory / RECORD, {**beside.record, "lorafold": version("lorafold")})
        (directory / CARD).write_text(card, encoding="utf-8")
    return path
