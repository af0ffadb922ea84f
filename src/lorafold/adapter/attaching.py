"""Adapters on a model: what the user holds.

    adapter = lf.attach(model, lf.LoRA(rank=16), targets="all-linear", name="sft")
    adapter.save(path);  adapter = lf.load(model, path);  adapter.merge();  adapter.detach()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafold.bases import is_linear, layer_class, layer_of, parameter_count
from lorafold.bases.bitsandbytes import record_dequantized
from lorafold.core.attach import (
    Adapted,
    adapted_modules,
    freeze,
    lay,
    lift,
    only,
    selection_of,
    thaw,
)
from lorafold.core.combine import Stack
from lorafold.core.delta import Delta, put
from lorafold.core.layer import bare
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches, match
from lorafold.errors import LorafoldError
from lorafold.files.card import VOCABULARY
from lorafold.fold.in_memory import carry_out
from lorafold.fold.plan import plan_fold
from lorafold.methods.parts.beside import Bias, add_biases, add_rows
from lorafold.methods.parts.replace import ReplaceDelta, leaves
from lorafold.methods.parts.token_rows import TokenRows, Tokens
from lorafold.models import whole
from lorafold.models.weights import ModelWeights, Weights
from lorafold.peft import directory as peft


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class Adapter:
    """One named adapter on one model. `deltas` maps module paths to what was laid there."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        spec: Spec,
        matches: Matches,
        bias: Bias,
        modules_to_save: tuple[str, ...],
    ) -> None:
        self.model, self.name, self.spec, self.matches = model, name, spec, matches
        self.bias, self.modules_to_save = bias, modules_to_save

    @property
    def sites(self) -> dict[str, Adapted]:
        return {path: m for path, m in adapted_modules(self.model) if self.name in m.deltas}

    @property
    def deltas(self) -> dict[str, Delta]:
        return {path: m.deltas[self.name] for path, m in self.sites.items()}  # type: ignore[misc]

    def parts(self) -> Iterator[tuple[str, Delta]]:
        """(module path, delta) for every delta, combinators taken apart."""
        return ((path, part) for path, delta in self.deltas.items() for part in delta.parts())

    @property
    def own_deltas(self) -> dict[str, Delta]:
        """The deltas that the spec built, by module path: without trained biases, modules to save
        and token rows.
        """
        deltas = self.deltas  # a walk over the model each time
        return {path: next(iter(deltas[path].parts())) for path in self.matches.paths}

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The ids whose rows train, by module path."""
        return {path: part.ids for path, part in self.parts() if isinstance(part, TokenRows)}

    @property
    def vocabulary(self) -> int | None:
        """The size of the vocabulary where some tokens are new to the base."""
        ends: dict[str, Any] = {p: bare(self.model.get_submodule(p)) for p in self.tokens}
        sizes = {path: max(ids) + 1 for path, ids in self.tokens.items()}
        return max((n for path, n in sizes.items() if n > len(ends[path].weight)), default=None)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        own = ((path, delta.named_parameters()) for path, delta in self.deltas.items())
        return ((joined(path, name), p) for path, named in own for name, p in named)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the adapter under `<module path>.<name>`; what checkpoints hold."""
        own = ((path, delta.state_dict()) for path, delta in self.deltas.items())
        return {joined(path, name): t for path, state in own for name, t in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; tensors are taken as they are, so that one may have another
        size than the fresh one (a pruned rank). LorafoldError lists missing and unknown keys;
        nothing is loaded then. Make optimizers after it, not before.
        """
        own, given = set(self.state_dict()), set(state)
        if own != given:
            wrong = f"missing {sorted(own - given)}, unknown {sorted(given - own)}"
            raise LorafoldError(f"adapter state: {wrong}")
        for path, delta in self.deltas.items():
            for name, old in delta.state_dict(keep_vars=True).items():
                put(delta, name, state[joined(path, name)].to(old.device))

    def requires_grad_(self, trainable: bool = True) -> Adapter:
        for p in self.parameters():
            p.requires_grad_(trainable)
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
        weights; the directory whole or not at all.

        `tokenizer` is one that belongs with it and goes into the directory too: a plain model's, or
        one that has new tokens. `card` is the text of its README.md, and `record` what
        `lorafold.json` says beside the base's fingerprint; `base` has the base's own weights where
        the model does not (see `load`). Raises LorafoldError if `path` exists and overwrite is off.
        """
        grown = {VOCABULARY: size} if (size := self.vocabulary) else {}
        about: dict[str, Any] = {"overwrite": overwrite, "card": card}
        about["record"] = {**(record or {}), **grown}
        if self.spec.trains_base:
            return whole.write(path, self.model, self.spec, tokenizer, **about)
        own = base or ModelWeights(self.model)
        parts, beside = dict(self._parts_by_path()), (self.bias, self.modules_to_save)
        laid = (self.model, self.spec, self.matches, parts, *beside)
        return peft.write(path, *laid, own, tokenizer, **about)

    def _parts_by_path(self) -> Iterator[tuple[str, list[Delta]]]:
        return ((path, list(delta.parts())) for path, delta in self.deltas.items())

    def merge(self, *, untie_weights: bool = False) -> None:
        """Fold the adapter into the model's weights, summed in fp32 and rounded once, and detach
        it. New tokens grow the vocabulary; a packed weight (NF4, int8) becomes a plain one, in the
        dtype that it is computed with.

        NotMergeable, before anything is changed, if a delta has no weight-space form, lies over
        another adapter's, adds a bias that a plain model could not hold, gives embedding and head
        different vocabularies, or changes one of two tied weights (`untie_weights=True` gives that
        module a weight of its own). Weights that are changed alike stay tied.
        """
        plan = plan_fold(self.model, [self.name])
        carry_out(self.model, plan, [self.name], untie_weights=untie_weights)
        self.detach()
        record_dequantized(self.model, plan.paths)

    def detach(self) -> None:
        """Take the adapter off; with the last one the model is what it was before the first."""
        selection = selection_of(self.model)
        for m in self.sites.values():
            lift(m, self.name)
        selection.names = tuple(n for n in selection.names if n != self.name)
        if any(adapted_modules(self.model)):
            freeze(self.model, selection)
        else:
            thaw(selection)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        base = parameter_count(self.model)
        lines = [f"{self.name}: {self.spec}"]
        lines += [
            f"  {pattern}: {len(paths)} modules"
            for pattern, paths in self.matches.by_pattern.items()
        ]
        lines += [f"  bias: {self.bias}"] * (self.bias != "none")
        lines += [f"  modules to save: {', '.join(self.modules_to_save)}"] * bool(
            self.modules_to_save
        )
        tokens = [(path, part) for path, part in self.parts() if isinstance(part, TokenRows)]
        lines += [
            f"  tokens: {len(t.ids)} rows of {path}"
            + ", which shares those of the embedding" * bool(t.twin)
            for path, t in tokens
        ]
        return "\n".join(
            [*lines, f"  {count:,} parameters, {count / base:.2%} of the model's {base:,}"]
        )


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
    """Lay an adapter over a model, freeze the base and make the adapter live, above those that are
    live already.

    targets: a preset (`lorafold.core.presets`), names or path ends, or one regex over whole paths
    (None: the method's own). bias: also train the biases of the adapted modules ("lora_only") or of
    every module ("all"). modules_to_save: modules trained whole, such as a fresh head; these are no
    targets. Both may be matches that are found already. tokens: ids whose rows train, in the
    embedding and the head (or by module name). Those from the vocabulary's end on are new: the
    logits have a column more for each while the adapter is live (`config.vocab_size` stays the
    base's, so leave the loss to lorafold). base: the base's own weights where the model does not
    have them (see `load`), which some initializations ask for. LorafoldError, with the model
    untouched, for a pattern that matches nothing, a module that can't be adapted or a name in use.
    """
    selection = selection_of(model)
    if not name or "." in name or any(name in m.deltas for _, m in adapted_modules(model)):
        raise LorafoldError(
            f"adapter name {name!r} is in use on this model, empty, or holds a dot; choose another"
        )
    saved = match(model, modules_to_save, is_linear)
    whole = dict.fromkeys(leaf for p in saved.paths for leaf in leaves(model.get_submodule(p), p))
    matches = match(model, spec.targets if targets is None else targets, is_linear).without(whole)
    if not matches.paths:
        raise LorafoldError(f"modules_to_save takes every target: {', '.join(matches.by_pattern)}")
    laid: dict[str, list[Delta]] = {}
    for path in matches.paths:
        module = model.get_submodule(path)
        if isinstance(module, Adapted):
            layer = module.layer(*selection.names)
        else:
            layer = layer_of(module, at(base, path))
        try:
            laid[path] = [spec.at(path).build(layer)]
        except LorafoldError as e:
            raise LorafoldError(f"{path}: {type(spec).__name__} can't be laid on it: {e}") from None
    add_biases(model, matches, bias, laid)
    laid |= {path: [ReplaceDelta(model.get_submodule(path), path)] for path in whole}
    rows = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
    add_rows(model, spec, rows, selection.names, laid)
    spec.join({path: laid[path][0] for path in matches.paths})
    for path, deltas in laid.items():
        module = model.get_submodule(path)
        delta = deltas[0] if len(deltas) == 1 else Stack(deltas)
        lay(module, layer_class(module), name, delta, selection, path)
    freeze(model, selection)
    selection.names += (name,)
    return Adapter(model, name, spec, matches, bias, tuple(saved.by_pattern))


def at(base: Weights | None, path: str) -> Callable[[], Tensor] | None:
    """Reads the weight that a module has in the base's own files."""
    found = None if base is None else base.find(f"{path}.weight")
    return None if base is None or found is None else partial(base.get, found)


def load(
    model: nn.Module, path: str | Path, name: str = "default",
    *, allow_other_base: bool = False, trainable: bool = False, base: Weights | None = None,
) -> Adapter:  # fmt: skip
    """Lay a saved adapter over a model: strict, so that every key is used and every shape right, or
    nothing is changed.

    `base` has the base's own weights where the model does not: it is quantized, or on the meta
    device. LorafoldError lists all that is wrong: keys unknown or missing, shapes, values that are
    not finite, options not supported, a base whose fingerprint differs (`allow_other_base=True`
    overrides that one).
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


__all__ = ["Adapter", "attach", "load", "only"]
