"""Adapters as directories in PEFT's format, written and read.

    adapter_config.json            method, targets, bias, modules to save
    adapter_model.safetensors      fp32, under PEFT's names: base_model.model.<module
                                   path>.lora_A.weight ...
    lorafold.json                  the base's fingerprint, the version, and a record of how it was
                                   made
    README.md                      the model card
    tokenizer.json ...             the tokenizer, where the adapter has one of its own

What a method looks like in them is one row of `table.py`. Reading is strict: everything in a
directory is used and understood, or all that is not is named and nothing is changed. PEFT's own
directories are read alike (they have no fingerprint).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, write_json
from lorafold.files.card import CARD, VOCABULARY, training_card
from lorafold.files.intact import check_intact
from lorafold.files.record import RECORD, read_object
from lorafold.methods.parts.beside import Bias
from lorafold.methods.parts.replace import ReplaceDelta
from lorafold.models import fingerprint
from lorafold.models.fingerprint import Fingerprint
from lorafold.models.weights import FileWeights, Weights
from lorafold.peft import tokens
from lorafold.peft.config import CONFIG, read_config, write_config
from lorafold.peft.format import ROOT
from lorafold.peft.places import Parts, Place, places, sites
from lorafold.peft.selection import Selection, describe

WEIGHTS = "adapter_model.safetensors"

T = TypeVar("T")


def write(
    path: str | Path,
    model: nn.Module,
    spec: Spec,
    matches: Matches,
    parts: Parts,
    bias: Bias,
    modules_to_save: Sequence[str],
    base: Weights,
    tokenizer: Any,
    *,
    overwrite: bool,
    card: str | None,
    record: Mapping[str, Any],
) -> Path:
    """Write the directory, whole or not at all.

    `matches` and `modules_to_save` say what the user selected modules by; `base` has the base's own
    weights; a `tokenizer` goes into it too.

    LorafoldError if the path exists and overwrite is off, the format has no place for something, or
    a value is not finite.
    """
    targets = matches.paths
    replaced = [
        p for p, deltas in parts.items() if any(isinstance(d, ReplaceDelta) for d in deltas)
    ]
    saved = [p for p in replaced if p not in targets]
    selection = describe(
        model, [p for p in targets if p], tuple(matches.by_pattern), saved, modules_to_save
    )
    config = write_config(model, spec, sites(model, parts, targets, base), selection, bias)
    tensors = {
        key: place.encoded().contiguous().cpu()
        for key, place in places(model, parts, targets, base).items()
    }
    if wrong := [text for key, t in tensors.items() if (text := _not_finite(key, t))]:
        raise LorafoldError(f"{path} was not written: {'; '.join(wrong)}")
    about = {**record, "lorafold": version("lorafold"), "base": fingerprint.of(base, replaced)}
    shown = {k: v for k, v in record.items() if k == VOCABULARY} | {
        "recipe": {"method": type(spec).__name__, **vars(spec)}
    }
    own_card = training_card(config["base_model_name_or_path"] or "", shown, {})
    with atomic_directory(path, overwrite) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        write_json(directory / CONFIG, config)
        write_json(directory / RECORD, about)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        (directory / CARD).write_text(card or own_card, encoding="utf-8")
    return Path(path)


@dataclass(frozen=True)
class Stored:
    """An adapter directory, its config understood and its tensors not yet read."""

    path: Path
    spec: Spec
    bias: Bias
    selection: Selection
    weights: Weights
    fingerprint: Fingerprint

    def targets(self, model: nn.Module) -> Matches:
        return self.selection.targets(model)

    def modules_to_save(self, model: nn.Module) -> Matches:
        return self.selection.saved(model)

    def beside(self, model: nn.Module) -> dict[str, Any]:
        """What `attach` takes for this model besides the spec; rows of tokens are left out."""
        return {
            "targets": self.targets(model),
            "bias": self.bias,
            "modules_to_save": self.modules_to_save(model),
        }

    def token_rows(self, model: nn.Module, base: Weights) -> tuple[tokens.ByPath, Stored]:
        """The ids whose rows it holds, by module path, and itself with exactly those rows in its
        weights.
        """
        ids, weights = tokens.completed(
            model, tokens.resolve(model, self.selection.tokens), self.weights, base
        )
        return ids, replace(self, weights=weights)

    def base_problems(self, base: Weights) -> list[str]:
        """What says that the adapter was trained on another base.

        An adapter without a fingerprint fits any.
        """
        found = fingerprint.differences(self.fingerprint, base)
        return [
            f"not the base it was trained on ({d}), which --allow-other-base"
            " (allow_other_base=True) overrides"
            for d in found
        ]


def read(path: str | Path) -> Stored:
    """Open an adapter directory.

    LorafoldError lists all that is damaged, or all that is missing, unreadable or not supported.
    """
    directory = Path(path)
    if not (directory / CONFIG).is_file():
        inside = sorted(str(p.parent) for p in directory.glob(f"*/{CONFIG}"))
        raise LorafoldError(
            f"{path}: no {CONFIG}, so this is no adapter"
            + f"; there is one in {', '.join(inside)}" * bool(inside)
        )
    check_intact(directory, [CONFIG, WEIGHTS, RECORD])
    problems: list[str] = []
    config = _attempt(problems, lambda: read_config(read_object(directory / CONFIG)))
    weights = _attempt(problems, lambda: _open(directory))
    base = _attempt(problems, lambda: _fingerprint(directory))
    if config is None or weights is None or base is None:
        raise LorafoldError(f"{path}: {'; '.join(problems)}")
    spec, selection, bias = config
    return Stored(directory, spec, bias, selection, weights, base)


def fill(
    model: nn.Module,
    parts: Parts,
    targets: Sequence[str],
    stored: Stored,
    base: Weights,
    problems: Sequence[str] = (),
) -> None:
    """Give the laid deltas their values: fp32, on their module's device (the CPU for modules
    without data).

    LorafoldError lists `problems` and all keys that are unknown, missing, misshapen or not finite;
    nothing is changed then.
    """
    expected = places(model, parts, targets, base)
    found = set(stored.weights.names)
    loaded = {key: stored.weights.get(key) for key in sorted(found & expected.keys())}
    wrong = list(problems)
    wrong += [
        text
        for key in sorted(found - expected.keys())
        if (text := _stray(key, stored.weights, base))
    ]
    wrong += [f"missing key {key}" for key in sorted(expected.keys() - found)]
    wrong += [
        text
        for key, tensor in loaded.items()
        if (text := _misfit(key, tensor, expected[key], loaded))
    ]
    if wrong:
        raise LorafoldError(f"{stored.path}: {'; '.join(wrong)}")
    for key, place in expected.items():
        place.assign(place.entry.from_file(loaded[key], place.site))


def _misfit(key: str, tensor: Tensor, place: Place, file: Mapping[str, Tensor]) -> str | None:
    if place.entry.misfit is not None:
        wrong = place.entry.misfit(tensor, place.site, file)
        return _not_finite(key, tensor) if wrong is None else f"{key}: {wrong}"
    own = place.encoded()
    if tensor.shape != own.shape:
        return f"{key}: shape {list(tensor.shape)}, expected {list(own.shape)}"
    if tensor.dtype != own.dtype and not (tensor.is_floating_point() and own.is_floating_point()):
        wanted = "floating point" if own.is_floating_point() else _plain(own.dtype)
        return f"{key}: {_plain(tensor.dtype)}, expected {wanted}"
    return _not_finite(key, tensor)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_finite(key: str, tensor: Tensor) -> str | None:
    count = tensor.numel() - int(torch.isfinite(tensor).sum())
    return f"{key}: {count} of {tensor.numel()} values are not finite" if count else None


def _stray(key: str, stored: Weights, base: Weights) -> str | None:
    """What is wrong with a key that no delta has: nothing if it is a copy of what is known, as PEFT
    keeps of some base weights.
    """
    tensor, plain = stored.get(key), key.replace(".modules_to_save.", ".")
    if plain != key and plain in stored.names and torch.equal(tensor, stored.get(plain)):
        return None
    own = base.find(tokens.plain(key).removeprefix(f"{ROOT}."))
    if own is None or not tensor.is_floating_point():
        return f"unknown key {key}"
    if base.shape(own) != tuple(tensor.shape):
        return (
            f"{key}: a base weight of shape {list(tensor.shape)}, where this base has"
            f" {list(base.shape(own))}"
        )
    return (
        None
        if fingerprint.same(tensor, base.get(own))
        else f"{key}: a base weight that differs from this base's"
    )


def _attempt(problems: list[str], do: Callable[[], T]) -> T | None:
    try:
        return do()
    except LorafoldError as e:
        problems.append(str(e))
        return None


def _open(directory: Path) -> Weights:
    if (directory / WEIGHTS).is_file():
        return FileWeights([directory / WEIGHTS])
    pickles = sorted(p.name for p in directory.glob("adapter_model.*"))
    reason = (
        f"found {', '.join(pickles)}, which could run code when read; convert it to safetensors"
        if pickles
        else "it is missing"
    )
    raise LorafoldError(f"{WEIGHTS}: {reason}")


def _fingerprint(directory: Path) -> Fingerprint:
    """Of the base that the adapter was made on; empty where nothing says (PEFT's own
    directories).
    """
    record = read_object(directory / RECORD) if (directory / RECORD).is_file() else {}
    try:
        return fingerprint.parse(record.get("base", {}))
    except LorafoldError as e:
        raise LorafoldError(f"{RECORD}: {e}") from None
