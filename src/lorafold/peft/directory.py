"""Writes and reads adapters as directories in PEFT's format.

    adapter_config.json            method, targets, bias, modules to save
    adapter_model.safetensors      fp32, under PEFT's names: base_model.model.<module
                                   path>.lora_A.weight ...
    lorafold.json                  the base's fingerprint, what it lies over, how it was made
    README.md                      the model card
    tokenizer.json ...             the tokenizer, if the adapter has one of its own

`table.py` says what each method looks like in these files. Reading is strict: if anything in a
directory is not understood, missing or left over, an error lists all of it and the model stays
unchanged. Directories written by PEFT are read in the same way (they have no fingerprint).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import nn

from lorafold.core.attach import Origin
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, write_json
from lorafold.files.card import CARD, OVER, VOCABULARY, training_card
from lorafold.files.contents import Contents
from lorafold.files.record import RECORD
from lorafold.methods.parts.extras import Bias
from lorafold.methods.parts.replace import ReplaceDelta
from lorafold.models import fingerprint
from lorafold.models.architecture import opened_by_name
from lorafold.models.fingerprint import Fingerprint
from lorafold.models.weights import LoadedWeights, Weights
from lorafold.peft import tokens
from lorafold.peft.checks import misfit, not_finite, stray
from lorafold.peft.config import CONFIG, WEIGHTS, read_config, write_config
from lorafold.peft.convolution import in_matrix_form
from lorafold.peft.form import DROPOUT, form_of, tell, with_dropout
from lorafold.peft.parameters import check_fused
from lorafold.peft.selection import Selection, describe
from lorafold.peft.stack import digest_of, parse
from lorafold.peft.tensors import Parts, saved_tensors, sites

FILES = (CONFIG, WEIGHTS, RECORD)
BASE_IDENTITY = "base_identity"  # in a record: of the base's files, as `identity.of_model` gives it

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
    """Write the directory, completely or not at all.

    Raises LorafoldError if the path exists and `overwrite` is off, if PEFT's format can't express
    the adapter, or if a value is not finite.

    Args:
        path: The directory to write.
        model: The model that the adapter is attached to.
        spec: The adapter's method.
        matches: The adapted modules, by the pattern with which the user selected them.
        parts: The adapter's deltas by module path.
        bias: Which biases are trained.
        modules_to_save: The names with which the user selected modules to train whole.
        tokenizer: The adapter's tokenizer; None if it has none of its own.
        overwrite: Replace a directory that exists.
        card: The text of the model card; None for a short one.
        record: How the adapter was made, for lorafold.json.
    """
    targets = matches.paths
    replaced = [
        p for p, deltas in parts.items() if any(isinstance(d, ReplaceDelta) for d in deltas)
    ]
    saved = [p for p in replaced if p not in targets]
    form = form_of(model, spec, targets)
    selection = describe(
        model, [p for p in targets if p], tuple(matches.by_pattern), saved, modules_to_save, form
    )
    config = write_config(model, spec, sites(model, parts, targets, base), selection, bias, form)
    tensors = {
        key: saved.encoded().contiguous().cpu()
        for key, saved in saved_tensors(model, parts, targets, base).items()
    }
    if wrong := [text for key, t in tensors.items() if (text := not_finite(key, t))]:
        raise LorafoldError(f"{path} was not written: {'; '.join(wrong)}")
    record = {k: v for k, v in record.items() if k != DROPOUT} | form.record
    about = {**record, "lorafold": version("lorafold"), "base": fingerprint.of(base, replaced)}
    shown = {k: v for k, v in record.items() if k in (OVER, VOCABULARY)} | {
        "recipe": {"method": type(spec).__name__, **vars(spec)}
    }
    own_card = training_card(
        config["base_model_name_or_path"] or "",
        shown,
        {},
        opened_by=opened_by_name(model),
        in_peft=form.method.of_peft,
    )
    with atomic_directory(path, overwrite) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        write_json(directory / CONFIG, config)
        write_json(directory / RECORD, about)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        (directory / CARD).write_text(card or own_card, encoding="utf-8")
    tell(form, path)
    return Path(path)


@dataclass(frozen=True)
class Stored:
    """An adapter directory whose config has been read; its tensors are not interpreted yet."""

    path: Path
    spec: Spec
    bias: Bias
    selection: Selection
    weights: Weights
    fingerprint: Fingerprint
    over: tuple[Origin, ...]  # what it was trained over
    sha256: str  # its own, as `stack.digest_of` gives it
    base_identity: str  # of the files of its base; empty if its record does not have it

    def targets(self, model: nn.Module) -> Matches:
        """Return the modules of this model to adapt."""
        check_fused(model, self.weights.names)
        return self.selection.targets(model)

    def spec_in(self, model: nn.Module) -> Spec:
        """Return the spec for this model, whose ranks and alphas PEFT looks up by other paths where
        it adapts a module's weight as a parameter.
        """
        return self.selection.spec_in(model, self.spec)

    def modules_to_save(self, model: nn.Module) -> Matches:
        """Return the modules of this model to train whole."""
        return self.selection.saved(model)

    def beside(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments of `attach` for this model besides the spec and the tokens."""
        return {
            "targets": self.targets(model),
            "bias": self.bias,
            "modules_to_save": self.modules_to_save(model),
        }

    def token_rows(self, model: nn.Module, base: Weights) -> tuple[tokens.ByPath, Stored]:
        """Return the ids of the tokens whose vectors the adapter has, by module path, and the
        adapter with exactly these vectors among its weights.
        """
        resolved = tokens.resolve(model, self.selection.tokens)
        ids, weights = tokens.completed(model, resolved, self.weights, base)
        return ids, replace(self, weights=weights)

    def base_problems(self, base: Weights) -> list[str]:
        """Return a line that says that the adapter was trained on another base, or no line. An
        adapter without a fingerprint fits any base.
        """
        found = fingerprint.differences(self.fingerprint, base)
        return [
            f"not the base it was trained on ({d}); load that base, or override this with"
            " --allow-other-base (allow_other_base=True)"
            for d in found
        ]


