"""The handle of an adapter on a model, with which it is saved, merged and detached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafold.adapter.coverage import Unreached, counted, unreached
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
from lorafold.core.delta import SETTINGS, Delta, check_settings, put, written
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, atomic_directory, read_object, write_json
from lorafold.files.contents import digest
from lorafold.files.model_card import CARD, VOCABULARY, ResultFiles, training_card
from lorafold.files.record import OTHER_BASE, RECORD, TRAINED_ON
from lorafold.files.templates import in_words
from lorafold.fold.plan import carry_out, plan_fold
from lorafold.identity import of_model
from lorafold.layers import parameter_count
from lorafold.layers.quantization_config import record_dequantized
from lorafold.methods.parts.extras import vocabulary
from lorafold.methods.parts.trainable_tokens import TokenRows
from lorafold.models.architecture import opened_by_name
from lorafold.models.loading import recorded_storage
from lorafold.models.sources import forget_source, name_of_base, source_of
from lorafold.models.weights import InMemory, Weights
from lorafold.peft.adapter_directory import AdapterConfig, write
from lorafold.peft.provenance import BASE_IDENTITY, COMPUTED, listed, recorded


class Adapter:
    """One named adapter on one model. `over` are the adapters that it lies over, lowest first.
    `other_base` says that it was loaded on another base than the one it was trained on.
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
        """The modules that have a delta of the adapter, by module path."""
        return {path: m for path, m in adapted_modules(self.model) if self.name in m.deltas}

    @property
    def deltas(self) -> dict[str, Delta]:
        """The adapter's deltas by module path."""
        return {path: m.deltas[self.name] for path, m in self.sites.items()}  # type: ignore[misc]

    def parts(self) -> Iterator[tuple[str, Delta]]:
        """Yield the module path and the delta of every part of every delta."""
        return ((path, part) for path, delta in self.deltas.items() for part in delta.parts())

    @property
    def own_deltas(self) -> dict[str, Delta]:
        """The deltas that the spec built, by module path, so without trained biases, modules to
        save and token rows.
        """
        deltas = self.deltas  # once, since it walks over the model
        return {path: next(iter(deltas[path].parts())) for path in self.matches.paths}

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The ids of the tokens whose rows train, by module path."""
        return {path: part.ids for path, part in self.parts() if isinstance(part, TokenRows)}

    @property
    def vocabulary(self) -> int | None:
        """The size of the vocabulary with the adapter's new tokens; None if it has none."""
        return vocabulary(self.model, self.parts())

    @property
    def unreached(self) -> Unreached:
        """What of the model carries no delta of the adapter: `str` gives one line, by kind."""
        return unreached(self.model, self.sites)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the name, `<module path>.<name>`, and the parameter, for each of the adapter's."""
        own = ((path, delta.named_parameters()) for path, delta in self.deltas.items())
        return ((joined(path, name), p) for path, named in own for name, p in named)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters."""
        return (p for delta in self.deltas.values() for p in delta.parameters())

    def tensors(self) -> Iterator[Tensor]:
        """Yield every parameter and buffer of the adapter, each in its own shape."""
        return chain.from_iterable(chain(d.parameters(), d.buffers()) for d in self.deltas.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the adapter, in its own shape, by `<module path>.<name>`; checkpoints
        have these. One more for each module are the settings of its delta (`core.delta`).
        """
        state, settings = dict[str, Tensor](), dict[str, Tensor]()
        for path, delta in self.deltas.items():
            prefix = f"{path}." if path else ""
            delta.state_dict(destination=state, prefix=prefix)
            if (own := written(delta)) is not None:
                settings[f"{prefix}{SETTINGS}"] = own
        return state | settings

    def load_state_dict(
        self, state: dict[str, Tensor], owns: Callable[[nn.Parameter], bool] = lambda p: True
    ) -> None:
        """Load what `state_dict` returned, into the adapter's tensors of which `owns` is true.

        A tensor may be of any shape, also another one than the adapter's own (a pruned rank), which
        makes it a new parameter; so make optimizers afterwards. Raises LorafoldError with the
        missing and unknown keys, or with another setting (a scale, a seed), and loads nothing then.
        """
        deltas, own = self.deltas, set(self.state_dict())
        settings = {joined(path, SETTINGS): path for path in deltas}
        # states of earlier versions have no settings
        missing, unknown = own - set(state) - set(settings), set(state) - own
        if missing or unknown:
            wrong = f"missing {sorted(missing)}, unknown {sorted(unknown)}"
            raise LorafoldError(f"adapter {self.name!r}: keys of the state to load: {wrong}")
        for name, path in settings.items():
            if name in state:
                check_settings(deltas[path], state[name], f"{path}: adapter {self.name!r}")
        for path, delta in deltas.items():
            for name, old in delta.state_dict(keep_vars=True).items():
                if not isinstance(old, nn.Parameter) or owns(old):
                    put(delta, name, state[joined(path, name)].to(old.device))

    def requires_grad_(self, trainable: bool = True) -> Adapter:
        """Make the adapter's parameters trainable, or freeze them; return the adapter.

        While they are frozen its dropout is off, also on a model in training mode.
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
        """Write the adapter in PEFT's format, or a plain model if it trained the base's own
        weights. The directory is written completely or not at all.

        Its record names the adapters that it lies over by the files that each was last loaded from
        or saved to; an adapter below that was neither loaded nor saved can't be named, so save that
        one first; and how the base stores its weights. Raises LorafoldError if `path` exists and
        `overwrite` is off.

        Args:
            path: the directory.
            overwrite: replace a directory that lorafold wrote.
            card: the text of its README.md.
            record: what `lorafold.json` contains in addition to the base's fingerprint, or with
                `base` instead of it.
            tokenizer: a tokenizer to write with it: that of a plain model, or one with new tokens.
            base: the base's own weights, if the model does not have them (see `load`).
        """
        path = Path(path).expanduser()
        grown = {VOCABULARY: size} if (size := self.vocabulary) else {}
        other = {OTHER_BASE: self.other_base} if self.other_base else {}
        source, stored = source_of(self.model), recorded_storage(self.model)
        trained = {TRAINED_ON: stored, BASE_IDENTITY: of_model(source) if source else None}
        below = recorded(self.over) if self.over else {}
        about = {**trained, **other, **(record or {}), **grown, **below}
        about = {name: value for name, value in about.items() if value is not None}
        beside = ResultFiles(about, card, tokenizer, overwrite)
        if self.spec.trains_base:
            return _write_whole(path, self.model, self.spec, beside)
        parts = {path: list(delta.parts()) for path, delta in self.deltas.items()}
        own = base or InMemory.of_model(self.model)
        written = write(path, self.model, self.chosen, parts, own, beside)
        origin = selection_of(self.model).origins[self.name]
        files = read_object(written / MANIFEST)["files"]
        entries = ((name, files[name]["size"], files[name]["sha256"]) for name in COMPUTED)
        origin.path, origin.sha256 = str(path), digest(entries)
        return written

    def merge(self, *, untie_weights: bool = False) -> None:
        """Fold the adapter into the model's weights, summed in fp32 and rounded once, and detach
        it. New tokens grow the vocabulary. A quantized weight (NF4, int8) is dequantized, to the
        dtype that it is computed in.

        Raises NotMergeable, before anything is changed, if a delta has no weight-space form, is
        above another adapter's, adds a bias that a plain model can't store, gives embedding and
        head different vocabularies, or changes one of two tied weights (`untie_weights=True` gives
        that module a weight of its own). Weights that change in the same way stay tied.
        """
        plan = plan_fold(self.model, [self.name])
        carry_out(self.model, plan, [self.name], untie_weights=untie_weights)
        # what lies over it lies over the base from now on
        selection_of(self.model).origins[self.name].sha256 = ""
        forget_source(self.model)
        self.detach()
        record_dequantized(self.model, plan.paths)

    def detach(self) -> None:
        """Detach the adapter; without any adapter the model is what it was before the first."""
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
        return in_words(
            "adapter/adapter.jinja",
            adapter=self,
            over=listed(self.over),
            targets={k: counted(self.model, v) for k, v in self.matches.by_pattern.items()},
            rows=[(path, part) for path, part in self.parts() if isinstance(part, TokenRows)],
            count=sum(p.numel() for p in self.parameters()),
            base=parameter_count(self.model),
        )


def _write_whole(path: Path, model: Any, spec: Spec, beside: ResultFiles) -> Path:
    """Write a model whose own weights were trained, completely or not at all."""
    if not hasattr(model, "save_pretrained"):
        raise LorafoldError(
            f"{path} was not written: found a {type(model).__name__}, but {type(spec).__name__}"
            " saves whole models and expects one of transformers (with save_pretrained)"
        )
    shown = {"recipe": {"method": type(spec).__name__, **vars(spec)}}
    name, opened_by = name_of_base(model), opened_by_name(model)
    card = beside.card or training_card(name, shown, {}, whole=True, opened_by=opened_by)
    with atomic_directory(path, beside.overwrite) as directory:
        model.save_pretrained(directory, state_dict=base_state(model))  # without its adapters
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(directory)
        write_json(directory / RECORD, {**beside.record, "lorafold": version("lorafold")})
        (directory / CARD).write_text(card, encoding="utf-8")
    return path