def read(path: str | Path | Contents) -> Stored:
    """Read an adapter directory, or what was read of it; the tensors are not interpreted yet.

    Raises LorafoldError that lists all damaged files, or everything that is missing, can't be read
    or is not supported.
    """
    contents = path if isinstance(path, Contents) else Contents(path, FILES)
    if CONFIG not in contents.files:
        inside = sorted(str(p.parent) for p in contents.path.glob(f"*/{CONFIG}"))
        raise LorafoldError(
            f"{contents.path}: found no {CONFIG}, expected the directory of an adapter"
            + f"; there is one in {', '.join(inside)}" * bool(inside)
        )
    problems: list[str] = []
    config = _attempt(problems, lambda: read_config(contents.object(CONFIG)))
    weights = _attempt(problems, lambda: _open(contents))
    about = _attempt(problems, lambda: _about(contents))
    contents.check_intact()  # what is damaged explains the problems
    if config is None or weights is None or about is None:
        raise LorafoldError(f"{contents.path}: {'; '.join(problems)}")
    spec, selection, bias = config
    written, over, record = about
    ours = with_dropout(spec, record) if selection.target_parameters else spec
    return Stored(
        contents.path, ours, bias, selection, weights, written, over, digest_of(contents),
        str(record.get(BASE_IDENTITY, "")),
    )


def fill(
    model: nn.Module,
    parts: Parts,
    targets: Sequence[str],
    stored: Stored,
    base: Weights,
    problems: Sequence[str] = (),
) -> None:
    """Give attached deltas the values of a saved adapter, in fp32, on the devices of their modules
    (the CPU for modules on the meta device).

    Raises LorafoldError that lists `problems` and all tensors that are unknown, missing, of a wrong
    shape or not finite; then nothing is changed.

    Args:
        model: The model that the deltas are attached to.
        parts: The deltas by module path.
        targets: The paths of the adapted modules.
        stored: The saved adapter.
        problems: Lines to begin the list of errors with.
    """
    expected = saved_tensors(model, parts, targets, base)
    found = set(stored.weights.names)
    loaded = {key: stored.weights.get(key) for key in sorted(found & expected.keys())}
    wrong = list(problems)
    strays = (stray(key, stored.weights, base) for key in sorted(found - expected.keys()))
    wrong += [text for text in strays if text]
    wrong += [f"missing key {key}" for key in sorted(expected.keys() - found)]
    misfits = (misfit(key, tensor, expected[key], loaded) for key, tensor in loaded.items())
    wrong += [text for text in misfits if text]
    if wrong:
        raise LorafoldError(f"{stored.path}: {'; '.join(wrong)}")
    for key, saved in expected.items():
        saved.assign(saved.entry.from_file(loaded[key], saved.site))


def _attempt(problems: list[str], do: Callable[[], T]) -> T | None:
    try:
        return do()
    except LorafoldError as e:
        problems.append(str(e))
        return None


def _open(contents: Contents) -> Weights:
    if WEIGHTS in contents.files:
        return in_matrix_form(LoadedWeights(contents.files[WEIGHTS], contents.path / WEIGHTS))
    pickles = sorted(p.name for p in contents.path.glob("adapter_model.*"))
    reason = (
        f"found {', '.join(pickles)}, which could run code when read; convert it to safetensors"
        if pickles else "it is missing"
    )
    raise LorafoldError(f"{WEIGHTS}: {reason}")


def _about(
    contents: Contents,
) -> tuple[Fingerprint, tuple[Origin, ...], Mapping[str, Any]]:
    """Return the fingerprint of the base, what the adapter lies over, and the record that says
    both; PEFT's directories have none.
    """
    record = contents.record
    try:
        return fingerprint.parse(record.get("base", {})), parse(record), record
    except LorafoldError as e:
        raise LorafoldError(f"{RECORD}: {e}") from None
